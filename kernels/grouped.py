"""Grouped GEMM over rows sorted by expert: ``aten._grouped_mm`` where it is legal, else a loop.

Legend: V rows sorted by expert, K contraction dim, N columns, L experts.
"""

from __future__ import annotations

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
    # The product comes out row-major; for a transposed weight compute the transpose instead of
    # copying the largest tensor of the layer.
    if out_LKN.stride(1) == 1 and out_LKN.stride(2) != 1:
        product = _weight_product(b_VN.contiguous(), a_VK.contiguous(), slots).transpose(1, 2)
    else:
        product = _weight_product(a_VK.contiguous(), b_VN.contiguous(), slots)
    if product.stride() == out_LKN.stride():
        return product
    return out_LKN.copy_(product)


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
