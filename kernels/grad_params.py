"""The gradients of the experts' matrices: sums over an expert's rows.

They read the rows of whole tiles, `block_m` at a time, so rows of padding must be zeros.

Legend: T tokens, A experts per token, S = T*A slots, R tile rows, L experts, H model dim, Q columns
of a gradient's rows.
"""

from __future__ import annotations

from collections.abc import Hashable

import triton
import triton.language as tl
from torch import Tensor

from comet_compile.kernels.launch import descriptor, full_grid, launch
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
    key: Hashable | None = None,
) -> None:
    """Fill `out_LHQ` [L, H, Q] with the sum over an expert's rows of tokens^T [H] rows [Q].

    `tokens` is [T, H], or if `gathered` their rows [R, H]. `out_LHQ` has H or Q contiguous.
    `rows_RQ` may be columns of a wider tensor.
    """
    num_experts, hidden, num_q = out_LHQ.shape
    h_contiguous = out_LHQ.stride(1) == 1 and out_LHQ.stride(2) != 1
    memory = out_LHQ.transpose(1, 2) if h_contiguous else out_LHQ
    num_rows = rows_RQ.shape[0]
    if num_rows == 0:
        out_LHQ.zero_()
        return
    block_k = min(tiles.block_k, routing.block_m)
    box = (tiles.block_n, tiles.block_m) if h_contiguous else (tiles.block_m, tiles.block_n)
    # several gradients of one call come here, and two of them may be alike in all but this
    alike = (rows_RQ.stride(0), num_q, h_contiguous, tokens.stride(0), tokens.data_ptr() & 15)
    launch(
        grad_weight_kernel,
        full_grid(tiles.num_programs),
        None if key is None else (key, *alike),
        descriptor(tokens, tokens.shape, tokens.stride(), (block_k, tiles.block_m))
        if gathered
        else tokens,
        descriptor(rows_RQ, rows_RQ.shape, rows_RQ.stride(), (block_k, tiles.block_n)),
        descriptor(memory, memory.shape, memory.stride(), (1, *box)),
        routing.slot_R,
        routing.end_tile_L,
        tokens.stride(0),
        num_experts,
        TOP_K=top_k,
        H=hidden,
        Q=num_q,
        BM=routing.block_m,
        BH=tiles.block_m,
        BQ=tiles.block_n,
        BK=block_k,
        GATHERED=gathered,
        H_CONTIGUOUS=h_contiguous,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
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
        end = tl.load(end_tile_L_ptr + expert) * BM
        begin = tl.load(end_tile_L_ptr + tl.maximum(expert, 1) - 1) * BM
        begin = tl.where(expert == 0, 0, begin)
        offs_h = start_h + tl.arange(0, BH)
        acc = tl.zeros((BQ, BH) if H_CONTIGUOUS else (BH, BQ), tl.float32)
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
