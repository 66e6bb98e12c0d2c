"""Grouped GEMM over rows sorted by expert: ``aten._grouped_mm`` where it is legal, kernels of our
own for float32 on a GPU, else a loop.

Legend: V rows sorted by expert, K contraction dim, N columns, L experts.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from comet_compile.kernels.routing import SortedSlots

_ALIGN_BYTES = 16


def grouped_mm(a_VK: Tensor, b_LKN: Tensor, slots: SortedSlots) -> Tensor:
    """Return [V, N], each row times its expert's matrix; rows without an expert hold garbage."""
    num_rows, num_columns = a_VK.shape[0], b_LKN.shape[2]
    if num_rows == 0:
        return a_VK.new_empty(0, num_columns)
    a_VK = a_VK.contiguous()
    if runs_float_kernels(a_VK.dtype, a_VK.device):
        from comet_compile.kernels.grouped_float import multiply_rows

        return multiply_rows(a_VK, b_LKN, slots.ends_L)
    if _is_legal(a_VK, b_LKN) and num_columns * a_VK.element_size() % _ALIGN_BYTES == 0:
        return torch.ops.aten._grouped_mm(a_VK, b_LKN, slots.ends_L)
    out_VN = a_VK.new_empty(num_rows, num_columns)
    start = 0
    for expert, end in enumerate(slots.host_ends):
        if end > start:
            torch.mm(a_VK[start:end], b_LKN[expert], out=out_VN[start:end])
        start = end
    return out_VN


def grouped_mm_weight(a_VK: Tensor, b_VN: Tensor, slots: SortedSlots, like_LKN: Tensor) -> Tensor:
    """Return [L, K, N], ``a[rows].T @ b[rows]`` for each expert, with the strides of `like_LKN`."""
    out_LKN = torch.empty_like(like_LKN)
    if slots.num_rows == 0:
        return out_LKN.zero_()
    if runs_float_kernels(a_VK.dtype, a_VK.device):
        from comet_compile.kernels.grouped_float import multiply_columns

        multiply_columns(a_VK.contiguous(), b_VN.contiguous(), slots.ends_L, out_LKN)
        return out_LKN
    # The product comes out row-major; for a transposed weight compute the transpose instead of
    # copying the largest tensor of the layer.
    if out_LKN.stride(1) == 1 and out_LKN.stride(2) != 1:
        product = _weight_product(b_VN.contiguous(), a_VK.contiguous(), slots).transpose(1, 2)
    else:
        product = _weight_product(a_VK.contiguous(), b_VN.contiguous(), slots)
    if product.stride() == out_LKN.stride():
        return product
    return out_LKN.copy_(product)


def name_of(dtype: torch.dtype, device: torch.device) -> str:
    """Return what multiplies rows of `dtype`, for reports."""
    if is_grouped_dtype(dtype):
        return "aten._grouped_mm"
    return "grouped TF32" if runs_float_kernels(dtype, device) else "mm per expert"


def reads_host(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the host must know each expert's rows to multiply them."""
    return name_of(dtype, device) == "mm per expert"


@functools.cache
def _has_float_kernels(device: torch.device) -> bool:
    try:
        from comet_compile.kernels.grouped_float import why_not
    except ImportError:  # Triton is not installed
        return False
    return why_not(device) is None


def runs_float_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows of `dtype` are multiplied by kernels of `grouped_float`."""
    if dtype != torch.float32 or device.type != "cuda" or is_portable_forced():
        return False
    return _has_float_kernels(device)


def is_portable_forced() -> bool:
    """Whether the user wants no kernels of ours."""
    return os.environ.get("COMET_PORTABLE", "0") not in ("", "0")


def is_grouped_dtype(dtype: torch.dtype) -> bool:
    """Whether rows of `dtype` may go to ``aten._grouped_mm``."""
    # Other dtypes fall back inside ATen to a loop that reads the device, like the one here.
    return dtype == torch.bfloat16


def _weight_product(a_VK: Tensor, b_VN: Tensor, slots: SortedSlots) -> Tensor:
    num_experts = slots.ends_L.shape[0]
    if _is_legal(a_VK, b_VN.unsqueeze(0)):
        return torch.ops.aten._grouped_mm(a_VK.t(), b_VN, slots.ends_L)
    out_LKN = a_VK.new_zeros(num_experts, a_VK.shape[1], b_VN.shape[1])
    start = 0
    for expert, end in enumerate(slots.host_ends):
        if end > start:
            torch.mm(a_VK[start:end].t(), b_VN[start:end], out=out_LKN[expert])
        start = end
    return out_LKN


def _is_legal(a_VK: Tensor, b_LKN: Tensor) -> bool:
    return (
        is_grouped_dtype(a_VK.dtype)
        and a_VK.device.type in ("cpu", "cuda")
        and _is_aligned(a_VK)
        and _is_aligned(b_LKN)
    )


def _is_aligned(matrix: Tensor) -> bool:
    """Whether one of the last two dims is dense and every other stride is a 16-byte multiple."""
    unit = _ALIGN_BYTES // matrix.element_size()
    *outer, rows, columns = matrix.stride()
    if columns == 1 and rows >= matrix.shape[-1]:
        outer.append(rows)
    elif rows == 1 and columns >= matrix.shape[-2]:
        outer.append(columns)
    else:
        return False
    return all(s > 0 and s % unit == 0 for s in outer) and matrix.data_ptr() % _ALIGN_BYTES == 0
