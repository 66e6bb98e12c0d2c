"""layer0: gather token rows, multiply with the experts' in-projections, activate. One launch.

`gather_gemm_act` computes, for every row r of every tile of a `TileRouting`,

    h[r] = act(x[token(r)] @ w_in[e] + b_in[e]) * scale          (weights "between", else scale = 1)
    h[r] = act(scale * (x[token(r)] @ w_in[e]) + b_in[e])        (weights "before")

with float32 sums, and rounds once, when h is stored. Rows of padding are computed like token 0's
and never read. Gate and up are one dot of 2 * BN columns where the weights allow it, since two dots
of half the width would each read the token rows from shared memory.

Legend: T tokens, A experts per token, S = T*A slots, R tile rows, M tiles, L experts, H model dim,
I expert intermediate dim, N columns of the in-projection.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

from comet_compile.kernels import expert_weights
from comet_compile.kernels.activation import Activation
from comet_compile.kernels.epilogue import activate
from comet_compile.kernels.expert_weights import WeightView
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.launch import descriptor, full_grid, launch
from comet_compile.kernels.plan import GemmTiles
from comet_compile.kernels.route_tiles import TileRouting
from comet_compile.kernels.sync import PATIENCE, keep_pace


@dataclasses.dataclass(frozen=True, eq=False)
class InProjection:
    """The in-projection as the kernel takes it: one view, and how its columns pair up."""

    view: WeightView
    mode: str  # "halves", "interleaved" or "plain"
    up_first: bool


def view_in_projection(params: ExpertParams, act: Activation) -> InProjection | None:
    """Return the view of w_in (and w_up), None if the two differ in layout."""
    if not act.gated:
        return InProjection(expert_weights.view_weight(params.w_in), "plain", False)
    if params.w_up is not None:
        view = expert_weights.view_pair(params.w_in, params.w_up)
        return None if view is None else InProjection(view, "halves", act.up_first != view.swapped)
    if act.interleaved:
        view = expert_weights.view_weight(params.w_in)
        return InProjection(view, "interleaved", act.up_first)
    return InProjection(expert_weights.view_halves(params.w_in), "halves", act.up_first)


def gather_gemm_act(
    x_TH: Tensor,
    weights_TA: Tensor | None,
    routing: TileRouting,
    params: ExpertParams,
    math: LayerMath,
    tiles: GemmTiles,
    top_k: int,
    saved_SN: Tensor | None = None,
) -> Tensor:
    """Return h [R, I]; `saved_SN` is given the rows in front of the activation, unpadded.

    The saved rows are in the order of `sort_slots`: by expert, then by slot; those that find no
    room are left out. `routing` has as many counters as `tiles.num_arrivals` asks for.
    """
    act = math.activation
    projection = view_in_projection(params, act)
    assert projection is not None, "checked by fused.why_not"
    hidden, inter = params.w_in.shape[1], params.w_out.shape[1]
    num_rows = routing.slot_R.shape[0]
    h_RI = x_TH.new_empty(num_rows, inter)
    if num_rows == 0:
        return h_RI
    block_n = tiles.block_n
    columns = 2 * block_n if projection.mode == "interleaved" else block_n
    scaled = weights_TA is not None and math.weight_place != "after"
    first_bias, second_bias = bias_pointers(params, projection)
    launch(
        gather_gemm_act_kernel,
        full_grid(tiles.num_programs),
        x_TH,
        projection.view.descriptor(columns, tiles.block_k),
        descriptor(h_RI, h_RI.shape, h_RI.stride(), (tiles.block_m, block_n)),
        routing.slot_R,
        routing.expert_M,
        routing.first_row_M,
        routing.num_tiles,
        weights_TA if scaled else None,
        first_bias,
        second_bias,
        saved_SN,
        0 if saved_SN is None else saved_SN.shape[0],
        routing.arrive if tiles.paced else None,
        x_TH.stride(0),
        0 if params.b_in is None else params.b_in.stride(0),
        0.0 if act.alpha is None else act.alpha,
        0.0 if act.limit is None else act.limit,
        TOP_K=top_k,
        H=hidden,
        I=inter,
        BM=tiles.block_m,
        BN=block_n,
        BK=tiles.block_k,
        GROUP_M=tiles.group_m,
        MODE=projection.mode,
        K_CONTIGUOUS=projection.view.k_contiguous,
        SWAPPED=projection.view.swapped,
        KIND=act.kind,
        GATED=act.gated,
        UP_FIRST=projection.up_first,
        CLAMP=act.limit is not None,
        SCALE=math.weight_place if scaled else "",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return h_RI


def bias_pointers(
    params: ExpertParams, projection: InProjection
) -> tuple[Tensor | None, Tensor | None]:
    """Return where the biases of the first and of the second of the pair begin."""
    first, second = params.b_in, params.b_up
    if first is None:
        return None, None
    if projection.mode == "interleaved":
        return first, first[:, 1:]
    if projection.mode == "halves" and second is None:
        return first, first[:, first.shape[1] // 2 :]
    if projection.view.swapped:
        return second, first
    return first, second


@triton.jit
def gather_gemm_act_kernel(
    x_ptr,  # [T, H], rows stride_x apart
    w_desc,  # [pair, L, N, H] or [pair, L, H, N]
    h_desc,  # [R, I]
    slot_R_ptr,
    expert_M_ptr,
    first_row_M_ptr,
    num_tiles_ptr,
    weights_ptr,  # [S] or None
    first_bias_ptr,  # [L, *], experts stride_bias apart, or None
    second_bias_ptr,
    saved_ptr,  # [num_saved, N] or None
    num_saved,
    arrive_ptr,
    stride_x,
    stride_bias,
    alpha,
    limit,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    MODE: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
    SWAPPED: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    UP_FIRST: tl.constexpr,
    CLAMP: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Grid: as many programs as fit on the device, each taking every num_programs-th tile.

    Order: groups of GROUP_M row tiles; inside a group all column tiles, row tiles fastest, so
    that a weight box is fetched from memory once per group and the rows stay in L2. Example with 3
    row tiles, GROUP_M = 2, 2 column tiles: (0,0) (1,0) (0,1) (1,1) | (2,0) (2,1).
    """
    num_m = tl.load(num_tiles_ptr)
    num_n: tl.constexpr = (I + BN - 1) // BN
    patience = PATIENCE
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        tile_m, start_n = tile_of(tile, num_m, num_n, GROUP_M, BN)
        patience = keep_pace(arrive_ptr, tile, num_m * num_n, GROUP_M, patience)
        compute_tile(
            tile_m, start_n, x_ptr, w_desc, h_desc, slot_R_ptr, expert_M_ptr, first_row_M_ptr,
            weights_ptr, first_bias_ptr, second_bias_ptr, saved_ptr, num_saved, stride_x,
            stride_bias, alpha, limit, TOP_K, H, I, BM, BN, BK, MODE, K_CONTIGUOUS, SWAPPED, KIND,
            GATED, UP_FIRST, CLAMP, SCALE,
        )  # fmt: skip


