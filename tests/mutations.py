"""Break one thing of a captured graph at a time, systematically.

A mutation is named by what it does and where, ``negate mul_3`` or ``swap_splits all_to_all_2``.
Most insert one operation behind a node, so that all its users see a changed value of the same
shape and dtype; the others change an argument or the operation itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import operator
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
prims = torch.ops.prims
c10d = torch.ops._c10d_functional


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One change: `kind` of `KINDS`, made at the node called `node`."""

    kind: str
    node: str

    def __str__(self) -> str:
        return f"{self.kind} {self.node}"


class Inapplicable(Exception):
    """The change makes no sense at this node (or would leave the graph ill-formed)."""


def mutations(graph: fx.Graph, region: Iterable[str]) -> Iterator[Mutation]:
    """All mutations of the nodes called `region`, in graph order."""
    names = set(region)
    for node in graph.nodes:
        if node.name in names and node.op == "call_function":
            for kind, (applies, _) in KINDS.items():
                if applies(node):
                    yield Mutation(kind, node.name)


def sampled(found: Iterable[Mutation], count: int, seed: int) -> list[Mutation]:
    """`count` of the mutations, spread over the kinds as evenly as they allow."""
    generator = random.Random(seed)
    by_kind: dict[str, list[Mutation]] = {}
    for mutation in found:
        by_kind.setdefault(mutation.kind, []).append(mutation)
    for queue in by_kind.values():
        generator.shuffle(queue)
    chosen: list[Mutation] = []
    while len(chosen) < count and any(by_kind.values()):
        for queue in by_kind.values():
            if queue and len(chosen) < count:
                chosen.append(queue.pop())
    return chosen


def mutate(graph: fx.Graph, mutation: Mutation) -> None:
    """Change `graph` itself; raises Inapplicable if the change is none."""
    node = next(n for n in graph.nodes if n.name == mutation.node)
    KINDS[mutation.kind][1](node)
    graph.lint()


# -- what a node is ---------------------------------------------------------------------------


def _val(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _is_float(node: fx.Node) -> bool:
    return isinstance(_val(node), Tensor) and _val(node).is_floating_point() and _is_read(node)


def _is_int(node: fx.Node) -> bool:
    value = _val(node)
    if not isinstance(value, Tensor) or not _is_read(node):
        return False
    return not value.is_floating_point() and value.dtype != torch.bool


def _is_bool(node: fx.Node) -> bool:
    return isinstance(_val(node), Tensor) and _val(node).dtype == torch.bool and _is_read(node)


def _is_read(node: fx.Node) -> bool:
    return bool(node.users)


def _has_rows(node: fx.Node) -> bool:
    return _val(node).ndim >= 1 and _size(node, 0) != 1


def _size(node: fx.Node, dim: int) -> Any:
    size = _val(node).shape[dim]
    return size if isinstance(size, int) else None


def _targets(*packets: Any) -> Callable[[fx.Node], bool]:
    def applies(node: fx.Node) -> bool:
        return getattr(node.target, "overloadpacket", None) in packets

    return applies


# -- building blocks --------------------------------------------------------------------------


def _behind(node: fx.Node, *calls: tuple[Any, Callable[[fx.Node], tuple[Any, ...]]]) -> None:
    """Insert `calls` behind `node`, each (target, arguments from the previous value)."""
    place, current, new = node, node, []
    for target, arguments in calls:
        with node.graph.inserting_after(place):
            current = node.graph.call_function(target, arguments(current))
        _evaluate(current)
        new.append(current)
        place = current
    old, result = _val(node), _val(current)
    if isinstance(old, Tensor) and (old.dtype != result.dtype or old.ndim != result.ndim):
        raise Inapplicable(f"{old.dtype} became {result.dtype}")
    node.replace_all_uses_with(current, delete_user_cb=lambda user: user not in new)


def _evaluate(node: fx.Node) -> None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _val)
    modes = [v.fake_mode for n in node.all_input_nodes if hasattr(v := _val(n), "fake_mode")]
    if not modes:
        raise Inapplicable("no tensor among the arguments")
    try:
        with modes[0], _quiet():
            node.meta["val"] = node.target(*args, **kwargs)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise Inapplicable(str(error)) from error


