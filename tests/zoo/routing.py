"""Inputs whose routing is planted, so that rounding can never flip a top-k choice.

A bf16 model and its float32 copy choose different experts wherever two router logits are close,
and then no comparison of values means anything. Here the router's rows are orthonormal and every
token carries clear amounts of the rows of its chosen experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def router_rows(num_experts: int, hidden: int) -> Tensor:
    """Return orthonormal rows [E, H] in float32, the same for every caller."""
    assert num_experts <= hidden, f"{num_experts} orthonormal rows do not fit into {hidden} dims"
    generator = torch.Generator().manual_seed(1234)
    square = torch.randn(hidden, hidden, generator=generator)
    return torch.linalg.qr(square).Q[:num_experts].contiguous()


def spread_ids(
    num_tokens: int, num_experts: int, top_k: int, seed: int = 0, groups: int = 1
) -> Tensor:
    """Return random distinct expert ids [T, A], each row inside one of `groups` blocks of ids."""
    generator = torch.Generator().manual_seed(seed)
    group_size = num_experts // groups
    order = torch.rand(num_tokens, group_size, generator=generator).argsort(dim=1)[:, :top_k]
    group = torch.randint(groups, (num_tokens, 1), generator=generator)
    return order + group * group_size


def planted_tokens(ids_TA: Tensor, num_experts: int, hidden: int, seed: int = 0) -> Tensor:
    """Return tokens [T, H] in float32 that the rows of `router_rows` send to `ids_TA` [T, A].

    Row norm is about sqrt(H); logits are 0 for the experts that are not chosen and clearly above
    for those that are, with amounts of its own for every token.
    """
    num_tokens, top_k = ids_TA.shape
    generator = torch.Generator().manual_seed(seed + 7919)
    rows_EH = router_rows(num_experts, hidden)
    noise_TH = torch.randn(num_tokens, hidden, generator=generator)
    noise_TH = noise_TH - (noise_TH @ rows_EH.T) @ rows_EH
    amounts_TA = torch.linspace(1.0, 0.6, top_k) + 0.3 * torch.rand(
        num_tokens, top_k, generator=generator
    )
    amounts_TA = amounts_TA * (hidden / top_k) ** 0.5
    return noise_TH + (amounts_TA[:, :, None] * rows_EH[ids_TA]).sum(1)
