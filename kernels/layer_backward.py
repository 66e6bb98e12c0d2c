"""The backward of a layer on one device: its formulas, and the kernels of its rows.

With g = the gradient of y, rows r of slots (t, j) and experts e as in `layer0`:

    d_h[r]   = g[t] @ w_out[e]^T                         grad_hidden, epilogue from here
    d_w[t,j] = d_h[r] . h[r]                             (partial sums by column tile)
    d_pre[r] = act'(pre[r], w * d_h[r]),  wh[r] = w * h[r]
    d_x[t]   = sum_j d_pre[row(t, j)] @ w_in[e]^T        layer1.gemm_rows, layer1.sum_slots
    d_w_in[e]  = sum_r x[t]^T d_pre[r]                   grad_params.grad_weight
    d_w_out[e] = sum_r wh[r]^T g[t]                      grad_params.grad_weight
    d_b_in[e]  = sum_r d_pre[r]                          grad_params.grad_bias
    d_b_out[e] = sum_r g[t]                              grad_params.grad_bias

w is the routing weight where it multiplies "between" or "after", else 1. The two have the same
gradients, since w (h @ w_out) = (w h) @ w_out, but for a bias b_out, which only "after" multiplies:

    d_w[t,j]   = d_h[r] . h[r] + g[t] . b_out[e]         grad_routing.dot_tokens
    d_b_out[e] = sum_r w * g[t]

"Before" multiplies the token, in front of the biases, pre = w * (x @ w_in) + b_in:

    u[r]     = d_pre[r] @ w_in[e]^T                      layer1.gemm_rows
    d_x[t]   = sum_j w[t,j] * u[row(t, j)]               layer1.sum_slots
    d_w[t,j] = x[t] . u[r]                               grad_routing.dot_tokens
    d_w_in[e] = sum_r (w * x[t])^T d_pre[r]              gather_rows, grad_params.grad_weight

Sums are in float32 and in a fixed order. Rows of padding are written as zeros, so that the weight
gradients may read them.

Legend: T tokens, A experts per token, S = T*A slots, R tile rows, M tiles, L experts, H model dim,
I expert intermediate dim, N columns of the in-projection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from comet_compile.kernels.epilogue import activate, activate_backward
from comet_compile.kernels.expert_weights import view_weight
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.launch import descriptor, div_up, full_grid, launch, power_of_2
from comet_compile.kernels.layer0 import tile_of
from comet_compile.kernels.plan import GemmTiles
from comet_compile.kernels.route_tiles import TileRouting
from comet_compile.kernels.sync import PATIENCE, keep_pace


def gather_rows(
    tokens_TH: Tensor,
    routing: TileRouting,
    top_k: int,
    weights_TA: Tensor | None = None,
    rows_RH: Tensor | None = None,
) -> Tensor:
    """Return [R, H], the token of each tile row, times its weight; rows of padding are zero.

    `rows_RH`: memory for them, new if None.
    """
    num_rows, hidden = routing.slot_R.shape[0], tokens_TH.shape[1]
    if rows_RH is None:
        rows_RH = tokens_TH.new_empty(num_rows, hidden)
    block_h = min(2048, power_of_2(hidden))
    if num_rows:
        num_tokens, num_tiles = tokens_TH.shape[0], num_rows // routing.block_m
        launch(
            gather_rows_kernel,
            full_grid(num_tokens + num_tiles, div_up(hidden, block_h)),
            tokens_TH,
            rows_RH,
            weights_TA,
            routing.row_S,
            routing.slot_R,
            routing.num_tiles,
            tokens_TH.stride(0),
            num_tokens,
            TOP_K=top_k,
            H=hidden,
            BM=routing.block_m,
            ROWS=4,
            BH=block_h,
            num_warps=4,
        )
    return rows_RH


def grad_hidden(
    grad_rows: Tensor,
    saved_SN: Tensor,
    weights_TA: Tensor | None,
    routing: TileRouting,
    params: ExpertParams,
    math: LayerMath,
    tiles: GemmTiles,
    top_k: int,
    *,
    gathered: bool = False,
    arrive: Tensor | None = None,
    wh_RI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (d_pre [R, N], d_w partial sums [I / block_n, R] float32); fill `wh_RI` if given.

    `grad_rows` is the gradient of the tokens [T, H], or of their rows [R, H] (`gather_rows`), if
    `gathered`. The columns of d_pre are those of `saved_SN`: halves, or interleaved. Without
    `weights_TA`, as where they multiply before, d_w is left as it is. `arrive`: zeros for
    `tiles.num_arrivals`, needed if `tiles` are paced.
    """
    act = math.activation
    num_rows, columns = routing.slot_R.shape[0], saved_SN.shape[1]
    inter, hidden = params.w_out.shape[1:]
    d_pre_RN = saved_SN.new_empty(num_rows, columns)
    num_n = div_up(inter, tiles.block_n)
    d_w = torch.empty(num_n, num_rows, dtype=torch.float32, device=saved_SN.device)
    if num_rows == 0:
        return d_pre_RN, d_w
    view = view_weight(params.w_out.transpose(1, 2))
    interleaved = act.interleaved and params.w_up is None
    # columns of one step of the epilogue; an interleaved pair takes twice the registers
    part = 16 if interleaved or tiles.block_n == 64 else 32
    box = (tiles.block_m, 2 * part if interleaved else part)
    launch(
        grad_hidden_kernel,
        full_grid(tiles.num_programs),
        descriptor(grad_rows, grad_rows.shape, grad_rows.stride(), (tiles.block_m, tiles.block_k))
        if gathered
        else grad_rows,
        view.descriptor(tiles.block_n, tiles.block_k),
        # halves are stored one by one, each clipped where the other begins
        descriptor(d_pre_RN, (num_rows, columns), (columns, 1), box)
        if interleaved or not act.gated
        else descriptor(d_pre_RN, (num_rows, inter), (columns, 1), box),
        descriptor(d_pre_RN[:, inter:], (num_rows, inter), (columns, 1), box)
        if act.gated and not interleaved
        else None,
        None
        if wh_RI is None
        else descriptor(wh_RI, (num_rows, inter), (inter, 1), (tiles.block_m, part)),
        d_w,
        saved_SN,
        routing.slot_R,
        routing.expert_M,
        routing.first_row_M,
        routing.num_tiles,
        weights_TA,
        arrive if tiles.paced else None,
        num_rows,
        grad_rows.stride(0),
        0.0 if act.alpha is None else act.alpha,
        0.0 if act.limit is None else act.limit,
        TOP_K=top_k,
        H=hidden,
        I=inter,
        BM=tiles.block_m,
        BN=tiles.block_n,
        BK=tiles.block_k,
        PART=part,
        GROUP_M=tiles.group_m,
        FLAT=tiles.flat,
        GATHERED=gathered,
        INTERLEAVED=interleaved,
        K_CONTIGUOUS=view.k_contiguous,
        KIND=act.kind,
        GATED=act.gated,
        UP_FIRST=act.up_first,
        CLAMP=act.limit is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return d_pre_RN, d_w


@triton.jit
def gather_rows_kernel(
    tokens_ptr,  # [T, H], rows stride_tokens apart
    rows_ptr,  # [R, H]
    weights_ptr,  # [S] or None
    row_S_ptr,
    slot_R_ptr,
    num_tiles_ptr,
    stride_tokens,
    num_tokens,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    ROWS: tl.constexpr,
    BH: tl.constexpr,
):
    """Grid: (T tokens, then tiles; blocks of BH columns).

    A token's program reads it once and writes all its rows, a tile's clears the rows of padding,
    ROWS at a time. (A program that read a row for each it writes would read TOP_K times as much.)
    """
    cols = tl.program_id(1) * BH + tl.arange(0, BH)
    is_column = cols < H
    if tl.program_id(0) < num_tokens:
        token = tl.program_id(0).to(tl.int64)
        values = tl.load(tokens_ptr + token * stride_tokens + cols, mask=is_column, other=0.0)
        for j in tl.static_range(TOP_K):
            row = tl.load(row_S_ptr + token * TOP_K + j).to(tl.int64)
            scaled = values
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + token * TOP_K + j).to(tl.float32)
                scaled = (values.to(tl.float32) * weight).to(values.dtype)
            end = tl.where(row >= 0, H, 0)
            tl.store(rows_ptr + row * H + cols, scaled, mask=cols < end)
    else:
        tile = tl.program_id(0) - num_tokens
        if tile < tl.load(num_tiles_ptr):
            for first in range(0, BM, ROWS):
                row = tile * BM + first + tl.arange(0, ROWS)
                is_padding = tl.load(slot_R_ptr + row) < 0
                ptrs = rows_ptr + row[:, None].to(tl.int64) * H + cols[None, :]
                zeros = tl.zeros((ROWS, BH), rows_ptr.dtype.element_ty)
                tl.store(ptrs, zeros, mask=is_padding[:, None] & is_column[None, :])


