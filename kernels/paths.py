"""Which path a layer takes: the fused kernels where they apply, else plain PyTorch.

The choice needs nothing but dtypes, sizes, strides and the device, so it can be made for fake
tensors while a graph is compiled and is the same again when the graph runs. Importing this module
loads no Triton; asking for a CUDA tensor does.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from comet_compile.kernels import portable
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.portable import Routed


def why_portable(routed: Routed, params: ExpertParams, math: LayerMath) -> str | None:
    """Return why the experts of this layer run the portable path, None if they run fused."""
    if os.environ.get("COMET_PORTABLE", "0") not in ("", "0"):
        return "COMET_PORTABLE is set"
    if routed.x.device.type != "cuda":
        return f"the tensors are on {routed.x.device.type}, the kernels run on NVIDIA GPUs"
    try:
        return _fused().why_not(routed, params, math)
    except ImportError as error:
        return f"Triton cannot be imported ({error})"


def local_forward(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    out_dtype: torch.dtype,
    *,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Return (y [T, H] in `out_dtype`, pre-activation rows [S, ...], [0] if not saved)."""
    if why_portable(routed, params, math) is None:
        return _fused().local_forward(routed, params, math, out_dtype, save=save)
    y, pre = portable.local_forward(routed, params, math, out_dtype)
    if not save:
        return y, y.new_empty(0, dtype=routed.x.dtype)
    return y, portable.pad_saved(pre, routed.ids.numel())


def _fused() -> ModuleType:
    from comet_compile.kernels import fused

    return fused
