"""Errors against float32, relative in norm: ``|out - ref| / |ref|``."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Callable[[int], tuple[Tensor, Tensor]]


class ErrorSums:
    """Squared differences and squared references, summed by name and piece by piece."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, got: Tensor | None, ref: Tensor) -> None:
        """Count one piece; a missing `got` counts as zeros."""
        wide = torch.zeros_like(ref) if got is None else got.detach().float()
        pair = self.sums[name]
        pair[0] += (wide - ref).square().sum().item()
        pair[1] += ref.square().sum().item()

    def relative(self) -> dict[str, float]:
        """Return the relative error of every name (0 where nothing was to be computed)."""
        return {
            name: (diff / ref) ** 0.5 if ref > 0 else diff**0.5
            for name, (diff, ref) in self.sums.items()
        }


def layer_errors(
    x: Tensor,  # [T, H]
    ids: Tensor,  # [T, A]
    weights: Tensor,  # [T, A]
    experts: Iterable[int],
    weights_of: Weights,
    got: Mapping[str, Tensor | None],
    grad_y: Tensor | None = None,
    grads_of: Weights | None = None,
    *,
    place: str = "after",
    router: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Compute the layer in float32, one expert after the other, and compare `got` with it.

    `got` may hold "y" and "d_x"; with `grads_of`, the gradients of the experts'
    weights are compared too, as "d_w_in" and "d_w_out". `weights_of(e)` is gate-up [2I, H] and
    down [H, I], `grads_of(e)` their gradients. `weights` multiply "before" the experts or
    "after", as `place` says; with `router`, which makes these weights of tokens [T, H] in float32,
    "d_x" has the part that reaches tokens by way of it.
    """
    sums = ErrorSums()
    train = grad_y is not None
    shape, device = x.shape, x.device
    d_weights = torch.zeros(weights.shape, device=device)
    refs = {"y": torch.zeros(shape, device=device), "d_x": torch.zeros(shape, device=device)}
    for expert in experts:
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if token.numel() == 0 and grads_of is None:
            continue
        w_in, w_out = (w.detach().float().requires_grad_(train) for w in weights_of(expert))
        rows = x.detach()[token].float().requires_grad_(train)
        scale = weights.detach()[token, slot].float().requires_grad_(train)
        before, after = (scale.unsqueeze(-1) if place == p else 1.0 for p in ("before", "after"))
        with torch.set_grad_enabled(train):
            gate, up = F.linear(rows * before, w_in).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, w_out) * after
        refs["y"].index_add_(0, token, y.detach())
        if grad_y is None:
            continue
        leaves = (rows, scale, w_in, w_out)
        d_rows, d_scale, d_in, d_out = torch.autograd.grad(y, leaves, grad_y[token].float())
        refs["d_x"].index_add_(0, token, d_rows)
        d_weights[token, slot] = d_scale
        if grads_of is not None:
            got_in, got_out = grads_of(expert)
            sums.add("d_w_in", got_in, d_in)
            sums.add("d_w_out", got_out, d_out)
    if router is not None and train:
        wide = x.detach().float().requires_grad_()
        with torch.enable_grad():
            refs["d_x"] += torch.autograd.grad(router(wide), wide, d_weights)[0]
    for name, value in got.items():
        sums.add(name, value, refs[name])
    return sums.relative()
