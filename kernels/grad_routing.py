"""The gradients of the routing weights: sums of a row's parts, and dot products with tokens.

Legend: T tokens, A experts per token, S = T*A slots, R tile rows, M tiles, L experts, H model dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from comet_compile.kernels.exchange_kernels import peer_pointer
from comet_compile.kernels.launch import div_up, full_grid, launch, power_of_2
from comet_compile.kernels.route_tiles import TileRouting
from comet_compile.kernels.sync import PARTS_OF_PEER, count_in, signal, wait

_PARTS = tl.constexpr(PARTS_OF_PEER)


def dot_tokens(
    tokens_TH: Tensor,
    others: Tensor,
    out_R: Tensor,
    routing: TileRouting,
    top_k: int,
    *,
    by_expert: bool = False,
    add: bool = False,
) -> None:
    """Write to `out_R` [R] float32, or add, the dot product of each row's token and its other.

    `others` are rows [R, H], or if `by_expert` the experts' [L, H].
    """
    num_rows, hidden = out_R.shape[0], tokens_TH.shape[1]
    rows = min(16, routing.block_m)
    if num_rows:
        launch(
            dot_tokens_kernel,
            full_grid(num_rows // routing.block_m, routing.block_m // rows),
            tokens_TH,
            others,
            out_R,
            routing.slot_R,
            routing.expert_M,
            routing.num_tiles,
            tokens_TH.stride(0),
            others.stride(0),
            TOP_K=top_k,
            H=hidden,
            BM=routing.block_m,
            ROWS=rows,
            BH=min(128, power_of_2(hidden)),
            BY_EXPERT=by_expert,
            ADD=add,
            num_warps=4,
        )


def grad_scores(d_w: Tensor, row_S: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [S] in `dtype`, the gradients of the routing weights; 0 for a slot without a row."""
    out_S = torch.empty(row_S.shape[0], dtype=dtype, device=row_S.device)
    if out_S.numel():
        launch(
            grad_scores_kernel,
            full_grid(div_up(out_S.numel(), 256)),
            d_w,
            row_S,
            out_S,
            out_S.numel(),
            d_w.shape[1],
            NUM_N=d_w.shape[0],
            BLOCK=256,
        )
    return out_S


@triton.jit
def grad_scores_kernel(
    d_w_ptr,  # [NUM_N, R]
    row_S_ptr,
    out_ptr,  # [S]
    num_slots,
    num_rows,
    NUM_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the column tiles' parts of the routing weights' gradients. Grid: blocks of slots."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_S_ptr + slot, mask=slot < num_slots, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile_n in range(NUM_N):
        parts = d_w_ptr + tile_n * num_rows.to(tl.int64) + row
        total += tl.load(parts, mask=row >= 0, other=0.0)
    tl.store(out_ptr + slot, total.to(out_ptr.dtype.element_ty), mask=slot < num_slots)


@triton.jit
def dot_tokens_kernel(
    tokens_ptr,  # [T, H], rows stride_tokens apart
    others_ptr,  # [R, H], or BY_EXPERT: [L, H]; rows stride_others apart
    out_ptr,  # [R]
    slot_R_ptr,
    expert_M_ptr,
    num_tiles_ptr,
    stride_tokens,
    stride_others,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    ROWS: tl.constexpr,
    BH: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    ADD: tl.constexpr,
):
    """Grid: (tiles, groups of ROWS rows of a tile), so that every row has one writer."""
    tile = tl.program_id(0)
    if tile < tl.load(num_tiles_ptr):
        row = tile * BM + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        slot = tl.load(slot_R_ptr + row)
        is_row = slot >= 0
        token = (tl.maximum(slot, 0) // TOP_K).to(tl.int64)
        other = row.to(tl.int64)
        if BY_EXPERT:
            other = tl.full((ROWS,), tl.load(expert_M_ptr + tile), tl.int64)
        cols = tl.arange(0, BH)
        token_ptrs = tokens_ptr + token[:, None] * stride_tokens + cols[None, :]
        other_ptrs = others_ptr + other[:, None] * stride_others + cols[None, :]
        acc = tl.zeros((ROWS, BH), tl.float32)
        for start in range(0, H, BH):
            mask = is_row[:, None] & (start + cols < H)[None, :]
            tokens = tl.load(token_ptrs + start, mask=mask, other=0.0).to(tl.float32)
            others = tl.load(other_ptrs + start, mask=mask, other=0.0).to(tl.float32)
            acc += tokens * others
        total = tl.sum(acc, 1)
        if ADD:
            total += tl.load(out_ptr + row)
        tl.store(out_ptr + row, total)


@triton.jit
def push_scores_kernel(
    d_w_ptr,  # [P * C * A] float32, 0 where the expert is not here
    num_tokens_P_ptr,
    peers_ptr,
    scores_offset,  # of [P, C * A], by the receiver's turn
    scored_offset,  # of [P] int32 flags, by source rank
    done_ptr,  # [1] int32, CTAs of this launch that are done
    epoch_ptr,
    abort_ptr,
    me,
    num_slots,  # C * A
    A: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Send the gradients of routing weights to the tokens' owners. Grid: (blocks of slots, P)."""
    turn = tl.program_id(1)
    receiver = (me + turn) % P
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = slot < tl.load(num_tokens_P_ptr + turn) * A
    values = tl.load(d_w_ptr + turn * num_slots + slot, mask=mask, other=0.0)
    scores = peer_pointer(peers_ptr, receiver, scores_offset, tl.float32)
    tl.store(scores + ((P - turn) % P) * num_slots + slot, values, mask=mask)
    if count_in(done_ptr, "sys") == tl.num_programs(0) * P - 1:
        tl.store(done_ptr, 0)
        # as in push_sums: who has given up tells nobody that it is done
        if tl.atomic_add(abort_ptr, 0, sem="relaxed", scope="gpu") == 0:
            epoch = tl.load(epoch_ptr) + 1
            for other in range(1, P):
                scored = peer_pointer(peers_ptr, (me + other) % P, scored_offset, tl.int32)
                signal(scored + me, epoch, "sys")


@triton.jit
def sum_scores_kernel(
    scores_ptr,  # [P, C * A] symmetric
    scored_ptr,  # [P] int32 symmetric, by source rank
    out_ptr,  # [T * A]
    epoch_ptr,
    abort_ptr,
    message_ptr,
    deadline,
    num_slots,  # T * A
    me,
    stride_turn,  # C * A
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Add up what the ranks sent for each slot; all but one sent 0. Grid: blocks of slots."""
    epoch = tl.load(epoch_ptr) + 1
    for turn in range(1, P):
        source = (me + turn) % P
        wait(
            scored_ptr + source, epoch, abort_ptr, message_ptr, deadline, _PARTS, source, epoch,
            "sys", CLOCK,
        )  # fmt: skip
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(P):
        total += tl.load(scores_ptr + turn * stride_turn + slot, mask=slot < num_slots, other=0.0)
    total = tl.where(tl.load(abort_ptr) != 0, float("nan"), total)
    tl.store(out_ptr + slot, total.to(out_ptr.dtype.element_ty), mask=slot < num_slots)