@triton.jit
def tile_of(tile, num_m, num_n, GROUP_M: tl.constexpr, BN: tl.constexpr):
    """Return (row tile, first column) of the tile-th tile in the grouped order."""
    group = tile // (GROUP_M * num_n)
    rows_in_group = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    inside = tile % (GROUP_M * num_n)
    return group * GROUP_M + inside % rows_in_group, (inside // rows_in_group) * BN


@triton.jit
def tile_in_parts(tile, first, num_m, num_n: tl.constexpr, GROUP_M: tl.constexpr, BN: tl.constexpr):
    """`tile_of` of the first `first` row tiles, then of the others: no group has both."""
    split = first * num_n
    if tile < split:
        tile_m, start_n = tile_of(tile, first, num_n, GROUP_M, BN)
    else:
        tile_m, start_n = tile_of(tile - split, num_m - first, num_n, GROUP_M, BN)
        tile_m += first
    return tile_m, start_n


@triton.jit
def compute_tile(
    tile_m,
    start_n,
    x_ptr,
    w_desc,
    h_desc,
    slot_R_ptr,
    expert_M_ptr,
    first_row_M_ptr,
    weights_ptr,
    first_bias_ptr,
    second_bias_ptr,
    saved_ptr,
    num_saved,
    stride_x,
    stride_bias,
    alpha,
    limit,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    MODE: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
    SWAPPED: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    UP_FIRST: tl.constexpr,
    CLAMP: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Store h of BM rows and BN columns; the arguments are the kernel's."""
    offs_k = tl.arange(0, BK)
    expert = tl.load(expert_M_ptr + tile_m)
    slot = tl.load(slot_R_ptr + tile_m * BM + tl.arange(0, BM))
    token = tl.maximum(slot, 0) // TOP_K
    x_ptrs = x_ptr + token[:, None].to(tl.int64) * stride_x + offs_k[None, :]

    if MODE == "halves" and not K_CONTIGUOUS:
        first = tl.zeros((BM, BN), tl.float32)
        second = tl.zeros((BM, BN), tl.float32)
        for k in range(0, H, BK):
            x = _load_rows(x_ptrs, offs_k, k, H, BK)
            first = tl.dot(x, w_desc.load([0, expert, k, start_n]).reshape(BK, BN), first)
            second = tl.dot(x, w_desc.load([1, expert, k, start_n]).reshape(BK, BN), second)
            x_ptrs += BK
    else:
        WIDTH: tl.constexpr = BN if MODE == "plain" else 2 * BN
        start_w = 2 * start_n if MODE == "interleaved" else start_n
        acc = tl.zeros((BM, WIDTH), tl.float32)
        for k in range(0, H, BK):
            x = _load_rows(x_ptrs, offs_k, k, H, BK)
            if K_CONTIGUOUS:
                w = w_desc.load([0, expert, start_w, k]).reshape(WIDTH, BK).T
            else:
                w = w_desc.load([0, expert, k, start_w]).reshape(BK, WIDTH)
            acc = tl.dot(x, w, acc)
            x_ptrs += BK
        if MODE == "halves":
            first, second = acc.reshape(BM, 2, BN).permute(0, 2, 1).split()
        elif MODE == "interleaved":
            first, second = acc.reshape(BM, BN, 2).split()
        else:
            first, second = acc, acc

    offs_n = start_n + tl.arange(0, BN)
    if SCALE != "":
        scale = tl.load(weights_ptr + tl.maximum(slot, 0), mask=slot >= 0, other=0.0)
        scale = scale.to(tl.float32)
    if SCALE == "before":
        first *= scale[:, None]
        second *= scale[:, None]
    if first_bias_ptr is not None:
        STEP: tl.constexpr = 2 if MODE == "interleaved" else 1
        bias = expert.to(tl.int64) * stride_bias + offs_n * STEP
        is_column = offs_n < I
        first += tl.load(first_bias_ptr + bias, mask=is_column, other=0.0)[None, :].to(tl.float32)
        if GATED:
            bias_ptrs = second_bias_ptr + bias
            second += tl.load(bias_ptrs, mask=is_column, other=0.0)[None, :].to(tl.float32)
    if saved_ptr is not None:
        row = tl.load(first_row_M_ptr + tile_m) + tl.arange(0, BM)
        is_saved = (slot >= 0) & (row < num_saved)
        if SWAPPED:
            _save_rows(saved_ptr, second, first, row, is_saved, offs_n, I, MODE, GATED)
        else:
            _save_rows(saved_ptr, first, second, row, is_saved, offs_n, I, MODE, GATED)
    h = activate(first, second, alpha, limit, KIND, GATED, UP_FIRST, CLAMP)
    if SCALE == "between":
        h *= scale[:, None]
    h_desc.store([tile_m * BM, start_n], h.to(h_desc.dtype))


@triton.jit
def _load_rows(x_ptrs, offs_k, k, H: tl.constexpr, BK: tl.constexpr):
    if H % BK == 0:
        return tl.load(x_ptrs)
    return tl.load(x_ptrs, mask=(k + offs_k)[None, :] < H, other=0.0)


@triton.jit
def _save_rows(
    saved_ptr, first, second, row, is_row, offs_n, I: tl.constexpr, MODE: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Store the pair as the weights' columns have it: halves, or one beside the other."""
    N: tl.constexpr = 2 * I if GATED else I
    STEP: tl.constexpr = 2 if MODE == "interleaved" else 1
    DISTANCE: tl.constexpr = 1 if MODE == "interleaved" else I
    ptrs = saved_ptr + row[:, None].to(tl.int64) * N + (offs_n * STEP)[None, :]
    mask = is_row[:, None] & (offs_n < I)[None, :]
    tl.store(ptrs, first.to(saved_ptr.dtype.element_ty), mask=mask)
    if GATED:
        tl.store(ptrs + DISTANCE, second.to(saved_ptr.dtype.element_ty), mask=mask)
