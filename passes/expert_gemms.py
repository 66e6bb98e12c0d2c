"""Find expert GEMMs, and the pairs of them that make a layer.

An expert GEMM is `aten._grouped_mm` of rows with a stack of matrices, the op that transformers has
for experts that are not bfloat16, or an `aten.bmm`: one whose one operand was gathered from a stack
by index (one matrix per row), or of a block of rows per expert with a whole stack that is an input
of the graph (*dense*: each expert on all tokens, or on as many rows as it has capacity for). So are
the products of a Python loop over the experts, each with one matrix of a stack, taken together.
Those whose results reach another one's rows through row-local operations are its in-projections:
one, or two for separate gate and up.
"""

from __future__ import annotations

import torch
from torch import fx

from comet_compile.passes.graph_view import (
    is_float,
    is_integer,
    schema_name,
    stored,
    val,
)
from comet_compile.passes.products import (
    Product,
    is_no_op,
    line_of,
    product_of,
    row_local_sources,
)
from comet_compile.passes.reasons import Rejection, RejectReason
from comet_compile.passes.region import ExpertGemm, ExpertPair

aten = torch.ops.aten

# (rows [S, K], stack [E, K, N], ends [E]) -> [S, N]; known by name, since transformers registers it
GROUPED_MM_FALLBACK = "transformers::grouped_mm_fallback"


def find_pairs(
    graph: fx.Graph, backward: set[fx.Node]
) -> tuple[list[ExpertPair], list[tuple[fx.Node, Rejection]]]:
    """The expert layers of the forward part, and the GEMMs that belong to none."""
    gemms: list[ExpertGemm] = []
    loops = _Loops()
    refused: list[tuple[fx.Node, Rejection]] = []
    for node in graph.nodes:
        if node in backward or node.op != "call_function":
            continue
        if "_scaled_grouped_mm" in str(node.target):
            detail = f"{node.name} multiplies in a scaled 8-bit format"
            refused.append((node, Rejection(RejectReason.UNSUPPORTED_DTYPE, detail)))
        gemm = _expert_gemm(node)
        if gemm is not None:
            gemms.append(gemm)
        else:
            loops.add(node)
    gemms += loops.complete()
    place = {node: (gemm, expert) for gemm in gemms for expert, node in enumerate(gemm.nodes)}
    pairs, used = [], set()
    for gemm in gemms:
        sources = _in_projections(gemm, place)
        if not sources or not all(_may_pair(source, gemm) for source in sources):
            continue
        pair = ExpertPair(tuple(sources), gemm)
        pairs.append(pair)
        used |= {*pair.products}
    for gemm in gemms:
        # a product with a whole stack alone is no sign of experts
        if gemm.node not in used and not gemm.dense:
            detail = f"{gemm.node.name} neither feeds nor follows another expert GEMM"
            refused.append((gemm.node, Rejection(RejectReason.UNPAIRED_GEMM, detail)))
    return pairs, refused


def _may_pair(source: ExpertGemm, gemm: ExpertGemm) -> bool:
    """Whether one may be an in-projection of the other: of whole stacks, those of one length."""
    same = source.num_experts == gemm.num_experts
    return source.dense == gemm.dense and (same or not gemm.dense)


class _Loops:
    """Products with one matrix of a stack, by stack and matrix."""

    def __init__(self) -> None:
        self._of_stack: dict[tuple[fx.Node, bool], dict[int, list[Product]]] = {}

    def add(self, node: fx.Node) -> None:
        """Keep `node` if it is one of them."""
        product = product_of(node)
        line = None if product is None else line_of(product.matrix)
        if product is not None and line is not None:
            stack, number = line
            by_number = self._of_stack.setdefault((stack, product.is_flipped), {})
            by_number.setdefault(number, []).append(product)

    def complete(self) -> list[ExpertGemm]:
        """The loops that multiply with every matrix of a stack, once."""
        found = []
        for (stack, is_flipped), by_number in self._of_stack.items():
            experts = [by_number.get(e, []) for e in range(int(val(stack).shape[0]))]
            nodes = tuple(product.node for own in experts for product in own)
            targets = {node.target for node in nodes}
            if all(len(own) == 1 for own in experts) and len(targets) == 1:
                rows_at = len(nodes[0].args) - 2
                found.append(
                    ExpertGemm(nodes, rows_at, stack, is_flipped, dense=True, is_loop=True)
                )
        return found


def _expert_gemm(node: fx.Node) -> ExpertGemm | None:
    if node.target is aten._grouped_mm.default or schema_name(node) == GROUPED_MM_FALLBACK:
        rows, stack = node.args[0], node.args[1]
        if val(rows).ndim == 2 and val(stack).ndim == 3:
            return ExpertGemm((node,), 0, stack, transposed=False)
        return None
    if node.target is aten.bmm.default:
        left, right = (operand.args[0] if is_no_op(operand) else operand for operand in node.args)
        for operand, rows_at in ((left, 1), (right, 0)):
            gathered = _gathered_stack(operand)
            if gathered is not None:
                stack, flipped = gathered
                # left [S, N, K] @ column, or row @ right [S, K, N]
                return ExpertGemm((node,), rows_at, stack, transposed=(rows_at == 1) != flipped)
        if stored(right) is not None and is_float(right):
            return ExpertGemm((node,), 0, right, transposed=False, dense=True)
    return None


def _gathered_stack(operand: fx.Node) -> tuple[fx.Node, bool] | None:
    """(stack, whether its matrices are flipped) if `operand` is stack[ids]."""
    flipped = False
    while operand.target in (aten.permute.default, aten.clone.default):
        if operand.target is aten.permute.default:
            if list(operand.args[1]) not in ([0, 2, 1], [0, 1, 2]):
                return None
            flipped ^= list(operand.args[1]) == [0, 2, 1]
        operand = operand.args[0]
    if operand.target is not aten.index.Tensor or len(operand.args[1]) != 1:
        return None
    stack, (index,) = operand.args
    if val(stack).ndim == 3 and is_float(stack) and index is not None and is_integer(index):
        return stack, flipped
    return None


def _in_projections(
    gemm: ExpertGemm, place: dict[fx.Node, tuple[ExpertGemm, int]]
) -> list[ExpertGemm]:
    """The nearest expert GEMMs that the rows of `gemm` come from without leaving their rows.

    In a loop, the same for all experts, and each expert's rows from that expert's products.
    """
    found: list[list[ExpertGemm]] = []
    for expert, rows in enumerate(gemm.rows):
        sources = [place[node] for node in row_local_sources(rows, place)]
        if any(other != expert for _, other in sources):
            return []
        found.append([source for source, _ in sources])
    same = all(sources == found[0] for sources in found)
    return found[0] if same and all(len(s.nodes) == len(gemm.nodes) for s in found[0]) else []
