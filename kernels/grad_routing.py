"""The gradients of the routing weights: sums of a row's parts.

Legend: T tokens, A experts per token, S = T*A slots, R tile rows.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from comet_compile.kernels.launch import div_up, full_grid, launch


def grad_scores(
    d_w: Tensor, row_S: Tensor, dtype: torch.dtype, key: Hashable | None = None
) -> Tensor:
    """Return [S] in `dtype`, the gradients of the routing weights; 0 for a slot without a row."""
    out_S = torch.empty(row_S.shape[0], dtype=dtype, device=row_S.device)
    if out_S.numel():
        launch(
            grad_scores_kernel,
            full_grid(div_up(out_S.numel(), 256)),
            key,
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
