"""Layers made on the GPU: `moe_cases.make_case` is too slow at the sizes of models."""

from __future__ import annotations

import torch
from moe_cases import Case
from torch import Tensor

DEVICE = "cuda"


def make_layer(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    inter: int,
    *,
    activation: str = "silu_glu",
    weight_place: str = "after",
    k_contiguous: bool = True,
    apart: bool = False,
    biases: bool = False,
    strays: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    weights_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Return a random layer of these sizes."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype)

    def weight(k: int, n: int) -> Tensor:
        stored = (num_experts, n, k) if k_contiguous else (num_experts, k, n)
        made = normal(*stored).mul_(k**-0.5)
        return made.transpose(1, 2) if k_contiguous else made

    gated = "glu" in activation
    columns = 2 * inter if gated and not apart else inter
    scores = torch.rand(num_tokens, num_experts, generator=generator, device=DEVICE)
    weights, ids = scores.topk(top_k, dim=1)
    if strays:
        ids[::3, 0] = num_experts + 5
        ids[num_tokens // 2, -1] = -1
        ids[-1, 0] = 2**32
        weights[0, 0] = float("nan")
    return Case(
        x=normal(num_tokens, hidden),
        ids=ids,
        weights=weights.to(weights_dtype),
        w_in=weight(hidden, columns),
        w_up=weight(hidden, inter) if apart else None,
        w_out=weight(inter, hidden),
        b_in=normal(num_experts, columns) if biases else None,
        b_up=normal(num_experts, inter) if biases and apart else None,
        b_out=normal(num_experts, hidden) if biases else None,
        grad_y=normal(num_tokens, hidden),
        activation=activation,
        weight_place=weight_place,
        product_dtype=weights_dtype,
        out_dtype=dtype,
    )
