"""Views of expert weights that a kernel can fetch in boxes, whatever layout a model keeps them in.

An in-projection is one matrix or a pair, gate and up. A pair may be two tensors, or the halves of
one, or interleaved column by column; each matrix may have its rows (K, the dim that is summed
over) or its columns (N) contiguous. All of them but the interleaved pair, which is one matrix of
2I columns to a kernel, are the same four-dimensional view ``[pair, expert, N, K]`` (or
``[pair, expert, K, N]``) with strides of its own: no weight is copied.

Two tensors become one view by the distance between their addresses. The tensor copy engine takes
any distance below 2**40 bytes that is a multiple of 16.

Legend: L experts, H model dim, I expert intermediate dim, N columns of the in-projection.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from comet_compile.kernels.launch import descriptor

_MAX_STRIDE_BYTES = 2**40


@dataclasses.dataclass(frozen=True, eq=False)
class WeightView:
    """``[pair, L, rows, columns]`` over the storage that begins at `base`."""

    base: Tensor
    pair: int  # 1, or 2 for gate and up in halves or in two tensors
    swapped: bool  # the second of two tensors comes first in memory
    k_contiguous: bool  # rows are columns N, columns are K
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]

    @property
    def num_columns(self) -> int:
        """N of one of the pair."""
        return self.shape[2] if self.k_contiguous else self.shape[3]

    def descriptor(self, block_n: int, block_k: int) -> TensorDescriptor:
        """Return a descriptor of boxes: both of the pair if K is contiguous, else one."""
        both = (self.pair, 1, block_n, block_k)
        box = both if self.k_contiguous else (1, 1, block_k, block_n)
        return descriptor(self.base, self.shape, self.strides, box)


def why_not(weight_LKN: Tensor) -> str | None:
    """Return why the copy engine cannot fetch `weight_LKN` [L, K, N], None if it can."""
    num_experts, k, _ = weight_LKN.shape
    expert, row, column = weight_LKN.stride()
    size = weight_LKN.element_size()
    if not _is_fake(weight_LKN) and weight_LKN.data_ptr() % 16:
        return "the weights do not begin at a multiple of 16 bytes"
    if not ((row == 1 and k > 1) or column == 1):
        return f"neither dim of the weights is contiguous (strides {weight_LKN.stride()})"
    pitch = column if row == 1 and column != 1 else row
    if pitch * size % 16 or (expert * size % 16 and num_experts > 1):
        return (
            f"rows of the weights are not multiples of 16 bytes apart (strides {pitch}, {expert})"
        )
    if min(pitch, expert) <= 0:
        return "the weights are broadcast (a stride of 0)"
    return None


def view_weight(weight_LKN: Tensor) -> WeightView:
    """Return one matrix per expert [L, K, N] as a view with pair 1."""
    num_experts, k, n = weight_LKN.shape
    expert, row, column = weight_LKN.stride()
    k_contiguous = row == 1 and column != 1
    pitch = column if k_contiguous else row
    inner = (n, k) if k_contiguous else (k, n)
    return WeightView(
        base=weight_LKN,
        pair=1,
        swapped=False,
        k_contiguous=k_contiguous,
        shape=(1, num_experts, *inner),
        strides=(_stride_of_one(expert, num_experts), expert, pitch, 1),
    )


def view_halves(weight_LKN: Tensor) -> WeightView:
    """Return a fused pair [L, K, 2I], one half beside the other, as a view with pair 2."""
    one = view_weight(weight_LKN)
    inter = one.num_columns // 2
    rows, columns = one.shape[2:]
    half = inter * (one.strides[2] if one.k_contiguous else 1)
    inner = (inter, columns) if one.k_contiguous else (rows, inter)
    return dataclasses.replace(
        one, pair=2, shape=(2, one.shape[1], *inner), strides=(half, *one.strides[1:])
    )


def view_pair(first_LKI: Tensor, second_LKI: Tensor) -> WeightView | None:
    """Return two tensors [L, K, I] as one view with pair 2, None if they differ in layout."""
    one, two = view_weight(first_LKI), view_weight(second_LKI)
    if one.strides[1:] != two.strides[1:] or one.k_contiguous != two.k_contiguous:
        return None
    if _is_fake(first_LKI):  # without addresses: as if one lay behind the other
        distance = first_LKI.numel() * first_LKI.element_size()
    else:
        distance = second_LKI.data_ptr() - first_LKI.data_ptr()
    if distance % 16 or not 0 < abs(distance) < _MAX_STRIDE_BYTES:
        return None
    base = first_LKI if distance > 0 else second_LKI
    return dataclasses.replace(
        one,
        base=base,
        pair=2,
        swapped=distance < 0,
        shape=(2, *one.shape[1:]),
        strides=(abs(distance) // base.element_size(), *one.strides[1:]),
    )


def _stride_of_one(expert: int, num_experts: int) -> int:
    """A legal stride for the pair dim of size 1, which nothing is ever multiplied with."""
    return expert * num_experts


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)
