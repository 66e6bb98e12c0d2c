"""The fused backward of the local form: the rows again, then every gradient that is asked for.

Legend: T tokens, A experts per token, S = T*A slots, R tile rows, L experts, H model dim, I expert
intermediate dim, N columns of the in-projection, P parts of a sum.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from comet_compile.kernels import grad_params, grad_routing, layer1, layer_backward
from comet_compile.kernels.experts import ExpertParams, LayerMath, Needs
from comet_compile.kernels.plan import Plan
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.route_tiles import TileRouting, max_tiles, route_tiles


def why_not(params: ExpertParams, math: LayerMath, has_rows: bool) -> str | None:
    """Return why the fused backward cannot run where the fused forward can, None if it can."""
    return None if has_rows else "the forward kept no rows"


def local_backward(
    grad_y: Tensor,
    routed: Routed,
    saved: Tensor,
    params: ExpertParams,
    math: LayerMath,
    needs: Needs,
    plan: Plan,
) -> tuple[Tensor | None, ...]:
    """Return (d_x, d_weights, d_w_in, d_w_up, d_w_out, d_b_in, d_b_up, d_b_out).

    What `needs` does not ask for, or whose input is None, is None.
    """
    x_TH = routed.x if routed.x.stride(1) == 1 else routed.x.contiguous()
    grad_TH = grad_y.to(x_TH.dtype)
    call = Call(
        x_TH=x_TH,
        grad_TH=grad_TH if grad_TH.stride(1) == 1 else grad_TH.contiguous(),
        weights_TA=None if routed.weights is None else routed.weights.contiguous(),
        routing=route_tiles(
            routed.ids,
            params.num_experts,
            plan.block_m,
            num_arrivals(routed.ids.numel(), params, plan),
        ),
        top_k=routed.ids.shape[1],
        params=params,
        math=math,
        needs=needs,
        plan=plan,
        gathered=plan.gathers,
    )
    grads = call.gather(call.grad_TH) if call.gathered else call.grad_TH
    d_pre_RN, wh_RI, d_w = layer_backward.grad_hidden(
        grads,
        saved,
        call.weights_at("between", "after"),
        call.routing,
        params,
        math,
        plan.grad_hidden,
        call.top_k,
        gathered=call.gathered,
        arrive=call.routing.arrive,
    )
    d_x, d_w_before = call.grad_tokens(d_pre_RN)
    d_weights = call.grad_scores(d_w if d_w_before is None else d_w_before)
    matrices = call.grad_matrices(d_pre_RN, wh_RI, grads)
    return d_x, d_weights, *matrices, *call.grad_biases(d_pre_RN, grads)


def num_arrivals(num_slots: int, params: ExpertParams, plan: Plan) -> int:
    """Return how many counters grad_hidden takes for so many slots."""
    num_tiles = max_tiles(num_slots, params.num_experts, plan.block_m)
    return plan.grad_hidden.num_arrivals(num_tiles, params.w_out.shape[1])


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One backward: its tensors in strides that the kernels take, and how it runs."""

    x_TH: Tensor
    grad_TH: Tensor
    weights_TA: Tensor | None
    routing: TileRouting
    top_k: int
    params: ExpertParams
    math: LayerMath
    needs: Needs
    plan: Plan
    gathered: bool

    def weights_at(self, *places: str) -> Tensor | None:
        """Return the routing weights [T, A] if they multiply at one of `places`."""
        return self.weights_TA if self.math.weight_place in places else None

    def gather(self, tokens_TH: Tensor, weights_TA: Tensor | None = None) -> Tensor:
        """Return [R, H], the tokens in the order of the experts."""
        return layer_backward.gather_rows(tokens_TH, self.routing, self.top_k, weights_TA)

    def grad_tokens(self, d_pre_RN: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (d_x [T, H], d_w [1, R] of weights that multiply before, else None)."""
        before_TA = self.weights_at("before")
        d_x = d_w_PR = None
        if self.needs.weights and before_TA is not None:
            d_w_PR = d_pre_RN.new_empty(1, d_pre_RN.shape[0], dtype=torch.float32)
        if not self.needs.x and d_w_PR is None:
            return None, None
        parts = []
        for index, (rows, weight) in enumerate(self._in_projections(d_pre_RN)):
            part_RH = layer1.gemm_rows(
                rows, weight.transpose(1, 2), None, self.routing, self.plan.layer1
            )
            if d_w_PR is not None:
                grad_routing.dot_tokens(
                    self.x_TH, part_RH, d_w_PR[0], self.routing, self.top_k, add=index > 0
                )
            parts.append(part_RH)
        if self.needs.x:
            d_x = layer1.sum_slots(
                parts[0],
                self.routing.row_S,
                before_TA,
                (self.x_TH.shape[0], self.top_k),
                torch.float32,
                self.x_TH.dtype,
                parts[1] if len(parts) == 2 else None,
            )
        return d_x, d_w_PR

    def grad_scores(self, d_w_PR: Tensor) -> Tensor | None:
        """Return d_weights [T, A], whose parts `d_w_PR` lack what b_out adds to them."""
        weights_TA, b_out = self.weights_TA, self.params.b_out
        if not self.needs.weights or weights_TA is None:
            return None
        if b_out is not None and self.math.weight_place == "after":
            grad_routing.dot_tokens(
                self.grad_TH,
                b_out if b_out.stride(1) == 1 else b_out.contiguous(),
                d_w_PR[0],
                self.routing,
                self.top_k,
                by_expert=True,
                add=True,
            )
        d_w_S = grad_routing.grad_scores(d_w_PR, self.routing.row_S, weights_TA.dtype)
        return d_w_S.view(weights_TA.shape)

    def grad_matrices(
        self, d_pre_RN: Tensor, wh_RI: Tensor, grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return (d_w_in, d_w_up, d_w_out); `grads` is the gradient of y, or its rows."""
        params, needs = self.params, self.needs
        wanted = (needs.w_in, needs.w_up and params.w_up is not None)
        first_two: list[Tensor | None] = [None, None]
        if any(wanted):
            before_TA = self.weights_at("before")
            # multiplied in the GEMM, the tokens would pass through registers
            gathered = self.gathered or before_TA is not None
            tokens = self.gather(self.x_TH, before_TA) if gathered else self.x_TH
            for index, (rows, weight) in enumerate(self._in_projections(d_pre_RN)):
                if wanted[index]:
                    first_two[index] = self._grad_matrix(tokens, rows, weight, gathered)
        d_w_out = None
        if needs.w_out:
            d_w_out = self._grad_matrix(grads, wh_RI, params.w_out, self.gathered, swap=True)
        return *first_two, d_w_out

    def grad_biases(self, d_pre_RN: Tensor, grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return (d_b_in, d_b_up, d_b_out); `grads` is the gradient of y, or its rows."""
        params, needs = self.params, self.needs
        inter = params.w_out.shape[1]

        def bias(
            name: str, rows: Tensor, weights_TA: Tensor | None = None, *, gathered: bool = True
        ) -> Tensor | None:
            param = getattr(params, name)
            if param is None or not getattr(needs, name):
                return None
            out = torch.empty_like(param)
            grad_params.grad_bias(
                rows,
                out,
                self.routing,
                self.top_k,
                weights_TA,
                gathered=gathered,
            )
            return out

        return (
            bias("b_in", d_pre_RN),
            bias("b_up", d_pre_RN[:, inter:]),
            bias("b_out", grads, self.weights_at("after"), gathered=self.gathered),
        )

    def _in_projections(self, d_pre_RN: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the gradient rows of w_in, and of w_up if there is one, each with its matrix."""
        w_in, w_up, inter = self.params.w_in, self.params.w_up, self.params.w_out.shape[1]
        if w_up is None:
            return [(d_pre_RN, w_in)]
        return [(d_pre_RN[:, :inter], w_in), (d_pre_RN[:, inter:], w_up)]

    def _grad_matrix(
        self, tokens: Tensor, rows: Tensor, param: Tensor, gathered: bool, *, swap: bool = False
    ) -> Tensor:
        out = torch.empty_like(param)
        grad_params.grad_weight(
            tokens,
            rows,
            out.transpose(1, 2) if swap else out,
            self.routing,
            self.plan.grad_weight,
            self.top_k,
            gathered=gathered,
        )
        return out
