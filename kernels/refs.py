"""Plain PyTorch twins of the ops: the oracle of the tests and of the prover in `passes/`.

They define what ``comet::moe_layer`` means on one device: ``y[t] = sum_j weights[t, j] *
FFN_{ids[t, j]}(x[t])``. Written to be obvious, not fast: one loop over the experts, every step
out of place, float32 inside (float64 when `x` is float64), differentiable by autograd.

Legend: T tokens, A experts per token, L experts, H model dim, I expert intermediate dim, N columns
of the in-projection (2I when gate and up are fused, else I), R rows of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from comet_compile.kernels.activation import Activation


def moe_layer_ref(
    x: Tensor,  # [T, H]
    ids: Tensor,  # [T, A]
    weights: Tensor | None,  # [T, A]
    w_in: Tensor,  # [L, H, N]
    w_up: Tensor | None,  # [L, H, I]
    w_out: Tensor,  # [L, I, H]
    b_in: Tensor | None = None,  # [L, N]
    b_up: Tensor | None = None,  # [L, I]
    b_out: Tensor | None = None,  # [L, H]
    *,
    activation: str | Activation,
    weight_place: str,
) -> Tensor:
    """Return the routed experts' sum y [T, H] in float32 (float64 for float64 `x`).

    `weight_place` says where a routing weight multiplies: "before" (the token row), "between"
    (the activated row) or "after" (the expert's output row). Ids outside [0, L) contribute
    nothing.
    """
    act = Activation.parse(activation) if isinstance(activation, str) else activation
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_TH = x.to(dtype)
    weights_TA = None if weights is None else weights.to(dtype)
    y_TH = torch.zeros_like(x_TH)
    for expert in sorted({*ids.flatten().tolist()} & {*range(w_in.shape[0])}):
        token_R, slot_R = torch.nonzero(ids == expert, as_tuple=True)
        scale_R1 = 1.0 if weights_TA is None else weights_TA[token_R, slot_R].unsqueeze(1)

        row_RH = x_TH[token_R]
        if weight_place == "before":
            row_RH = row_RH * scale_R1
        pre_RN = _linear(row_RH, w_in[expert], b_in, expert)
        up_RI = None if w_up is None else _linear(row_RH, w_up[expert], b_up, expert)
        h_RI = act.apply(*act.split(pre_RN, up_RI))
        if weight_place == "between":
            h_RI = h_RI * scale_R1
        out_RH = _linear(h_RI, w_out[expert], b_out, expert)
        if weight_place == "after":
            out_RH = out_RH * scale_R1
        y_TH = y_TH.index_add(0, token_R, out_RH)
    return y_TH


def moe_layer_backward_ref(
    grad_y: Tensor,  # [T, H]
    x: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    w_in: Tensor,
    w_up: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_up: Tensor | None = None,
    b_out: Tensor | None = None,
    *,
    activation: str | Activation,
    weight_place: str,
    needs: Sequence[bool] = (True,) * 8,
) -> tuple[Tensor, ...]:
    """Return (d_x, d_weights, d_w_in, d_w_up, d_w_out, d_b_in, d_b_up, d_b_out) by autograd.

    Each has its input's shape, in float32 (float64 for float64 `x`). What `needs` does not ask
    for, or whose input is None, is an empty [0] tensor.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    given = (x, weights, w_in, w_up, w_out, b_in, b_up, b_out)
    with torch.enable_grad():
        leaves = [
            None if t is None else t.detach().to(dtype).requires_grad_(need)
            for t, need in zip(given, needs, strict=True)
        ]
        # positional, as in the signature, with ids back in their place
        layer: list[Any] = [leaves[0], ids, *leaves[1:]]
        y = moe_layer_ref(*layer, activation=activation, weight_place=weight_place)
    asked = [t for t in leaves if t is not None and t.requires_grad]
    grads = _grad_or_zeros(y, asked, grad_y.to(dtype))
    empty = x.new_empty(0, dtype=dtype)
    return tuple(
        grads.pop(0) if t is not None and t.requires_grad else empty.clone() for t in leaves
    )


def _grad_or_zeros(y: Tensor, leaves: list[Tensor], grad_y: Tensor) -> list[Tensor]:
    if not y.requires_grad:  # not a single row was routed
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(y, leaves, grad_y, allow_unused=True, materialize_grads=True))


def _linear(row_RK: Tensor, w_KN: Tensor, bias_LN: Tensor | None, expert: int) -> Tensor:
    out_RN = row_RK @ w_KN.to(row_RK.dtype)
    return out_RN if bias_LN is None else out_RN + bias_LN[expert].to(row_RK.dtype)