@triton.jit
def grad_hidden_kernel(
    grad_ptr,  # [T, H], rows stride_grad apart; GATHERED: a descriptor of [R, H]
    w_desc,  # [1, L, I, H] or [1, L, H, I]
    d_first_desc,  # [R, I], or [R, N] of the interleaved pair
    d_second_desc,  # [R, I] or None
    wh_desc,  # [R, I] or None
    d_w_ptr,  # [I / BN, R]
    saved_ptr,  # [S, N]
    slot_R_ptr,
    expert_M_ptr,
    first_row_M_ptr,
    num_tiles_ptr,
    weights_ptr,  # [S] or None
    arrive_ptr,
    num_rows,
    stride_grad,
    alpha,
    limit,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PART: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLAT: tl.constexpr,
    GATHERED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    UP_FIRST: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Grid and order: as in `layer0.gather_gemm_act_kernel`."""
    num_m = tl.load(num_tiles_ptr)
    num_n: tl.constexpr = (I + BN - 1) // BN
    offs_k = tl.arange(0, BK)
    patience = PATIENCE
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLAT):
        tile_m, start_n = tile_of(tile, num_m, num_n, GROUP_M, BN)
        patience = keep_pace(arrive_ptr, tile, num_m * num_n, GROUP_M, patience)
        expert = tl.load(expert_M_ptr + tile_m)
        slot = tl.load(slot_R_ptr + tile_m * BM + tl.arange(0, BM))
        is_row = slot >= 0
        token = tl.maximum(slot, 0) // TOP_K
        if not GATHERED:
            grad_ptrs = grad_ptr + token[:, None].to(tl.int64) * stride_grad + offs_k[None, :]
        d_h = tl.zeros((BM, BN), tl.float32)
        for k in range(0, H, BK):
            if GATHERED:
                grad = grad_ptr.load([tile_m * BM, k])
            elif H % BK == 0:
                grad = tl.load(grad_ptrs)
            else:
                grad = tl.load(grad_ptrs, mask=(k + offs_k)[None, :] < H, other=0.0)
            if K_CONTIGUOUS:
                w = w_desc.load([0, expert, start_n, k]).reshape(BN, BK).T
            else:
                w = w_desc.load([0, expert, k, start_n]).reshape(BK, BN)
            d_h = tl.dot(grad, w, d_h)
            if not GATHERED:
                grad_ptrs += BK

        row = tl.load(first_row_M_ptr + tile_m) + tl.arange(0, BM)
        scale = tl.full((BM,), 1.0, tl.float32)
        if weights_ptr is not None:
            scale = tl.load(weights_ptr + tl.maximum(slot, 0), mask=is_row, other=0.0)
            scale = scale.to(tl.float32)
        d_w = _grad_columns(
            d_h, tile_m * BM, start_n, d_first_desc, d_second_desc, wh_desc, saved_ptr, row, is_row,
            scale, alpha, limit, I, BM, BN, PART, INTERLEAVED, KIND, GATED, UP_FIRST, CLAMP,
        )  # fmt: skip
        if weights_ptr is not None:
            rows = (start_n // BN) * num_rows.to(tl.int64) + tile_m * BM + tl.arange(0, BM)
            tl.store(d_w_ptr + rows, d_w)


@triton.jit
def _grad_columns(
    d_h,  # [BM, BN] float32
    start_row,
    start_n,
    d_first_desc,
    d_second_desc,
    wh_desc,
    saved_ptr,
    row,
    is_row,
    scale,
    alpha,
    limit,
    I: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PART: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    UP_FIRST: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Store d_pre, and wh if wanted, of BN columns; return their part of each row's d_w.

    PART columns at a time: all of them at once would not fit into registers.
    """
    if BN > PART:
        left, right = d_h.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        d_w = _grad_columns(
            left, start_row, start_n, d_first_desc, d_second_desc, wh_desc, saved_ptr, row, is_row,
            scale, alpha, limit, I, BM, BN // 2, PART, INTERLEAVED, KIND, GATED, UP_FIRST, CLAMP,
        )  # fmt: skip
        d_w += _grad_columns(
            right, start_row, start_n + BN // 2, d_first_desc, d_second_desc, wh_desc, saved_ptr,
            row, is_row, scale, alpha, limit, I, BM, BN // 2, PART, INTERLEAVED, KIND, GATED,
            UP_FIRST, CLAMP,
        )  # fmt: skip
    else:
        N: tl.constexpr = 2 * I if GATED else I
        STEP: tl.constexpr = 2 if INTERLEAVED else 1
        DISTANCE: tl.constexpr = 1 if INTERLEAVED else I
        offs_n = start_n + tl.arange(0, BN)
        mask = is_row[:, None] & (offs_n < I)[None, :]
        ptrs = saved_ptr + row[:, None].to(tl.int64) * N + (offs_n * STEP)[None, :]
        first = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        second = first
        if GATED:
            second = tl.load(ptrs + DISTANCE, mask=mask, other=0.0).to(tl.float32)
        d_h = tl.where(mask, d_h, 0.0)
        h = tl.where(mask, activate(first, second, alpha, limit, KIND, GATED, UP_FIRST, CLAMP), 0.0)
        d_w = tl.sum(d_h * h, 1)
        if wh_desc is not None:
            wh_desc.store([start_row, start_n], (h * scale[:, None]).to(wh_desc.dtype))
        d_first, d_second = activate_backward(
            d_h * scale[:, None], first, second, alpha, limit, KIND, GATED, UP_FIRST, CLAMP
        )
        if INTERLEAVED:
            d_pre = tl.join(d_first, d_second).reshape(BM, 2 * BN)
            d_first_desc.store([start_row, 2 * start_n], d_pre.to(d_first_desc.dtype))
        else:
            d_first_desc.store([start_row, start_n], d_first.to(d_first_desc.dtype))
            if GATED:
                d_second_desc.store([start_row, start_n], d_second.to(d_first_desc.dtype))
    return d_w
