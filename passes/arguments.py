"""Put the tensors of `comet::moe_layer` into the graph, in the shapes that the op takes.

They come from a proven region's inputs: tokens as rows, ids counted from this rank's first expert
and without the slots that are dropped, weights looked up in scores, stacks as [L, K, N].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from comet_compile.passes.emit import Emitter
from comet_compile.passes.graph_view import val
from comet_compile.passes.prove import Layer
from comet_compile.passes.region import ExpertGemm, Kept

aten = torch.ops.aten
prims = torch.ops.prims


def emit_arguments(layer: Layer) -> list[Any]:
    """Return the op's tensors, x to b_out, with what it takes to make them put into the graph."""
    candidate, pair = layer.candidate, layer.candidate.pair
    emit = Emitter(candidate.y.graph, candidate.y, candidate.y)
    x = candidate.x
    if val(x).ndim != 2:
        x = emit.view(x, [-1, pair.ins[0].in_features])
    if val(x).dtype != val(pair.out.stack).dtype:
        # float32 experts under autocast: the rows were widened after they were moved
        x = emit.call(prims.convert_element_type.default, x, val(pair.out.stack).dtype)
    slots = [-1, candidate.top_k]
    ids = _matrix(emit, candidate.ids, slots)
    if candidate.first:
        ids = emit.call(aten.sub.Tensor, ids, candidate.first)
    if candidate.kept is not None:
        ids = _masked(emit, ids, candidate.kept)
    if candidate.scores is not None:
        weights: fx.Node | None = emit.call(aten.gather.default, candidate.scores.node, 1, ids)
    else:
        weights = None if candidate.weights is None else _matrix(emit, candidate.weights, slots)
    ins = [_logical(emit, gemm) for gemm in pair.ins]
    return [
        x,
        ids,
        weights,
        ins[0],
        ins[1] if len(ins) == 2 else None,
        _logical(emit, pair.out),
        layer.roles.b_in,
        layer.roles.b_up,
        layer.roles.b_out,
    ]


def _masked(emit: Emitter, ids: fx.Node, kept: Kept) -> fx.Node:
    """The ids [T, A], -1 (which the op drops) where a slot is not kept."""
    top_k = val(ids).shape[1]
    if kept.axes == "TEC":
        is_held = emit.call(aten.ne.Scalar, kept.node, 0)
        by_expert = emit.call(aten.any.dim, is_held, -1)
        table = emit.call(aten.gather.default, by_expert, 1, ids)
    elif kept.axes == "AT":
        table = emit.call(aten.permute.default, emit.view(kept.node, [top_k, -1]), [1, 0])
    else:
        table = _matrix(emit, kept.node, [-1, top_k])
    nowhere = emit.call(aten.full.default, [], -1, dtype=val(ids).dtype, device=val(ids).device)
    return emit.call(aten.where.self, table, ids, nowhere)


def _matrix(emit: Emitter, node: fx.Node, shape: list[Any]) -> fx.Node:
    current = val(node).shape
    if len(current) == 2 and current[1] == shape[1]:
        return node
    return emit.view(node, shape)


def _logical(emit: Emitter, gemm: ExpertGemm) -> fx.Node:
    """The stack as [L, K, N]; the memory stays where it is."""
    if not gemm.transposed:
        return gemm.stack
    logical = emit.call(aten.permute.default, gemm.stack, [0, 2, 1])
    if "recompute" in gemm.stack.meta:
        logical.meta["recompute"] = gemm.stack.meta["recompute"]
    return logical
