"""The fused path of the layer ops on one GPU: routing tables, layer0, layer1. No host read.

Legend: T tokens, A experts per token, S = T*A slots, R tile rows, L experts, H model dim, I expert
intermediate dim, N columns of the in-projection.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from comet_compile.kernels import expert_weights, layer0, layer1, tuned
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.plan import Plan, choose_plan, read_device
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.route_tiles import TileRouting, max_tiles, route_tiles

_DTYPES = (torch.bfloat16, torch.float16)


def why_not(routed: Routed, params: ExpertParams, math: LayerMath) -> str | None:
    """Return why the fused path cannot run this layer, None if it can."""
    x = routed.x
    if x.device.type != "cuda":
        return f"the tensors are on {x.device.type}, the kernels run on NVIDIA GPUs"
    if torch.version.hip is not None:
        return "the kernels run on NVIDIA GPUs"
    device = read_device(x.device.index or 0)
    if device.capability < (8, 0):
        return f"compute capability {device.capability}, the kernels need 8.0"
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype}, the kernels take bfloat16 and float16"
    if math.product_dtype not in (*_DTYPES, torch.float32):
        return f"routing weights multiplied in {math.product_dtype}"
    hidden, inter = params.w_in.shape[1], params.w_out.shape[1]
    if hidden % 8 or inter % 8:
        return f"hidden size {hidden} and intermediate size {inter}, both must be multiples of 8"
    for weight in (params.w_in, params.w_up, params.w_out):
        reason = None if weight is None else expert_weights.why_not(weight)
        if reason is not None:
            return reason
    if layer0.view_in_projection(params, math.activation) is None:
        return "w_in and w_up differ in layout"
    if params.w_up is not None and (params.b_in is None) != (params.b_up is None):
        return f"of w_in and w_up, {'w_up' if params.b_in is None else 'w_in'} alone has a bias"
    return None


def plan_layer(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    num_slots: int | None = None,
    *,
    use_tables: bool = True,
) -> Plan:
    """Return the plan for this call, `num_slots` in place of a size that is a symbol."""
    num_slots = routed.ids.numel() if num_slots is None else num_slots
    shape = shape_of(routed, params, math, num_slots)
    device = read_device(routed.x.device.index or 0)
    plan = choose_plan(
        num_slots,
        shape.experts,
        shape.hidden,
        shape.inter,
        gated=shape.gated,
        interleaved=shape.interleaved,
        device=device,
    )
    return tuned.apply(plan, shape, device) if use_tables else plan


def shape_of(routed: Routed, params: ExpertParams, math: LayerMath, num_slots: int) -> tuned.Shape:
    """Return what tables call the layer."""
    projection = layer0.view_in_projection(params, math.activation)
    assert projection is not None, "checked by why_not"
    top_k = routed.ids.shape[1]
    return tuned.Shape(
        ranks=1,
        tokens=tuned.bucket(num_slots // top_k),
        top_k=top_k,
        experts=params.num_experts,
        hidden=params.w_in.shape[1],
        inter=params.w_out.shape[1],
        gated=math.activation.gated,
        interleaved=projection.mode == "interleaved",
        itemsize=params.w_in.element_size(),
    )


def local_forward(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    out_dtype: torch.dtype,
    *,
    save: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y [T, H] in `out_dtype`, pre-activation rows [S, N] or [0]).

    The saved rows are those of `portable.local_forward`; with stray ids, the last are garbage.
    """
    plan = plan_layer(routed, params, math) if plan is None else plan
    params = with_dense_biases(params)
    hidden = compute_hidden(routed, params, math, plan, save=save)
    rows_RH = layer1.gemm_rows(hidden.h_RI, params.w_out, params.b_out, hidden.routing, plan.layer1)
    y_TH = layer1.sum_slots(
        rows_RH,
        hidden.routing.row_S,
        hidden.weights_TA if math.weight_place == "after" else None,
        (routed.ids.shape[0], routed.ids.shape[1]),
        math.product_dtype,
        out_dtype,
    )
    return y_TH, hidden.saved_SN


@dataclasses.dataclass(frozen=True, eq=False)
class Hidden:
    """What layer0 leaves for layer1; `saved_SN` is [0] if it was not asked for."""

    routing: TileRouting
    h_RI: Tensor
    saved_SN: Tensor
    weights_TA: Tensor | None  # contiguous


def compute_hidden(
    routed: Routed, params: ExpertParams, math: LayerMath, plan: Plan, *, save: bool
) -> Hidden:
    """Return the activated rows of the experts of this device; `params` has dense biases."""
    x_TH = routed.x if routed.x.stride(1) == 1 else routed.x.contiguous()
    weights_TA = None if routed.weights is None else routed.weights.contiguous()
    num_tokens, top_k = routed.ids.shape
    saved = x_TH.new_empty(0)
    if save:
        saved = x_TH.new_empty(num_tokens * top_k, params.in_columns)
    num_tiles = max_tiles(routed.ids.numel(), params.num_experts, plan.block_m)
    num_arrivals = plan.layer0.num_arrivals(num_tiles, params.w_out.shape[1])
    routing = route_tiles(routed.ids, params.num_experts, plan.block_m, num_arrivals)
    h_RI = layer0.gather_gemm_act(
        x_TH, weights_TA, routing, params, math, plan.layer0, top_k, saved if save else None
    )
    return Hidden(routing, h_RI, saved, weights_TA)


def with_dense_biases(params: ExpertParams) -> ExpertParams:
    """Return `params` with contiguous biases: the kernels know one stride for all, that of L."""
    biases = {name: getattr(params, name) for name in ("b_in", "b_up", "b_out")}
    strided = {
        name: bias.contiguous()
        for name, bias in biases.items()
        if bias is not None and not bias.is_contiguous()
    }
    return dataclasses.replace(params, **strided) if strided else params
