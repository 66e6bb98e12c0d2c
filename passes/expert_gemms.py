"""Find expert GEMMs, and the pairs of them that make a layer.

An expert GEMM is `aten._grouped_mm` of rows with a stack of matrices, the op that transformers has
for experts that are not bfloat16, or an `aten.bmm`: one whose one operand was gathered from a stack
by index (one matrix per row), or of a block of rows per expert with a whole stack that is an input
of the graph (*dense*: each expert on all tokens, or on as many rows as it has capacity for). Those
whose results reach another one's rows through row-local operations are its in-projections: one, or
two for separate gate and up.
"""

from __future__ import annotations

import torch
from torch import fx

from comet_compile.passes.graph_view import (
    ancestors,
    is_float,
    is_integer,
    same_size,
    schema_name,
    stored,
    val,
)
from comet_compile.passes.reasons import Rejection, RejectReason
from comet_compile.passes.region import ExpertGemm, ExpertPair

aten = torch.ops.aten
prims = torch.ops.prims

# (rows [S, K], stack [E, K, N], ends [E]) -> [S, N]; known by name, since transformers registers it
GROUPED_MM_FALLBACK = "transformers::grouped_mm_fallback"


def find_pairs(
    graph: fx.Graph, backward: set[fx.Node]
) -> tuple[list[ExpertPair], list[tuple[fx.Node, Rejection]]]:
    """The expert layers of the forward part, and the GEMMs that belong to none."""
    gemms: dict[fx.Node, ExpertGemm] = {}
    refused: list[tuple[fx.Node, Rejection]] = []
    for node in graph.nodes:
        if node in backward or node.op != "call_function":
            continue
        if "_scaled_grouped_mm" in str(node.target):
            detail = f"{node.name} multiplies in a scaled 8-bit format"
            refused.append((node, Rejection(RejectReason.UNSUPPORTED_DTYPE, detail)))
        gemm = _expert_gemm(node)
        if gemm is not None:
            gemms[node] = gemm
    pairs, used = [], set()
    for node, gemm in gemms.items():
        sources = _row_local_sources(gemm.rows, gemms)
        if not sources:
            continue
        if any(gemms[s].dense != gemm.dense for s in sources):
            continue
        pair = ExpertPair(tuple(gemms[s] for s in sources), gemm)
        pairs.append(pair)
        used |= {node, *sources}
    for node in gemms:
        # a product with a whole stack alone is no sign of experts
        if node not in used and not gemms[node].dense:
            detail = f"{node.name} neither feeds nor follows another expert GEMM"
            refused.append((node, Rejection(RejectReason.UNPAIRED_GEMM, detail)))
    return pairs, refused


def _expert_gemm(node: fx.Node) -> ExpertGemm | None:
    if node.target is aten._grouped_mm.default or schema_name(node) == GROUPED_MM_FALLBACK:
        rows, stack = node.args[0], node.args[1]
        if val(rows).ndim == 2 and val(stack).ndim == 3:
            return ExpertGemm(node, rows, stack, transposed=False)
        return None
    if node.target is aten.bmm.default:
        left, right = (operand.args[0] if _is_no_op(operand) else operand for operand in node.args)
        for operand, other, on_left in ((left, right, True), (right, left, False)):
            gathered = _gathered_stack(operand)
            if gathered is not None:
                stack, flipped = gathered
                # left [S, N, K] @ column, or row @ right [S, K, N]
                return ExpertGemm(node, other, stack, transposed=on_left != flipped)
        if stored(right) is not None and is_float(right):
            return ExpertGemm(node, left, right, transposed=False, dense=True)
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


def _is_no_op(node: fx.Node) -> bool:
    """Whether `node` is an expand to the shape that there is, of which a matmul makes two."""
    if node.target is not aten.expand.default:
        return False
    before, after = val(node.args[0]).shape, val(node).shape
    return len(before) == len(after) and all(map(same_size, before, after))


def _is_row_local(node: fx.Node) -> bool:
    target = node.target
    if _is_no_op(node):
        return True
    if target is getattr and node.op == "call_function":
        return False
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.pointwise in target.tags or target.overloadpacket in _ROW_LOCAL
    return node.op == "call_function" and getattr(target, "__name__", "") == "getitem"


def _row_local_sources(rows: fx.Node, gemms: dict[fx.Node, ExpertGemm]) -> list[fx.Node]:
    """The nearest expert GEMMs that `rows` come from without leaving their rows."""
    reached = ancestors([rows], stop=lambda n: n in gemms or not _is_row_local(n))
    return [node for node in gemms if node in reached]
