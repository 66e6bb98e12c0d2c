"""The gradients of the experts' matrices and biases: sums over an expert's rows.

They read the rows of whole tiles, `block_m` at a time, so rows of padding must be zeros.

Legend: T tokens, A experts per token, S = T*A slots, R tile rows, L experts, H model dim, Q columns
of a gradient's rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from comet_compile.kernels.launch import descriptor, div_up, full_grid, launch, power_of_2
from comet_compile.kernels.plan import GemmTiles
from comet_compile.kernels.route_tiles import TileRouting


def grad_weight(
    tokens: Tensor,
    rows_RQ: Tensor,
    out_LHQ: Tensor,
    routing: TileRouting,
    tiles: GemmTiles,
    top_k: int,
    *,
    gathered: bool = False,
    add: bool = False,
) -> None:
    """Fill `out_LHQ` [L, H, Q] with the sum over an expert's rows of tokens^T [H] rows [Q].

    With `add`, the sum is added to what is there, in float32, and rounded once. `tokens` is [T, H],
    or if `gathered` their rows [R, H]. `out_LHQ` has H or Q contiguous. `rows_RQ` may be columns of
    a wider tensor.
    """
    num_experts, hidden, num_q = out_LHQ.shape
    h_contiguous = out_LHQ.stride(1) == 1 and out_LHQ.stride(2) != 1
    memory = out_LHQ.transpose(1, 2) if h_contiguous else out_LHQ
    num_rows = rows_RQ.shape[0]
    if num_rows == 0:
        if not add:
            out_LHQ.zero_()
        return
    block_k = min(tiles.block_k, routing.block_m)
    # the wide side of a tile is the contiguous one
    box = (tiles.block_m, tiles.block_n)
    block_q, block_h = box if h_contiguous else box[::-1]
    launch(
        grad_weight_kernel,
        full_grid(tiles.num_programs),
        descriptor(tokens, tokens.shape, tokens.stride(), (block_k, block_h))
        if gathered
        else tokens,
        descriptor(rows_RQ, rows_RQ.shape, rows_RQ.stride(), (block_k, block_q)),
        descriptor(memory, memory.shape, memory.stride(), (1, *box)),
        routing.slot_R,
        routing.end_tile_L,
        tokens.stride(0),
        num_experts,
        TOP_K=top_k,
        H=hidden,
        Q=num_q,
        BM=routing.block_m,
        BH=block_h,
        BQ=block_q,
        BK=block_k,
        GATHERED=gathered,
        H_CONTIGUOUS=h_contiguous,
        ADD=add,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def grad_bias(
    rows: Tensor,
    out_LQ: Tensor,
    routing: TileRouting,
    top_k: int,
    weights_TA: Tensor | None = None,
    *,
    gathered: bool = True,
) -> None:
    """Fill `out_LQ` [L, Q] with the sum over an expert's rows, each times its routing weight.

    `rows` is [R, Q], or [T, Q] if not `gathered`; columns of a wider tensor will do.
    """
    num_experts, num_q = out_LQ.shape
    if routing.slot_R.shape[0] == 0:
        out_LQ.zero_()
        return
    block_q = min(64, power_of_2(num_q))
    launch(
        grad_bias_kernel,
        full_grid(num_experts, div_up(num_q, block_q)),
        rows,
        out_LQ,
        weights_TA,
        routing.slot_R,
        routing.end_tile_L,
        rows.stride(0),
        *out_LQ.stride(),
        TOP_K=top_k,
        Q=num_q,
        BM=routing.block_m,
        ROWS=min(64, routing.block_m),
        BQ=block_q,
        GATHERED=gathered,
        num_warps=4,
    )


@triton.jit
def grad_weight_kernel(
    tokens_ptr,  # [T, H], rows stride_tokens apart; GATHERED: a descriptor of [R, H]
    rows_desc,  # [R, Q]
    out_desc,  # [L, Q, H] or [L, H, Q]
    slot_R_ptr,
    end_tile_L_ptr,
    stride_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    Q: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    GATHERED: tl.constexpr,
    H_CONTIGUOUS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Grid: as many programs as fit, each taking every num_programs-th tile of all experts.

    Order: expert by expert, H fastest, so that the programs beside each other share an expert's
    rows in L2. BK rows at a time; BK divides BM, so no step crosses into the next expert.
    """
    num_h: tl.constexpr = (H + BH - 1) // BH
    num_q: tl.constexpr = (Q + BQ - 1) // BQ
    for tile in tl.range(tl.program_id(0), num_experts * num_h * num_q, tl.num_programs(0)):
        expert = tile // (num_h * num_q)
        inside = tile % (num_h * num_q)
        start_h = (inside % num_h) * BH
        start_q = (inside // num_h) * BQ
        begin, end = _rows_of(expert, end_tile_L_ptr, BM)
        offs_h = start_h + tl.arange(0, BH)
        if not ADD:
            acc = tl.zeros((BQ, BH) if H_CONTIGUOUS else (BH, BQ), tl.float32)
        elif H_CONTIGUOUS:
            acc = out_desc.load([expert, start_q, start_h]).reshape(BQ, BH).to(tl.float32)
        else:
            acc = out_desc.load([expert, start_h, start_q]).reshape(BH, BQ).to(tl.float32)
        for row in tl.range(begin, end, BK):
            if GATHERED:
                tokens = tokens_ptr.load([row, start_h])
            else:
                slot = tl.load(slot_R_ptr + row + tl.arange(0, BK))
                token = tl.maximum(slot, 0) // TOP_K
                ptrs = tokens_ptr + token[:, None].to(tl.int64) * stride_tokens + offs_h[None, :]
                mask = (slot >= 0)[:, None]
                if H % BH != 0:
                    mask = mask & (offs_h < H)[None, :]
                tokens = tl.load(ptrs, mask=mask, other=0.0)
            rows = rows_desc.load([row, start_q])
            acc = tl.dot(rows.T, tokens, acc) if H_CONTIGUOUS else tl.dot(tokens.T, rows, acc)
        if H_CONTIGUOUS:
            out_desc.store([expert, start_q, start_h], acc.to(out_desc.dtype).reshape(1, BQ, BH))
        else:
            out_desc.store([expert, start_h, start_q], acc.to(out_desc.dtype).reshape(1, BH, BQ))


@triton.jit
def grad_bias_kernel(
    rows_ptr,  # [T, Q], GATHERED: [R, Q]; rows stride_rows apart
    out_ptr,  # [L, Q]
    weights_ptr,  # [S] or None
    slot_R_ptr,
    end_tile_L_ptr,
    stride_rows,
    stride_out_l,
    stride_out_q,
    TOP_K: tl.constexpr,
    Q: tl.constexpr,
    BM: tl.constexpr,
    ROWS: tl.constexpr,
    BQ: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """Grid: (experts, blocks of BQ columns). One program walks all rows of an expert, in order."""
    expert = tl.program_id(0)
    begin, end = _rows_of(expert, end_tile_L_ptr, BM)
    cols = tl.program_id(1) * BQ + tl.arange(0, BQ)
    acc = tl.zeros((ROWS, BQ), tl.float32)
    for first in tl.range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        slot = tl.load(slot_R_ptr + row)
        if not GATHERED:
            row = tl.maximum(slot, 0) // TOP_K
        mask = (slot >= 0)[:, None] & (cols < Q)[None, :]
        ptrs = rows_ptr + row[:, None].to(tl.int64) * stride_rows + cols[None, :]
        rows = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            scale = tl.load(weights_ptr + tl.maximum(slot, 0), mask=slot >= 0, other=0.0)
            rows *= scale.to(tl.float32)[:, None]
        acc += rows
    out_ptrs = out_ptr + expert.to(tl.int64) * stride_out_l + cols * stride_out_q
    tl.store(out_ptrs, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=cols < Q)


@triton.jit
def _rows_of(expert, end_tile_L_ptr, BM: tl.constexpr):
    """Return the first row of the expert's tiles and the row behind the last."""
    begin = tl.load(end_tile_L_ptr + tl.maximum(expert, 1) - 1) * BM
    return tl.where(expert == 0, 0, begin), tl.load(end_tile_L_ptr + expert) * BM
