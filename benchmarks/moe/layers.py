"""Weights, routing and the local layer as users write it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_bench.shapes import Shape

DTYPE = torch.bfloat16


def seeded(device: torch.device, seed: int) -> torch.Generator:
    """Return a generator of the device with a fixed seed."""
    return torch.Generator(device=device).manual_seed(seed)


def draw_expert(shape: Shape, expert: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return gate-up [2I, H] and down [H, I] of one expert: normal, scaled 1/sqrt(fan-in).

    Every rank draws the same numbers for the same expert, so none needs the others' weights.
    """
    generator = seeded(device, 1000 + expert)
    size_in, size_out = (2 * shape.inter, shape.hidden), (shape.hidden, shape.inter)
    gate_up = torch.randn(size_in, generator=generator, device=device, dtype=DTYPE)
    down = torch.randn(size_out, generator=generator, device=device, dtype=DTYPE)
    return gate_up.mul_(shape.hidden**-0.5), down.mul_(shape.inter**-0.5)


def draw_tokens(shape: Shape, tokens: int, device: torch.device, seed: int) -> Tensor:
    """Return x [T, H], normal."""
    generator = seeded(device, 10 + seed)
    return torch.randn((tokens, shape.hidden), generator=generator, device=device, dtype=DTYPE)


def draw_logits(
    shape: Shape, tokens: int, device: torch.device, seed: int, *, hot: bool = False
) -> Tensor:
    """Return router logits [T, E] in float32, normal.

    `hot`: expert 0 is chosen by 4 times the tokens of an even share, or by all.
    """
    generator = seeded(device, 20 + seed)
    logits = torch.randn((tokens, shape.num_experts), generator=generator, device=device)
    if hot:
        num_hot = min(tokens, 4 * tokens * shape.top_k // shape.num_experts)
        order = torch.randperm(tokens, generator=generator, device=device)
        logits[:, 0] = -20.0
        logits[order[:num_hot], 0] = 20.0
    return logits


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return routing weights [T, A] in bf16, as Hugging Face's routers do, and ids [T, A]."""
    weights, ids = torch.softmax(logits, dim=-1).topk(top_k, dim=-1)
    return weights.to(DTYPE), ids


class GroupedExperts(nn.Module):
    """Top-k routing and experts: what transformers' `grouped_mm` experts do, in plain PyTorch.

    The routing starts from logits: ids that come out of a top-k are known to be in range, ids
    that a compiler knows nothing of are not.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.num_experts = shape.num_experts
        size = (shape.num_experts, 2 * shape.inter, shape.hidden)
        self.gate_up_proj = nn.Parameter(torch.empty(size, device=device, dtype=DTYPE))
        size = (shape.num_experts, shape.hidden, shape.inter)
        self.down_proj = nn.Parameter(torch.empty(size, device=device, dtype=DTYPE))
        with torch.no_grad():
            for expert in range(shape.num_experts):
                gate_up, down = draw_expert(shape, expert, device)
                self.gate_up_proj[expert] = gate_up
                self.down_proj[expert] = down

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        """x [T, H], logits [T, E] -> [T, H]."""
        weights, ids = route(logits, self.top_k)
        num_tokens, top_k = ids.shape
        ids_S, order_S = torch.sort(ids.reshape(-1))
        rows_SH = x[order_S // top_k]
        # CPU counts floats only
        countable = ids_S.float() if x.device.type == "cpu" else ids_S.int()
        counts_E = torch.histc(countable, bins=self.num_experts, min=0, max=self.num_experts - 1)
        offs_E = torch.cumsum(counts_E, dim=0, dtype=torch.int32)
        pre = torch._grouped_mm(rows_SH, self.gate_up_proj.transpose(-2, -1), offs=offs_E)
        gate, up = pre.chunk(2, dim=-1)
        out = torch._grouped_mm(F.silu(gate) * up, self.down_proj.transpose(-2, -1), offs=offs_E)
        out = out * weights.reshape(-1)[order_S].unsqueeze(-1)
        inverse_S = torch.empty_like(order_S)
        inverse_S[order_S] = torch.arange(order_S.shape[0], device=order_S.device)
        return out[inverse_S].view(num_tokens, top_k, -1).sum(dim=1).to(x.dtype)


def swiglu(pre: Tensor) -> Tensor:
    """Return silu(gate) * up of rows [R, 2I]."""
    gate, up = pre.chunk(2, dim=-1)
    return F.silu(gate) * up


class BareGemms(nn.Module):
    """torch's compute alone: two grouped GEMMs and the activation on rows sorted beforehand."""

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor) -> None:
        """`ids` [...]: the local expert of every row, in any order."""
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj  # shared with the layer
        counts_L = torch.bincount(ids.reshape(-1), minlength=gate_up_proj.shape[0])
        self.offs_L = torch.cumsum(counts_L, 0, dtype=torch.int32)
        self.activation = torch.compile(swiglu, backend="inductor")

    def forward(self, rows_RH: Tensor) -> Tensor:
        """[R, H] -> [R, H]."""
        pre = torch._grouped_mm(rows_RH, self.gate_up_proj.transpose(-2, -1), offs=self.offs_L)
        hidden = self.activation(pre)
        return torch._grouped_mm(hidden, self.down_proj.transpose(-2, -1), offs=self.offs_L)
