"""The fused backward of the local form: the rows again, then every gradient that is asked for.

Legend: T tokens, A experts per token, S = T*A slots, R tile rows, L experts, H model dim, I expert
intermediate dim, N columns of the in-projection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import torch
from torch import Tensor

from comet_compile.kernels import grad_params, grad_routing, layer1, layer_backward
from comet_compile.kernels.experts import ExpertParams, LayerMath, Needs
from comet_compile.kernels.plan import GemmTiles, Plan
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.route_tiles import TileRouting, route_tiles


def why_not(params: ExpertParams, math: LayerMath, has_rows: bool) -> str | None:
    """Return why the fused backward cannot run where the fused forward can, None if it can."""
    if not has_rows:
        return "the forward kept no rows"
    if any(bias is not None for bias in (params.b_in, params.b_up, params.b_out)):
        return "the experts have biases"
    if math.weight_place == "before":
        return "routing weights multiply before the experts"
    return None


def local_backward(
    grad_y: Tensor,
    routed: Routed,
    saved: Tensor,
    params: ExpertParams,
    math: LayerMath,
    needs: Needs,
    plan: Plan,
    key: Hashable | None = None,
    *,
    gathered: bool | None = None,
) -> tuple[Tensor | None, ...]:
    """Return (d_x, d_weights, d_w_in, d_w_up, d_w_out, None, None, None), None if not needed."""
    x_TH = routed.x if routed.x.stride(1) == 1 else routed.x.contiguous()
    grad_TH = grad_y.to(x_TH.dtype)
    grad_TH = grad_TH if grad_TH.stride(1) == 1 else grad_TH.contiguous()
    weights_TA = None if routed.weights is None else routed.weights.contiguous()
    num_tokens, top_k = routed.ids.shape
    inter = params.w_out.shape[1]

    routing = route_tiles(routed.ids, params.num_experts, plan.block_m, key)
    gathered = gathers(plan) if gathered is None else gathered
    grads = x_rows = None
    if gathered:
        grads = layer_backward.gather_rows(grad_TH, routing, top_k, key)
        if needs.w_in or needs.w_up:
            x_rows = layer_backward.gather_rows(x_TH, routing, top_k, (key, "x") if key else None)
    grads = grad_TH if grads is None else grads
    x_rows = x_TH if x_rows is None else x_rows
    d_pre_RN, wh_RI, d_w = layer_backward.grad_hidden(
        grads,
        saved,
        weights_TA,
        routing,
        params,
        math,
        hidden_tiles(plan),
        top_k,
        gathered=gathered,
        key=key,
    )
    d_x = d_weights = d_w_in = d_w_up = d_w_out = None
    if needs.weights and routed.weights is not None:
        d_w_S = grad_routing.grad_scores(d_w, routing.row_S, routed.weights.dtype, key)
        d_weights = d_w_S.view(num_tokens, top_k)
    if needs.x:
        d_x = _grad_tokens(d_pre_RN, routing, params, plan.layer1, (num_tokens, top_k), x_TH, key)

    tiles = weight_tiles(plan)

    def weight(tokens: Tensor, rows: Tensor, param: Tensor, *, swap: bool = False) -> Tensor:
        out = torch.empty_like(param)
        as_hidden_first = out.transpose(1, 2) if swap else out
        grad_params.grad_weight(
            tokens, rows, as_hidden_first, routing, tiles, top_k, gathered=gathered, key=key
        )
        return out

    if needs.w_in:
        first = d_pre_RN if params.w_up is None else d_pre_RN[:, :inter]
        d_w_in = weight(x_rows, first, params.w_in)
    if needs.w_up and params.w_up is not None:
        d_w_up = weight(x_rows, d_pre_RN[:, inter:], params.w_up)
    if needs.w_out:
        d_w_out = weight(grads, wh_RI, params.w_out, swap=True)
    return d_x, d_weights, d_w_in, d_w_up, d_w_out, None, None, None


def gathers(plan: Plan) -> bool:
    """Whether tokens are brought into the experts' order once, and not row by row in each GEMM."""
    return False


def hidden_tiles(plan: Plan) -> GemmTiles:
    """Return the tiling of grad_hidden: narrower than layer1's, for its epilogue's registers."""
    block_n = max(64, min(128, plan.layer1.block_n))
    stages = plan.layer1.num_stages + (1 if block_n < plan.layer1.block_n else 0)
    return dataclasses.replace(plan.layer1, block_n=block_n, num_stages=stages)


def weight_tiles(plan: Plan) -> GemmTiles:
    """Return the tiling of the weight gradients, whatever the rows' tiles are.

    Two programs of four warps share a multiprocessor: one loads while the other multiplies.
    """
    return dataclasses.replace(
        plan.layer1,
        block_m=128,
        block_n=128,
        block_k=64,
        num_warps=4,
        num_stages=3,
        num_programs=2 * plan.num_sms,
    )


def _grad_tokens(
    d_pre_RN: Tensor,
    routing: TileRouting,
    params: ExpertParams,
    tiles: GemmTiles,
    shape_TA: tuple[int, int],
    x_TH: Tensor,
    key: Hashable | None,
) -> Tensor:
    """Return d_x [T, H]."""
    inter = params.w_out.shape[1]
    pairs = [(d_pre_RN, params.w_in)]
    if params.w_up is not None:
        pairs = [(d_pre_RN[:, :inter], params.w_in), (d_pre_RN[:, inter:], params.w_up)]
    total = None
    for index, (rows, weight) in enumerate(pairs):
        part_key = None if key is None else (key, "d_x", index)
        out_RH = layer1.gemm_rows(rows, weight.transpose(1, 2), None, routing, tiles, part_key)
        part = layer1.sum_slots(
            out_RH,
            routing.row_S,
            None,
            shape_TA,
            torch.float32,
            x_TH.dtype if len(pairs) == 1 else torch.float32,
            part_key,
        )
        total = part if total is None else total + part
    assert total is not None
    return total.to(x_TH.dtype)