def _retarget(node: fx.Node, target: Any, args: tuple[Any, ...] | None = None) -> None:
    """Another operation, or other arguments, at the same place; the value keeps its shape."""
    old_target, old_args, old = node.target, node.args, _val(node)
    node.target = target
    if args is not None:
        node.args = args
    if node.target is old_target and node.args == old_args:
        raise Inapplicable("nothing changes")
    if not isinstance(old, Tensor):
        return
    _evaluate(node)
    if str(old.shape) != str(_val(node).shape) or old.dtype != _val(node).dtype:
        raise Inapplicable("shape or dtype change")


def _unary(target: Any, *arguments: Any) -> Callable[[fx.Node], None]:
    return lambda node: _behind(node, (target, lambda n: (n, *arguments)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Fake tensors log arguments that do not fit as errors of theirs."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


# -- mutations of values ----------------------------------------------------------------------


def _roll_rows(node: fx.Node) -> None:
    if _size(node, 0) is None:
        # fake tensors cannot roll a number of rows that is known at run time only
        _flip_rows(node)
        return
    _behind(node, (aten.roll.default, lambda n: (n, [1], [0])))


def _roll_columns(node: fx.Node) -> None:
    if _val(node).ndim < 2 or _size(node, -1) == 1:
        raise Inapplicable("no columns")
    _behind(node, (aten.roll.default, lambda n: (n, [1], [_val(n).ndim - 1])))


def _flip_rows(node: fx.Node) -> None:
    _behind(node, (aten.flip.default, lambda n: (n, [0])))


def _zero_first_row(node: fx.Node) -> None:
    zero = (aten.mul.Tensor, lambda n: (n, 0))
    first = (aten.slice_scatter.default, lambda n: (node, n, 0, 0, 1))
    _behind(node, zero, (aten.slice.Tensor, lambda n: (n, 0, 0, 1)), first)


def _mean_over_rows(node: fx.Node) -> None:
    """Every row gets a little of the others."""
    _behind(
        node,
        (aten.mean.dim, lambda n: (n, [0], True)),
        (aten.add.Tensor, lambda n: (node, n)),
    )


def _inverse(node: fx.Node) -> None:
    """argsort: of a permutation its inverse."""
    if _val(node).ndim != 1:
        raise Inapplicable("not one-dimensional")
    convert = (prims.convert_element_type.default, lambda n: (n, _val(node).dtype))
    _behind(node, (aten.argsort.default, lambda n: (n,)), convert)


def _exclusive(node: fx.Node) -> None:
    """Where each segment starts, for where it ends."""
    source = node.args[0]
    _behind(
        node,
        (aten.sub.Tensor, lambda n: (n, source)),
        (prims.convert_element_type.default, lambda n: (n, _val(node).dtype)),
    )


def _rolled_source(node: fx.Node) -> None:
    source = node.args[0]
    with node.graph.inserting_before(node):
        rolled = node.graph.call_function(aten.roll.default, (source, [1], [0]))
    _evaluate(rolled)
    node.args = (rolled, *node.args[1:])


def _escape(node: fx.Node) -> None:
    """Return an inner value from the graph as well."""
    output = node.graph.output_node()
    (results,) = output.args
    output.args = (type(results)([*results, node]),)


def _one_operand(kind: Any, *arguments: Any) -> Callable[[fx.Node], None]:
    """Change the first index that `node` reads for this reader alone."""

    def change(node: fx.Node) -> None:
        source = next(s for s in node.all_input_nodes if _is_int(s))
        if len(source.users) == 1:
            raise Inapplicable("the only reader")
        with node.graph.inserting_before(node):
            changed = node.graph.call_function(kind, (source, *arguments))
        _evaluate(changed)
        if _val(changed).dtype != _val(source).dtype:
            raise Inapplicable("dtype changes")
        node.replace_input_with(source, changed)

    return change


def _reads_index(node: fx.Node) -> bool:
    return any(_is_int(s) and _has_rows(s) for s in node.all_input_nodes)


# -- mutations of operations ------------------------------------------------------------------


def _other_divisor(node: fx.Node) -> None:
    divisor = node.args[1]
    if not isinstance(divisor, int):
        raise Inapplicable("not divided by a number")
    _retarget(node, node.target, (node.args[0], divisor + 1, *node.args[2:]))


def _floor_to_remainder(node: fx.Node) -> None:
    if not isinstance(node.args[1], int) or not _is_int(node):
        raise Inapplicable("not divided by a number")
    node.kwargs = {}
    _retarget(node, aten.remainder.Scalar, node.args[:2])


def _sum_to_mean(node: fx.Node) -> None:
    if node.target is not aten.sum.dim_IntList or not _is_float(node):
        raise Inapplicable("not a sum of floats")
    size = 1
    for dim in node.args[1]:
        size = size * _val(node.args[0]).shape[dim]
    _behind(node, (aten.div.Tensor, lambda n: (n, size if isinstance(size, int) else 3)))


def _sum_other_dim(node: fx.Node) -> None:
    dims = node.args[1]
    ndim = _val(node.args[0]).ndim
    _retarget(node, node.target, (node.args[0], [(dims[0] + 1) % ndim], *node.args[2:]))


def _sum_to_max(node: fx.Node) -> None:
    if len(node.args[1]) != 1:
        raise Inapplicable("several dimensions")
    _retarget(node, aten.amax.default, (node.args[0], node.args[1], *node.args[2:3]))


def _swap(pairs: dict[Any, Any]) -> tuple[Callable[[fx.Node], bool], Callable[[fx.Node], None]]:
    both = pairs | {b: a for a, b in pairs.items()}

    def change(node: fx.Node) -> None:
        _retarget(node, both[node.target], node.args[:2])

    return lambda n: n.target in both, change


def _swap_operands(node: fx.Node) -> None:
    left, right, *rest = node.args
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or left is right:
        raise Inapplicable("one operand")
    _retarget(node, node.target, (right, left, *rest))


def _square_operand(node: fx.Node) -> None:
    left, right, *rest = node.args
    if left is right or not isinstance(right, fx.Node):
        raise Inapplicable("one operand")
    _retarget(node, node.target, (left, left, *rest))


def _other_operand_only(node: fx.Node) -> None:
    left, right, *rest = node.args
    if left is right or not isinstance(right, fx.Node):
        raise Inapplicable("one operand")
    _retarget(node, node.target, (right, right, *rest))


def _other_number(node: fx.Node) -> None:
    """Every plain number (a limit, a slope, a fill, a bound) half again as large, or one for 0."""
    args = list(node.args)
    places = [
        i for i, a in enumerate(args) if isinstance(a, (int, float)) and not isinstance(a, bool)
    ]
    if not places:
        raise Inapplicable("no number")
    place = places[-1]
    number = args[place]
    changed = 1.5 * number if isinstance(number, float) else number + 1
    args[place] = changed if changed != number else 1
    _retarget(node, node.target, tuple(args))


def _flip_accumulate(node: fx.Node) -> None:
    base, indices, values, *rest = node.args
    accumulate = rest[0] if rest else False
    _retarget(node, node.target, (base, indices, values, not accumulate))


def _flip_descending(node: fx.Node) -> None:
    names = [argument.name for argument in node.target._schema.arguments]
    place = names.index("descending")
    if "descending" in node.kwargs:
        node.kwargs = {**node.kwargs, "descending": not node.kwargs["descending"]}
        return
    args = list(node.args)
    if len(args) <= place:
        node.kwargs = {**node.kwargs, "descending": True}
        return
    args[place] = not args[place]
    _retarget(node, node.target, tuple(args))


def _other_output(node: fx.Node) -> None:
    """The up for the gate, values for positions."""
    source, place = node.args
    values = _val(source)
    other = (place + 1) % len(values)
    if not isinstance(values[other], Tensor) or values[other].dtype != _val(node).dtype:
        raise Inapplicable("another type")
    _retarget(node, node.target, (source, other))


def _reverse_list(node: fx.Node) -> None:
    parts, *rest = node.args
    _retarget(node, node.target, (type(parts)(reversed(parts)), *rest))


def _shift_slice(node: fx.Node) -> None:
    source, dim, start, end, *rest = (*node.args, *(0, 0, 2**63 - 1)[len(node.args) - 1 :])
    size = _val(source).shape[dim]
    if not isinstance(size, int) or not isinstance(start, int):
        raise Inapplicable("symbolic")
    step = rest[0] if rest else 1
    moved = start + 1 if start + 1 < size and (end >= size or step > 1) else start - 1
    if step == 1:
        # a window of the same length, elsewhere
        length = min(end, size) - start
        moved = 0 if start else size - length
        _retarget(node, node.target, (source, dim, moved, moved + length))
        return
    _retarget(node, node.target, (source, dim, moved, end, *rest))


# -- mutations of experts and collectives -----------------------------------------------------


def _before_argument(node: fx.Node, place: int, target: Any, *arguments: Any) -> None:
    with node.graph.inserting_before(node):
        changed = node.graph.call_function(target, (node.args[place], *arguments))
    _evaluate(changed)
    if str(_val(changed).shape) != str(_val(node.args[place]).shape):
        raise Inapplicable("shape changes")
    args = list(node.args)
    args[place] = changed
    node.args = tuple(args)


def _permute_experts(node: fx.Node) -> None:
    """One projection finds its experts in another order."""
    if _val(node.args[1]).ndim != 3:
        raise Inapplicable("no stack")
    _before_argument(node, 1, aten.roll.default, [1], [0])


def _transpose_experts(node: fx.Node) -> None:
    _before_argument(node, 1, aten.permute.default, [0, 2, 1])


def _scale_first_expert(node: fx.Node) -> None:
    place = 1
    if _val(node.args[place]).ndim != 3:
        raise Inapplicable("no stack")
    stack = node.args[place]
    with node.graph.inserting_before(node):
        first = node.graph.call_function(aten.slice.Tensor, (stack, 0, 0, 1))
        _evaluate(first)
        doubled = node.graph.call_function(aten.mul.Tensor, (first, 2))
        _evaluate(doubled)
        changed = node.graph.call_function(aten.slice_scatter.default, (stack, doubled, 0, 0, 1))
        _evaluate(changed)
    node.args = (node.args[0], changed, *node.args[2:])


def _swap_splits(node: fx.Node) -> None:
    rows, out, inp, group = node.args
    if list(out) == list(inp):
        raise Inapplicable("symmetric")
    node.args = (rows, inp, out, group)


def _rotate_out_splits(node: fx.Node) -> None:
    rows, out, inp, group = node.args
    if len(set(out)) == 1:
        raise Inapplicable("symmetric")
    node.args = (rows, [*out[1:], out[0]], inp, group)


def _rotate_in_splits(node: fx.Node) -> None:
    rows, out, inp, group = node.args
    if len(set(inp)) == 1:
        raise Inapplicable("symmetric")
    node.args = (rows, out, [*inp[1:], inp[0]], group)


def _rotate_both_splits(node: fx.Node) -> None:
    rows, out, inp, group = node.args
    if len(set(inp)) == 1:
        raise Inapplicable("symmetric")
    node.args = (rows, [*out[1:], out[0]], [*inp[1:], inp[0]], group)


def _other_group(node: fx.Node) -> None:
    node.args = (*node.args[:-1], "another_group")


def _no_collective(node: fx.Node) -> None:
    """Keep the rows at home."""
    if str(_val(node).shape) != str(_val(node.args[0]).shape):
        raise Inapplicable("the number of rows changes")
    node.replace_all_uses_with(node.args[0])


# kinds that break a region without changing its numbers
SILENT_KINDS = frozenset({"escape", "other_group"})

_is_all_to_all = _targets(c10d.all_to_all_single)
_is_gemm = _targets(aten._grouped_mm, aten.bmm)

Rule = tuple[Callable[[fx.Node], bool], Callable[[fx.Node], None]]

KINDS: dict[str, Rule] = {
    "double": (_is_float, _unary(aten.mul.Tensor, 2)),
    "negate": (_is_float, _unary(aten.neg.default)),
    "square": (_is_float, lambda n: _behind(n, (aten.mul.Tensor, lambda v: (v, v)))),
    "zero": (_is_float, _unary(aten.mul.Tensor, 0)),
    "shift": (_is_float, _unary(aten.add.Tensor, 0.25)),
    "abs": (_is_float, _unary(aten.abs.default)),
    "roll_rows": (lambda n: _is_float(n) and _has_rows(n), _roll_rows),
    "roll_columns": (_is_float, _roll_columns),
    "zero_first_row": (lambda n: _is_float(n) and _has_rows(n), _zero_first_row),
    "mix_rows": (lambda n: _is_float(n) and _has_rows(n), _mean_over_rows),
    "escape": (_is_float, _escape),
    "roll_index": (lambda n: _is_int(n) and _has_rows(n), _roll_rows),
    "flip_index": (lambda n: _is_int(n) and _has_rows(n), _flip_rows),
    "invert_index": (_is_int, _inverse),
    "index_plus_one": (_is_int, _unary(aten.add.Tensor, 1)),
    "index_minus_one": (_is_int, _unary(aten.sub.Tensor, 1)),
    "zero_index": (_is_int, _unary(aten.mul.Tensor, 0)),
    "clamp_index": (_is_int, _unary(aten.clamp_min.default, 1)),
    "roll_index_here": (_reads_index, _one_operand(aten.roll.default, [1], [0])),
    "flip_index_here": (_reads_index, _one_operand(aten.flip.default, [0])),
    "zero_index_here": (_reads_index, _one_operand(aten.mul.Tensor, 0)),
    "not": (_is_bool, _unary(aten.logical_not.default)),
    "always": (_is_bool, lambda n: _behind(n, (aten.ones_like.default, lambda v: (v,)))),
    "never": (_is_bool, lambda n: _behind(n, (aten.zeros_like.default, lambda v: (v,)))),
    "exclusive_offsets": (_targets(aten.cumsum), _exclusive),
    "offsets_of_rolled_counts": (_targets(aten.cumsum), _rolled_source),
    "other_divisor": (_targets(aten.div, aten.floor_divide), _other_divisor),
    "remainder_for_quotient": (
        lambda n: _targets(aten.div, aten.floor_divide)(n) and _is_int(n),
        _floor_to_remainder,
    ),
    "mean_for_sum": (_targets(aten.sum), _sum_to_mean),
    "sum_other_dim": (lambda n: n.target is aten.sum.dim_IntList, _sum_other_dim),
    "max_for_sum": (lambda n: n.target is aten.sum.dim_IntList, _sum_to_max),
    "add_for_mul": _swap({aten.mul.Tensor: aten.add.Tensor}),
    "sub_for_add": _swap({aten.add.Tensor: aten.sub.Tensor}),
    "min_for_max": _swap({aten.maximum.default: aten.minimum.default}),
    "comparison": _swap(
        {
            aten.lt.Scalar: aten.le.Scalar,
            aten.gt.Scalar: aten.ge.Scalar,
            aten.eq.Scalar: aten.ne.Scalar,
            aten.lt.Tensor: aten.le.Tensor,
            aten.gt.Tensor: aten.ge.Tensor,
        }
    ),
    "tanh_for_sigmoid": _swap({aten.sigmoid.default: aten.tanh.default}),
    "swap_operands": (
        _targets(aten.sub, aten.div, aten.where, aten.bmm, aten.mm),
        _swap_operands,
    ),
    "square_operand": (_targets(aten.mul), _square_operand),
    "drop_operand": (_targets(aten.mul, aten.add), _other_operand_only),
    "other_number": (lambda n: isinstance(n.target, torch._ops.OpOverload), _other_number),
    "flip_accumulate": (_targets(aten.index_put), _flip_accumulate),
    "scatter_for_add": (
        _targets(aten.scatter_add),
        lambda n: _retarget(n, aten.scatter.src, n.args),
    ),
    "flip_descending": (_targets(aten.sort, aten.argsort), _flip_descending),
    "other_output": (lambda n: n.target is operator.getitem, _other_output),
    "reverse_list": (_targets(aten.cat, aten.stack), _reverse_list),
    "shift_slice": (_targets(aten.slice), _shift_slice),
    "permute_experts": (_is_gemm, _permute_experts),
    "transpose_experts": (_is_gemm, _transpose_experts),
    "scale_first_expert": (_is_gemm, _scale_first_expert),
    "swap_splits": (_is_all_to_all, _swap_splits),
    "rotate_out_splits": (_is_all_to_all, _rotate_out_splits),
    "rotate_in_splits": (_is_all_to_all, _rotate_in_splits),
    "rotate_both_splits": (_is_all_to_all, _rotate_both_splits),
    "other_group": (_is_all_to_all, _other_group),
    "skip_collective": (_is_all_to_all, _no_collective),
}
