"""The portable path of the ops: any device, any process group, torch.distributed and ATen only.

Three forms of one layer, ``y[t] = sum_j weights[t, j] * FFN_{ids[t, j]}(x[t])``:

- local: sort the slots by expert, grouped GEMMs on the sorted rows, sum back to tokens;
- replicated: the local form on this rank's experts (the op then reduces over the group);
- all_to_all: the local form on received tokens, between a dispatch and a combine that are cut in
  chunks: while chunk i is computed, chunk i+1 is on its way in and chunk i-1 on its way out.

Backward is written out: the gradient of a combine is a dispatch and the other way round, so the
all-to-all form dispatches tokens and output gradients, computes the experts' rows again and
combines the token gradients, in the same chunks. Results are the same from call to call.

Legend: T tokens, A experts per token, S = T*A slots, V rows the experts work on, R tokens received,
L local experts, H model dim, N columns of the in-projection.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from comet_compile.kernels import grouped
from comet_compile.kernels.exchange import (
    NUM_SLICES,
    Chunk,
    Exchange,
    Pending,
    RoutingCodec,
    choose_num_chunks,
    plan_exchange,
)
from comet_compile.kernels.experts import (
    ExpertParams,
    LayerMath,
    Needs,
    WeightGradRows,
    experts_backward,
    experts_forward,
)
from comet_compile.kernels.routing import SortedSlots, sort_slots, sum_by_token


@dataclasses.dataclass(frozen=True, eq=False)
class Routed:
    """The tokens of a layer call with their routing."""

    x: Tensor  # [T, H]
    ids: Tensor  # [T, A]
    weights: Tensor | None  # [T, A]


def plan_for(
    form: str, *, rows: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return how the portable path runs a layer, as plain data for reports.

    `rows` is the most token rows that any rank receives (T of the local forms).
    """
    plan: dict[str, Any] = {
        "path": "portable",
        "form": form,
        "gemm": grouped.name_of(dtype, device),
    }
    if form == "all_to_all":
        plan["num_chunks"] = choose_num_chunks(rows * hidden * dtype.itemsize)
        plan["num_slices"] = NUM_SLICES
    return plan


def local_forward(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    out_dtype: torch.dtype,
    num_valid: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y [T, H] in `out_dtype`, pre-activation rows [V, ...]) over the experts held here."""
    num_tokens, top_k = routed.ids.shape
    slots = sort_slots(routed.ids, params.num_experts, num_valid)
    x_VH = routed.x.index_select(0, slots.token_V)
    scale_V = _scale_rows(routed.weights, slots)
    out_VH, pre = experts_forward(x_VH, scale_V, slots, params, math)
    after_V = None
    if math.weight_place == "after" and scale_V is not None:
        after_V = scale_V.to(math.product_dtype)
    y_TH = sum_by_token(out_VH, slots.slot_V, num_tokens, top_k, after_V)
    return y_TH.to(out_dtype), pre


def local_backward(
    grad_y: Tensor,
    routed: Routed,
    saved: Tensor | None,
    params: ExpertParams,
    math: LayerMath,
    needs: Needs,
    num_valid: int | None = None,
) -> tuple[Tensor | None, Tensor | None, WeightGradRows]:
    """Return (d_x [T, H], d_weights [T, A], rows of the weight gradients)."""
    num_tokens, top_k = routed.ids.shape
    slots = sort_slots(routed.ids, params.num_experts, num_valid)
    x_VH = routed.x.index_select(0, slots.token_V)
    d_out_VH = grad_y.index_select(0, slots.token_V).to(routed.x.dtype)
    d_x_VH, d_scale_V, grad_rows = experts_backward(
        d_out_VH,
        x_VH,
        _scale_rows(routed.weights, slots),
        None if saved is None else saved[: slots.num_rows],
        slots,
        params,
        math,
        needs,
    )
    d_x = d_weights = None
    if needs.x and d_x_VH is not None:
        d_x = sum_by_token(d_x_VH, slots.slot_V, num_tokens, top_k).to(routed.x.dtype)
    if d_scale_V is not None and routed.weights is not None:
        d_weights = torch.zeros(
            num_tokens * top_k, dtype=routed.weights.dtype, device=grad_y.device
        )
        d_weights = d_weights.index_copy(0, slots.slot_V, d_scale_V.to(d_weights.dtype))
        d_weights = d_weights.view(num_tokens, top_k)
    return d_x, d_weights, grad_rows


def all_to_all_forward(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    out_dtype: torch.dtype,
    group: dist.ProcessGroup,
) -> Tensor:
    """Return y [T, H] for tokens sharded over the group, expert e on group rank e // L."""
    exchange = _plan(routed, params, group)
    packed = _codec(routed, params).pack(routed.ids, routed.weights)
    y = routed.x.new_empty(routed.x.shape, dtype=out_dtype)

    def send(chunk: Chunk) -> list[Pending]:
        return [chunk.start_dispatch(packed), chunk.start_dispatch(routed.x)]

    def compute(chunk: Chunk, packed_rows: Tensor, x_RH: Tensor) -> list[Pending]:
        received = _received(routed, params, group, packed_rows, x_RH)
        y_RH, _ = local_forward(received, params, math, out_dtype, chunk.recv_slots)
        return [chunk.start_return(y_RH)]

    def finish(chunk: Chunk, y_rows: Tensor) -> None:
        y[chunk.tokens] = chunk.sum_returned(y_rows).to(out_dtype)

    _run_pipeline(exchange, send, compute, finish)
    return y


