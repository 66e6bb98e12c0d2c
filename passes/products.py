"""Products of rows with a matrix that the graph is given, and how rows come from one to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable

import torch
from torch import fx

from comet_compile.passes.graph_view import ancestors, is_float, same_size, stored, val

aten = torch.ops.aten
prims = torch.ops.prims


@dataclasses.dataclass(frozen=True)
class Product:
    """rows @ matrix, with a bias or without.

    The matrix [K, N] (or [N, K] if flipped) and the bias [N] are inputs of the graph, lines of
    one, or casts of those.
    """

    node: fx.Node
    matrix: fx.Node
    is_flipped: bool
    bias: fx.Node | None

    @property
    def rows(self) -> fx.Node:
        """What is multiplied; the output of a layer in front may have been replaced by now."""
        return self.node.args[-2]

    @property
    def tensors(self) -> tuple[fx.Node, ...]:
        """The matrix and the bias."""
        return (self.matrix,) if self.bias is None else (self.matrix, self.bias)

    @property
    def kind(self) -> Hashable:
        """What the products of one projection of several experts have in common."""
        values = [val(tensor) for tensor in self.tensors]
        shapes = tuple((tuple(value.shape), value.dtype) for value in values)
        lines = tuple(line_of(uncast(tensor)) is not None for tensor in self.tensors)
        return shapes, lines, self.is_flipped


def product_of(node: fx.Node) -> Product | None:
    """The product that `node` is, if it is one."""
    if node.target not in (aten.mm.default, aten.addmm.default):
        return None
    *biases, _, matrix = node.args
    is_flipped = matrix.target is aten.permute.default
    matrix = matrix.args[0] if is_flipped else matrix
    bias = biases[0] if biases else None
    if not _is_given(matrix, 2) or (bias is not None and not _is_given(bias, 1)):
        return None
    return Product(node, matrix, is_flipped, bias)


def _is_given(node: fx.Node, ndim: int) -> bool:
    source = uncast(node)
    given = source.op == "placeholder" or line_of(source) is not None
    return given and is_float(source) and val(source).ndim == ndim


def uncast(node: fx.Node) -> fx.Node:
    """What `node` is a cast of, or itself."""
    return node.args[0] if node.target is prims.convert_element_type.default else node


def line_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(table, number) if `node` is one line, or one matrix, of an input of the graph."""
    dim = 0
    if node.target is aten.select.int:
        table, dim, number = node.args
    elif getattr(node.target, "__name__", "") == "getitem" and _is_unbind(node.args[0]):
        unbind, number = node.args
        table, *dims = unbind.args
        dim = dims[0] if dims else 0
    else:
        return None
    if dim != 0 or not isinstance(number, int) or stored(table) is None:
        return None
    return table, number % int(val(table).shape[0])


def _is_unbind(node: fx.Node) -> bool:
    return node.target is aten.unbind.int


def table_row(node: fx.Node, num_experts: int) -> fx.Node | None:
    """The table [L, columns] of the graph's inputs that `node` is a line of."""
    line = line_of(node)
    if line is None or val(line[0]).ndim != 2 or not is_float(line[0]):
        return None
    return line[0] if same_size(val(line[0]).shape[0], num_experts) else None


# -- rows that stay rows ----------------------------------------------------------------------

_ROW_LOCAL = {
    aten.split,
    aten.split_with_sizes,
    aten.slice,
    aten.cat,
    aten.view,
    aten.reshape,
    aten.squeeze,
    aten.unsqueeze,
    aten.clone,
    aten.permute,
    prims.convert_element_type,
    aten._to_copy,
}


def is_no_op(node: fx.Node) -> bool:
    """Whether `node` is an expand to the shape that there is, of which a matmul makes two."""
    if node.target is not aten.expand.default:
        return False
    before, after = val(node.args[0]).shape, val(node).shape
    return len(before) == len(after) and all(map(same_size, before, after))


def _is_row_local(node: fx.Node) -> bool:
    target = node.target
    if is_no_op(node):
        return True
    if target is getattr and node.op == "call_function":
        return False
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.pointwise in target.tags or target.overloadpacket in _ROW_LOCAL
    return node.op == "call_function" and getattr(target, "__name__", "") == "getitem"


def row_local_sources(rows: fx.Node, products: Collection[fx.Node]) -> list[fx.Node]:
    """The nearest of `products` that `rows` come from without leaving their rows."""
    reached = ancestors([rows], stop=lambda n: n in products or not _is_row_local(n))
    return sorted(node for node in reached if node in products)
