"""The gradients of the routing weights: sums of a row's parts, and dot products with tokens.

Legend: T tokens, A experts per token, S = T*A slots, R tile rows, M tiles, L experts, H model dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from comet_compile.kernels.launch import div_up, full_grid, launch, power_of_2
from comet_compile.kernels.route_tiles import TileRouting


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
