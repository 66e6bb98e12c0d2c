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
    part = min(tiles.store_n or (64 if add else tiles.block_n), tiles.block_n)
    launch(
        grad_weight_kernel,
        full_grid(tiles.num_programs),
        descriptor(tokens, tokens.shape, tokens.stride(), (block_k, block_h))
        if gathered
        else tokens,
        descriptor(rows_RQ, rows_RQ.shape, rows_RQ.stride(), (block_k, block_q)),
        descriptor(memory, memory.shape, memory.stride(), (1, box[0], part)),
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
        PART=part,
        ADD=add,
        EXPERTS=power_of_2(num_experts),
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
    PART: tl.constexpr,
    ADD: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of 2, as many or more
):
    """Grid: as many programs as fit, each taking every num_programs-th tile of all experts.

    Order: expert by expert, H fastest, so that the programs beside each other share an expert's
    rows in L2. BK rows at a time; BK divides BM, so no step crosses into the next expert. The steps
    of all tiles are one loop, in which those of the next tile are fetched while one is stored:
    where experts have few rows, storing takes as long as multiplying.
    """
    num_h: tl.constexpr = (H + BH - 1) // BH
    num_q: tl.constexpr = (Q + BQ - 1) // BQ
    each: tl.constexpr = num_h * num_q
    steps = _count_steps(end_tile_L_ptr, num_experts, each, BM, BK, EXPERTS)
    tile = tl.program_id(0) - tl.num_programs(0)
    expert, start_h, start_q, row, end, left = tile, 0, 0, 0, 0, 0
    acc = tl.zeros((BQ, BH) if H_CONTIGUOUS else (BH, BQ), tl.float32)
    for _ in tl.range(steps):
        # all that the next rows lie by is set in these branches: so they can be fetched steps ahead
        if left == 0:
            tile += tl.num_programs(0)
            expert = tile // each
            start_h = (tile % each % num_h) * BH
            start_q = (tile % each // num_h) * BQ
            row, end = _rows_of(expert, end_tile_L_ptr, BM)
            left = tl.maximum((end - row) // BK, 1) - 1
        else:
            row += BK
            left -= 1
        if GATHERED:
            tokens = tokens_ptr.load([row, start_h])
        else:
            offs_h = start_h + tl.arange(0, BH)
            offs_r = row + tl.arange(0, BK)
            slot = tl.load(slot_R_ptr + offs_r, mask=offs_r < end, other=-1)
            token = tl.maximum(slot, 0) // TOP_K
            ptrs = tokens_ptr + token[:, None].to(tl.int64) * stride_tokens + offs_h[None, :]
            mask = (slot >= 0)[:, None]
            if H % BH != 0:
                mask = mask & (offs_h < H)[None, :]
            tokens = tl.load(ptrs, mask=mask, other=0.0)
        rows = rows_desc.load([row, start_q])
        acc = tl.dot(rows.T, tokens, acc) if H_CONTIGUOUS else tl.dot(tokens.T, rows, acc)
        if left == 0:
            if row == end:  # the step was one of another expert's rows
                acc = tl.zeros_like(acc)
            if H_CONTIGUOUS:
                _store_sums(acc, out_desc, expert, start_q, start_h, BQ, BH, PART, ADD)
            else:
                _store_sums(acc, out_desc, expert, start_h, start_q, BH, BQ, PART, ADD)
            acc = tl.zeros_like(acc)


@triton.jit
def _store_sums(
    acc,
    out_desc,
    expert,
    first,
    second,
    M: tl.constexpr,
    N: tl.constexpr,
    PART: tl.constexpr,
    ADD: tl.constexpr,
):
    """Store a tile [M, N] of sums, PART columns at a time, added to what is there if ADD.

    Sums and what they are added to would not fit into registers all at once.
    """
    if N > PART:
        left, right = acc.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        _store_sums(left, out_desc, expert, first, second, M, N // 2, PART, ADD)
        _store_sums(right, out_desc, expert, first, second + N // 2, M, N // 2, PART, ADD)
    else:
        if ADD:
            acc += out_desc.load([expert, first, second]).reshape(M, N).to(tl.float32)
        out_desc.store([expert, first, second], acc.to(out_desc.dtype).reshape(1, M, N))


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


@triton.jit
def _count_steps(
    end_tile_L_ptr,
    num_experts,
    EACH: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Return the steps of BK rows in all tiles of this program, EACH per expert, one at least."""
    expert = tl.arange(0, EXPERTS)
    known = expert < num_experts
    end = tl.load(end_tile_L_ptr + expert, mask=known, other=0)
    begin = tl.load(end_tile_L_ptr + tl.maximum(expert, 1) - 1, mask=known & (expert > 0), other=0)
    steps = tl.maximum((end - begin) * (BM // BK), 1)
    # of the tiles below t, the program has every num_programs-th from its own id on
    num_programs, first = tl.num_programs(0), tl.program_id(0)
    below = tl.maximum(expert * EACH - first + num_programs - 1, 0) // num_programs
    below_next = tl.maximum((expert + 1) * EACH - first + num_programs - 1, 0) // num_programs
    return tl.sum(tl.where(known, steps * (below_next - below), 0))
