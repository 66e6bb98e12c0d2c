"""The expert feed-forward on rows sorted by expert, forward and backward by explicit formulas.

Legend: V rows sorted by expert, L experts, H model dim, I expert intermediate dim, N columns of
the in-projection (2I when gate and up are fused, else I).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from comet_compile.kernels.activation import Activation
from comet_compile.kernels.grouped import grouped_mm, grouped_mm_weight
from comet_compile.kernels.routing import SortedSlots, merge_slots, sum_by_expert


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertParams:
    """The experts' matrices and biases, in logical shape whatever their strides."""

    w_in: Tensor  # [L, H, N]
    w_up: Tensor | None  # [L, H, I]
    w_out: Tensor  # [L, I, H]
    b_in: Tensor | None = None  # [L, N]
    b_up: Tensor | None = None  # [L, I]
    b_out: Tensor | None = None  # [L, H]

    @property
    def num_experts(self) -> int:
        """L, the number of experts held here."""
        return self.w_in.shape[0]

    @property
    def in_columns(self) -> int:
        """Columns of a row in front of the activation, gate and up together."""
        return self.w_in.shape[2] + (0 if self.w_up is None else self.w_up.shape[2])


@dataclasses.dataclass(frozen=True, eq=False)
class Matrices:
    """The gradients of the experts' matrices, in their strides; None for what nobody asked for.

    `has_values`: there are values in them, to be added to.
    """

    w_in: Tensor | None
    w_up: Tensor | None
    w_out: Tensor | None
    has_values: bool = False


@dataclasses.dataclass(frozen=True)
class LayerMath:
    """The activation, and where and in which dtype the routing weights multiply."""

    activation: Activation
    weight_place: str
    product_dtype: torch.dtype

    def scale(self, rows: Tensor, scale_V: Tensor | None) -> Tensor:
        """Return `rows` times `scale_V`, made in `product_dtype`, in the dtype of `rows`."""
        if scale_V is None:
            return rows
        dtype = self.product_dtype
        return (rows.to(dtype) * scale_V.to(dtype).unsqueeze(1)).to(rows.dtype)


@dataclasses.dataclass(frozen=True)
class Needs:
    """Which gradients to compute."""

    x: bool = True
    weights: bool = True
    w_in: bool = True
    w_up: bool = True
    w_out: bool = True
    b_in: bool = True
    b_up: bool = True
    b_out: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class WeightGradRows:
    """The row pairs whose products, summed over an expert's rows, are its weight gradients."""

    slots: SortedSlots
    x_VH: Tensor
    d_pre_VN: Tensor
    d_up_VI: Tensor | None
    h_VI: Tensor
    d_out_VH: Tensor
    d_out_bias_VH: Tensor


def experts_forward(
    x_VH: Tensor,
    scale_V: Tensor | None,
    slots: SortedSlots,
    params: ExpertParams,
    math: LayerMath,
) -> tuple[Tensor, Tensor]:
    """Return the experts' rows (out [V, H], pre [V, N (+ I with `w_up`)]).

    A weight that multiplies "after" is left to the sum over a token's rows.
    """
    if math.weight_place == "before":
        x_VH = math.scale(x_VH, scale_V)
    pre_VN, up_VI = _in_projection(x_VH, slots, params)
    h_VI = math.activation.apply(*math.activation.split(pre_VN, up_VI))
    if math.weight_place == "between":
        h_VI = math.scale(h_VI, scale_V)
    out_VH = _add_bias(grouped_mm(h_VI, params.w_out, slots), params.b_out, slots)
    pre = pre_VN if up_VI is None else torch.cat((pre_VN, up_VI), dim=1)
    return slots.zero_strays(out_VH), pre


