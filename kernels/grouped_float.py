"""Grouped products of float32 rows on a GPU: one launch for all experts, nothing read on the host.

Torch has no grouped GEMM for float32, so each expert's product would be a launch of its own, with
far fewer tiles than a GPU has multiprocessors. Products are made of TF32 ones: a factor is split
into the part that TF32 holds and the rest, and three products of parts (`tf32x3`) are as exact as
one of float32 (tests/kernels/test_grouped_float_gpu.py holds both against float64). A user who
allows less (``torch.set_float32_matmul_precision("high")``) gets one TF32 product.

Legend: V rows sorted by expert, K contraction dim, N columns, L experts.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from comet_compile.kernels.launch import div_up, full_grid, launch, power_of_2


def multiply_rows(a_VK: Tensor, b_LKN: Tensor, ends_L: Tensor) -> Tensor:
    """Return [V, N] float32, each row times its expert's matrix.

    Rows of expert e end at ``ends_L[e]`` (int32). Those behind the last end hold garbage.
    """
    num_rows, k = a_VK.shape
    num_experts, _, n = b_LKN.shape
    out_VN = a_VK.new_empty(num_rows, n)
    rows_each = power_of_2(div_up(num_rows, num_experts))
    block_m, block_n = min(largest_tile(a_VK.device), max(16, rows_each)), 64
    num_n = div_up(n, block_n)
    # every expert may have one tile that is not full
    num_tiles = num_rows // block_m + min(num_experts, num_rows)
    launch(
        multiply_rows_kernel,
        full_grid(num_tiles * num_n),
        a_VK,
        b_LKN,
        out_VN,
        ends_L,
        num_experts,
        a_VK.stride(0),
        *b_LKN.stride(),
        K=k,
        N=n,
        BM=block_m,
        BN=block_n,
        BK=32,
        EXPERTS=power_of_2(num_experts),
        PRECISION=_precision(),
        num_warps=4,
        num_stages=3,
    )
    return out_VN


def multiply_columns(a_VK: Tensor, b_VN: Tensor, ends_L: Tensor, out_LKN: Tensor) -> None:
    """Fill `out_LKN` [L, K, N], of any strides, with ``a[rows].T @ b[rows]`` for each expert."""
    num_experts, k, n = out_LKN.shape
    block_k, block_n = min(largest_tile(a_VK.device), max(16, power_of_2(k))), 64
    launch(
        multiply_columns_kernel,
        full_grid(div_up(k, block_k) * div_up(n, block_n), num_experts),
        a_VK,
        b_VN,
        out_LKN,
        ends_L,
        a_VK.stride(0),
        b_VN.stride(0),
        *out_LKN.stride(),
        K=k,
        N=n,
        BK=block_k,
        BN=block_n,
        BR=32,
        PRECISION=_precision(),
        num_warps=4,
        num_stages=3,
    )


def why_not(device: torch.device) -> str | None:
    """Return why a GPU cannot run these kernels, None if it can."""
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return "it has no TF32 products"
    return None


@functools.cache
def largest_tile(device: torch.device) -> int:
    """Return the rows of a full tile, which has 64 columns.

    Only Hopper's products read both factors from shared memory; elsewhere their parts take the
    registers that larger tiles need.
    """
    return 128 if torch.cuda.get_device_capability(device) == (9, 0) else 64


def _precision() -> str:
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def multiply_rows_kernel(
    a_ptr,  # [V, K], rows stride_a apart
    b_ptr,  # [L, K, N]
    out_ptr,  # [V, N]
    ends_L_ptr,
    num_experts,
    stride_a,
    stride_be,
    stride_bk,
    stride_bn,
    K: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of 2, as many or more
    PRECISION: tl.constexpr,
):
    """Grid: as many programs as there can be tiles [BM, BN]; those without one end at once.

    Order: expert by expert, its rows fastest, so that the programs beside each other share columns
    of one matrix in L2. With ends (3, 3, 8), BM = 2 and two tiles of columns: program 0 to 3 have
    expert 0's rows (0-1, 2), (0-1, 2), 4 to 9 expert 2's (3-4, 5-6, 7), twice.
    """
    num_n: tl.constexpr = (N + BN - 1) // BN
    experts = tl.arange(0, EXPERTS)
    ends = tl.load(ends_L_ptr + experts, mask=experts < num_experts, other=0)
    starts = tl.load(
        ends_L_ptr + experts - 1, mask=(experts > 0) & (experts < num_experts), other=0
    )
    tiles = tl.maximum(ends - starts + BM - 1, 0) // BM * num_n
    last = tl.cumsum(tiles, 0)
    pid = tl.program_id(0)
    expert = tl.sum((last <= pid).to(tl.int32), 0)
    if expert < num_experts:
        is_own = experts == expert
        start = tl.sum(tl.where(is_own, starts, 0), 0)
        end = tl.sum(tl.where(is_own, ends, 0), 0)
        number = pid - tl.sum(tl.where(is_own, last - tiles, 0), 0)
        num_m = (end - start + BM - 1) // BM
        rows = start + number % num_m * BM + tl.arange(0, BM)
        cols = number // num_m * BN + tl.arange(0, BN)
        inner = tl.arange(0, BK)
        is_row, is_col = rows < end, cols < N
        a_ptrs = a_ptr + rows[:, None].to(tl.int64) * stride_a + inner[None, :]
        b_ptrs = b_ptr + expert.to(tl.int64) * stride_be
        b_ptrs += inner[:, None].to(tl.int64) * stride_bk + cols[None, :].to(tl.int64) * stride_bn
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            a_mask, b_mask = is_row[:, None], is_col[None, :]
            if K % BK != 0:
                a_mask = a_mask & (k + inner < K)[None, :]
                b_mask = b_mask & (k + inner < K)[:, None]
            a = tl.load(a_ptrs, mask=a_mask, other=0.0)
            b = tl.load(b_ptrs, mask=b_mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            a_ptrs += BK
            b_ptrs += BK * stride_bk
        out_ptrs = out_ptr + rows[:, None].to(tl.int64) * N + cols[None, :]
        tl.store(out_ptrs, acc, mask=is_row[:, None] & is_col[None, :])


@triton.jit
def multiply_columns_kernel(
    a_ptr,  # [V, K], rows stride_a apart
    b_ptr,  # [V, N], rows stride_b apart
    out_ptr,  # [L, K, N]
    ends_L_ptr,
    stride_a,
    stride_b,
    stride_oe,
    stride_ok,
    stride_on,
    K: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (tiles [BK, BN] of a matrix, experts), BR rows at a time.

    An expert without rows gets zeros.
    """
    num_n: tl.constexpr = (N + BN - 1) // BN
    expert = tl.program_id(1)
    start = tl.load(ends_L_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_L_ptr + expert)
    outer = tl.program_id(0) // num_n * BK + tl.arange(0, BK)
    cols = tl.program_id(0) % num_n * BN + tl.arange(0, BN)
    is_outer, is_col = outer < K, cols < N
    acc = tl.zeros((BK, BN), tl.float32)
    for row in range(start, end, BR):
        rows = row + tl.arange(0, BR)
        is_row = (rows < end)[:, None]
        row_offsets = rows[:, None].to(tl.int64)
        a_ptrs = a_ptr + row_offsets * stride_a + outer[None, :]
        b_ptrs = b_ptr + row_offsets * stride_b + cols[None, :]
        a = tl.load(a_ptrs, mask=is_row & is_outer[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=is_row & is_col[None, :], other=0.0)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    out_ptrs = out_ptr + expert.to(tl.int64) * stride_oe
    out_ptrs += outer[:, None].to(tl.int64) * stride_ok + cols[None, :].to(tl.int64) * stride_on
    tl.store(out_ptrs, acc, mask=is_outer[:, None] & is_col[None, :])