def all_to_all_backward(
    grad_y: Tensor,
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    needs: Needs,
    group: dist.ProcessGroup,
) -> tuple[Tensor | None, Tensor | None, list[WeightGradRows]]:
    """Return (d_x [T, H], d_weights [T, A], rows of the weight gradients of each chunk)."""
    exchange = _plan(routed, params, group)
    packed = _codec(routed, params).pack(routed.ids, routed.weights)
    grad_y = grad_y.to(routed.x.dtype)
    needs_weights = needs.weights and routed.weights is not None
    d_x = torch.empty_like(routed.x, memory_format=torch.contiguous_format) if needs.x else None
    d_weights = None
    if needs_weights and routed.weights is not None:
        d_weights = routed.weights.new_empty(routed.weights.shape)
    parts: list[WeightGradRows] = []

    def send(chunk: Chunk) -> list[Pending]:
        return [chunk.start_dispatch(rows) for rows in (packed, routed.x, grad_y)]

    def compute(chunk: Chunk, packed_rows: Tensor, x_RH: Tensor, grad_RH: Tensor) -> list[Pending]:
        received = _received(routed, params, group, packed_rows, x_RH)
        d_x_RH, d_weights_RA, grad_rows = local_backward(
            grad_RH, received, None, params, math, needs, chunk.recv_slots
        )
        parts.append(grad_rows)
        results = [d_x_RH if needs.x else None, d_weights_RA if needs_weights else None]
        return [chunk.start_return(rows) for rows in results if rows is not None]

    def finish(chunk: Chunk, *returned: Tensor) -> None:
        rows = list(returned)
        if d_x is not None:
            d_x[chunk.tokens] = chunk.sum_returned(rows.pop(0)).to(d_x.dtype)
        if d_weights is not None:
            dest_TA = exchange.dest_TA[chunk.tokens]
            d_weights[chunk.tokens] = chunk.take_returned(rows.pop(0), dest_TA)

    _run_pipeline(exchange, send, compute, finish)
    return d_x, d_weights, parts


def pad_saved(pre: Tensor, num_slots: int) -> Tensor:
    """Return pre-activation rows [V, ...] as [S, ...], the size known before the routing is."""
    return pre if pre.shape[0] == num_slots else F.pad(pre, (0, 0, 0, num_slots - pre.shape[0]))


def _run_pipeline(exchange: Exchange, send: Any, compute: Any, finish: Any) -> None:
    """Run send -> compute -> finish over the chunks, with both transfers beside the compute.

    Every rank issues, per chunk: the dispatch of the next chunk, then this chunk's return.
    """
    chunks = exchange.chunks
    arriving = send(chunks[0])
    leaving: list[Pending] = []
    for index, chunk in enumerate(chunks):
        following = send(chunks[index + 1]) if index + 1 < len(chunks) else []
        returned = compute(chunk, *[pending.wait() for pending in arriving])
        if index > 0:
            finish(chunks[index - 1], *[pending.wait() for pending in leaving])
        arriving, leaving = following, returned
    finish(chunks[-1], *[pending.wait() for pending in leaving])


def _scale_rows(weights: Tensor | None, slots: SortedSlots) -> Tensor | None:
    if weights is None:
        return None
    # A weight beside a stray id may be anything, NaN included.
    return slots.zero_strays(weights.reshape(-1).index_select(0, slots.slot_V))


def _plan(routed: Routed, params: ExpertParams, group: dist.ProcessGroup) -> Exchange:
    row_bytes = routed.x.shape[1] * routed.x.element_size()
    return plan_exchange(routed.ids, params.num_experts, row_bytes, group)


def _codec(routed: Routed, params: ExpertParams) -> RoutingCodec:
    dtype = None if routed.weights is None else routed.weights.dtype
    return RoutingCodec(params.num_experts, routed.ids.shape[1], dtype)


def _received(
    routed: Routed,
    params: ExpertParams,
    group: dist.ProcessGroup,
    packed_rows: Tensor,
    x_RH: Tensor,
) -> Routed:
    codec = _codec(routed, params)
    ids, weights = codec.unpack(packed_rows, routed.ids.dtype, group.rank())
    return Routed(x_RH, ids, weights)