def experts_backward(
    d_out_VH: Tensor,
    x_VH: Tensor,
    scale_V: Tensor | None,
    saved_pre: Tensor | None,
    slots: SortedSlots,
    params: ExpertParams,
    math: LayerMath,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, WeightGradRows]:
    """Return (d_x [V, H], d_scale [V], rows of the weight gradients).

    `d_out_VH` is the gradient of the token's sum, before any weight that multiplies "after".
    `saved_pre` is what `experts_forward` returned, or None to compute it again.
    """
    act = math.activation
    rows_VH = math.scale(x_VH, scale_V) if math.weight_place == "before" else x_VH
    if saved_pre is None:
        pre_VN, up_VI = _in_projection(rows_VH, slots, params)
    else:
        pre_VN, up_VI = saved_pre, None
        if params.w_up is not None:
            pre_VN, up_VI = saved_pre.split((params.w_in.shape[2], params.w_up.shape[2]), dim=1)
    gate_VI, lin_VI = act.split(pre_VN, up_VI)
    h_VI = act.apply(gate_VI, lin_VI)

    d_h_VI = grouped_mm(d_out_VH, params.w_out.transpose(1, 2), slots)
    d_scale_V, d_out_bias_VH = None, d_out_VH
    if math.weight_place != "before" and scale_V is not None:
        if needs.weights:
            d_scale_V = _row_dot(d_h_VI, h_VI)
        # w * (h @ w_out) == (w * h) @ w_out: "after" shares the formulas of "between", on rows of
        # I instead of H columns and without computing the expert's output again.
        d_h_VI, h_VI = math.scale(d_h_VI, scale_V), math.scale(h_VI, scale_V)
        if math.weight_place == "after" and params.b_out is not None:
            d_out_bias_VH = math.scale(d_out_VH, scale_V)
            if d_scale_V is not None:
                bias_VH = params.b_out.index_select(0, slots.expert_index_V)
                d_scale_V = d_scale_V + _row_dot(d_out_VH, bias_VH)

    d_gate_VI, d_lin_VI = act.backward(d_h_VI, gate_VI, lin_VI)
    d_pre_VN, *rest = act.join(d_gate_VI, d_lin_VI, fused=params.w_up is None)
    d_up_VI = rest[0] if rest else None
    d_x_VH = None
    if needs.x or (needs.weights and math.weight_place == "before" and scale_V is not None):
        d_x_VH = grouped_mm(d_pre_VN, params.w_in.transpose(1, 2), slots)
        if d_up_VI is not None and params.w_up is not None:
            d_x_VH = d_x_VH + grouped_mm(d_up_VI, params.w_up.transpose(1, 2), slots)
        d_x_VH = slots.zero_strays(d_x_VH)
        if math.weight_place == "before" and scale_V is not None:
            d_scale_V = _row_dot(d_x_VH, x_VH) if needs.weights else None
            d_x_VH = math.scale(d_x_VH, scale_V)
    if d_scale_V is not None:
        d_scale_V = slots.zero_strays(d_scale_V)
    grad_rows = WeightGradRows(slots, rows_VH, d_pre_VN, d_up_VI, h_VI, d_out_VH, d_out_bias_VH)
    return d_x_VH, d_scale_V, grad_rows


def weight_gradients(
    parts: list[WeightGradRows], params: ExpertParams, needs: Needs
) -> tuple[Tensor | None, ...]:
    """Return (d_w_in, d_w_up, d_w_out, d_b_in, d_b_up, d_b_out) over the rows of all parts.

    One product over all rows, not one per part: sums of partial bf16 gradients would lose bits.
    """
    rows = parts[0] if len(parts) == 1 else _merge(parts)
    slots = rows.slots

    def matrix(need: bool, a: Tensor, b: Tensor | None, like: Tensor | None) -> Tensor | None:
        if not need or b is None or like is None:
            return None
        return grouped_mm_weight(a, b, slots, like)

    def bias(need: bool, b: Tensor | None, like: Tensor | None) -> Tensor | None:
        if not need or b is None or like is None:
            return None
        return torch.empty_like(like).copy_(sum_by_expert(b, slots))

    return (
        matrix(needs.w_in, rows.x_VH, rows.d_pre_VN, params.w_in),
        matrix(needs.w_up, rows.x_VH, rows.d_up_VI, params.w_up),
        matrix(needs.w_out, rows.h_VI, rows.d_out_VH, params.w_out),
        bias(needs.b_in, rows.d_pre_VN, params.b_in),
        bias(needs.b_up, rows.d_up_VI, params.b_up),
        bias(needs.b_out, rows.d_out_bias_VH, params.b_out),
    )


def _merge(parts: list[WeightGradRows]) -> WeightGradRows:
    slots, perm_V = merge_slots([part.slots for part in parts])

    def take(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts]).index_select(0, perm_V)

    return WeightGradRows(
        slots=slots,
        x_VH=take("x_VH"),
        d_pre_VN=take("d_pre_VN"),
        d_up_VI=None if parts[0].d_up_VI is None else take("d_up_VI"),
        h_VI=take("h_VI"),
        d_out_VH=take("d_out_VH"),
        d_out_bias_VH=take("d_out_bias_VH"),
    )


def _in_projection(
    rows_VH: Tensor, slots: SortedSlots, params: ExpertParams
) -> tuple[Tensor, Tensor | None]:
    pre_VN = _add_bias(grouped_mm(rows_VH, params.w_in, slots), params.b_in, slots)
    if params.w_up is None:
        return pre_VN, None
    return pre_VN, _add_bias(grouped_mm(rows_VH, params.w_up, slots), params.b_up, slots)


def _add_bias(rows_VN: Tensor, bias_LN: Tensor | None, slots: SortedSlots) -> Tensor:
    if bias_LN is None:
        return rows_VN
    return rows_VN + bias_LN.index_select(0, slots.expert_index_V)


def _row_dot(a_VN: Tensor, b_VN: Tensor) -> Tensor:
    """Return [V], the dot product of each pair of rows, in float32 (float64 for float64)."""
    dtype = torch.float64 if a_VN.dtype == torch.float64 else torch.float32
    return (a_VN.to(dtype) * b_VN.to(dtype)).sum(1)
