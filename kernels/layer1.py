"""layer1 on one device: the experts' out-projections, then the sum of each token's rows.

    out[t] = sum_j weights[t, j] * (h[row(t, j)] @ w_out[e] + b_out[e])

`gemm_rows` writes the experts' output rows, `sum_slots` adds up those of a token in the order of
its choices, in float32, so that the result is the same from call to call. With weights that
multiply before or between the GEMMs, `sum_slots` gets none.

Legend: T tokens, A experts per token, S = T*A slots, R tile rows, M tiles, L experts, H model dim,
I expert intermediate dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from comet_compile.kernels.expert_weights import view_weight
from comet_compile.kernels.launch import descriptor, div_up, full_grid, launch, power_of_2
from comet_compile.kernels.layer0 import tile_of
from comet_compile.kernels.plan import GemmTiles
from comet_compile.kernels.route_tiles import TileRouting

TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


def gemm_rows(
    h_RI: Tensor,
    w_LIH: Tensor,
    bias_LH: Tensor | None,
    routing: TileRouting,
    tiles: GemmTiles,
    out_RH: Tensor | None = None,
) -> Tensor:
    """Return [R, H], row r times the matrix of its tile's expert.

    `out_RH`: memory for them, new if None.
    """
    num_rows, inter = h_RI.shape
    hidden = w_LIH.shape[2]
    if out_RH is None:
        out_RH = h_RI.new_empty(num_rows, hidden)
    if num_rows == 0:
        return out_RH
    view = view_weight(w_LIH)
    launch(
        gemm_rows_kernel,
        full_grid(tiles.num_programs),
        descriptor(h_RI, h_RI.shape, h_RI.stride(), (tiles.block_m, tiles.block_k)),
        view.descriptor(tiles.block_n, tiles.block_k),
        descriptor(out_RH, out_RH.shape, out_RH.stride(), (tiles.block_m, tiles.block_n)),
        routing.expert_M,
        routing.num_tiles,
        bias_LH,
        0 if bias_LH is None else bias_LH.stride(0),
        K=inter,
        N=hidden,
        BM=tiles.block_m,
        BN=tiles.block_n,
        BK=tiles.block_k,
        GROUP_M=tiles.group_m,
        FLAT=tiles.flat,
        K_CONTIGUOUS=view.k_contiguous,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out_RH


def sum_slots(
    rows_RH: Tensor,
    row_S: Tensor,
    weights_TA: Tensor | None,
    shape_TA: tuple[int, int],
    product_dtype: torch.dtype,
    out_dtype: torch.dtype,
    others_RH: Tensor | None = None,
) -> Tensor:
    """Return [T, H] in `out_dtype`, products made in `product_dtype`; a row of -1 adds nothing.

    With `others_RH`, the sum of a token's rows there is added to that in `rows_RH`, in float32.
    """
    num_tokens, top_k = shape_TA
    hidden = rows_RH.shape[1]
    out_TH = rows_RH.new_empty(num_tokens, hidden, dtype=out_dtype)
    if num_tokens == 0:
        return out_TH
    block = min(2048, power_of_2(hidden))
    launch(
        sum_slots_kernel,
        full_grid(num_tokens, div_up(hidden, block)),
        rows_RH,
        others_RH,
        row_S,
        weights_TA,
        out_TH,
        TOP_K=top_k,
        H=hidden,
        BH=block,
        PRODUCT=TRITON_DTYPES[product_dtype],
        num_warps=max(1, block // 256),
    )
    return out_TH


@triton.jit
def gemm_rows_kernel(
    h_desc,  # [R, K]
    w_desc,  # [1, L, N, K] or [1, L, K, N]
    out_desc,  # [R, N]
    expert_M_ptr,
    num_tiles_ptr,
    bias_ptr,  # [L, N], experts stride_bias apart, or None
    stride_bias,
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLAT: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
):
    """Grid and order: as in `layer0.gather_gemm_act_kernel`."""
    num_m = tl.load(num_tiles_ptr)
    num_n: tl.constexpr = (N + BN - 1) // BN
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLAT):
        tile_m, start_n = tile_of(tile, num_m, num_n, GROUP_M, BN)
        acc = multiply_tile(
            tile_m, start_n, h_desc, w_desc, None, expert_M_ptr, bias_ptr, stride_bias, K, N, BM,
            BN, BK, K_CONTIGUOUS,
        )  # fmt: skip
        out_desc.store([tile_m * BM, start_n], acc.to(out_desc.dtype))


@triton.jit
def multiply_tile(
    tile_m,
    start_n,
    h_desc,
    w_desc,
    second_desc,
    expert_M_ptr,
    bias_ptr,
    stride_bias,
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
):
    """Return [BM, BN] float32 of one tile; the arguments are the kernel's.

    With a second matrix, columns K .. 2K of the rows are multiplied with that.
    """
    expert = tl.load(expert_M_ptr + tile_m)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        h = h_desc.load([tile_m * BM, k])
        if K_CONTIGUOUS:
            w = w_desc.load([0, expert, start_n, k]).reshape(BN, BK).T
        else:
            w = w_desc.load([0, expert, k, start_n]).reshape(BK, BN)
        acc = tl.dot(h, w, acc)
    if second_desc is not None:
        for k in range(0, K, BK):
            h = h_desc.load([tile_m * BM, K + k])
            if K_CONTIGUOUS:
                w = second_desc.load([0, expert, start_n, k]).reshape(BN, BK).T
            else:
                w = second_desc.load([0, expert, k, start_n]).reshape(BK, BN)
            acc = tl.dot(h, w, acc)
    if bias_ptr is not None:
        offs_n = start_n + tl.arange(0, BN)
        bias = bias_ptr + expert.to(tl.int64) * stride_bias + offs_n
        acc += tl.load(bias, mask=offs_n < N, other=0.0)[None, :].to(tl.float32)
    return acc


@triton.jit
def sum_slots_kernel(
    rows_ptr,  # [R, H]
    others_ptr,  # [R, H] or None
    row_S_ptr,
    weights_ptr,  # [S] or None
    out_ptr,  # [T, H]
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Grid: (tokens, blocks of BH columns). All TOP_K rows are in flight before the first sum."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BH + tl.arange(0, BH)
    total = _sum_rows(rows_ptr, row_S_ptr, weights_ptr, token, cols, TOP_K, H, BH, PRODUCT)
    if others_ptr is not None:
        total += _sum_rows(others_ptr, row_S_ptr, weights_ptr, token, cols, TOP_K, H, BH, PRODUCT)
    tl.store(out_ptr + token * H + cols, total.to(out_ptr.dtype.element_ty), mask=cols < H)


@triton.jit
def _sum_rows(
    rows_ptr,
    row_S_ptr,
    weights_ptr,
    token,
    cols,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Return [BH] float32, columns of the sum of one token's rows."""
    total = tl.zeros((BH,), tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(row_S_ptr + token * TOP_K + j).to(tl.int64)
        end = tl.where(row >= 0, H, 0)
        values = tl.load(rows_ptr + row * H + cols, mask=cols < end, other=0.0)
        if weights_ptr is not None:
            # a weight beside a stray id may be anything, NaN included
            weight = tl.where(row >= 0, tl.load(weights_ptr + token * TOP_K + j), 0.0)
            values = values.to(PRODUCT) * weight.to(PRODUCT)
        total += values.to(tl.float32)
    return total
