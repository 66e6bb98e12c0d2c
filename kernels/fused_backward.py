"""The fused backward of the local form: every gradient that is asked for.

Legend: T tokens, A experts per token, S = T*A slots, R tile rows, L experts, H model dim, I expert
intermediate dim, N columns of the in-projection, P parts of a sum.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from comet_compile.kernels import grad_params, grad_routing, layer0, layer1, layer_backward
from comet_compile.kernels.experts import ExpertParams, LayerMath, Matrices, Needs
from comet_compile.kernels.fused import with_dense_biases
from comet_compile.kernels.launch_log import release
from comet_compile.kernels.plan import Plan
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.route_tiles import TileRouting, max_tiles, route_tiles


def local_backward(
    grad_y: Tensor,
    routed: Routed,
    saved_SN: Tensor | None,
    params: ExpertParams,
    math: LayerMath,
    needs: Needs,
    plan: Plan,
    into: Matrices | None = None,
    *,
    frees: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return (d_x, d_weights, d_w_in, d_w_up, d_w_out, d_b_in, d_b_up, d_b_out).

    What `needs` does not ask for, or whose input is None, is None. `saved_SN` are the rows in front
    of the activation as `fused.local_forward` saved them; None has them computed again. With
    `frees`, their memory is given back when they have been read. The gradients of matrices are
    added to `into` if given, and None here.
    """
    x_TH = routed.x if routed.x.stride(1) == 1 else routed.x.contiguous()
    num_tiles = max_tiles(routed.ids.numel(), params.num_experts, plan.block_m)
    arrivals0 = plan.layer0.num_arrivals(num_tiles, params.w_out.shape[1])
    grad_TH = grad_y.to(x_TH.dtype)
    call = Call(
        x_TH=x_TH,
        grad_TH=grad_TH if grad_TH.stride(1) == 1 else grad_TH.contiguous(),
        weights_TA=None if routed.weights is None else routed.weights.contiguous(),
        routing=route_tiles(
            routed.ids,
            params.num_experts,
            plan.block_m,
            arrivals0 + num_arrivals(routed.ids.numel(), params, plan),
        ),
        top_k=routed.ids.shape[1],
        params=params,
        math=math,
        needs=needs,
        plan=plan,
        gathered=plan.gathers,
        into=into,
    )
    # what is large is let go of as soon as it has been used
    if saved_SN is None:
        frees = False
        saved_SN, wh_RI = call.compute_again()
    else:
        wh_RI = None
    grads = call.gather_grads()
    d_pre_RN, wh_RI, d_w = call.grad_hidden(grads, saved_SN, call.routing.arrive[arrivals0:], wh_RI)
    if frees:
        release(saved_SN)
    del saved_SN
    d_biases = call.grad_biases(d_pre_RN, grads)
    d_w_out = call.grad_out_projection(grads, wh_RI)
    del wh_RI
    # from here on the memory of the gradients' rows is free, and is taken twice
    rows_RH = grads if call.gathered else None
    d_w_in, d_w_up = call.grad_in_projections(d_pre_RN, rows_RH)
    d_x, d_w_before = call.grad_tokens(d_pre_RN, rows_RH)
    d_weights = call.grad_scores(d_w if d_w_before is None else d_w_before)
    return d_x, d_weights, d_w_in, d_w_up, d_w_out, *d_biases


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
    into: Matrices | None = None

    def weights_at(self, *places: str) -> Tensor | None:
        """Return the routing weights [T, A] if they multiply at one of `places`."""
        return self.weights_TA if self.math.weight_place in places else None

    def gather_grads(self) -> Tensor:
        """Return the gradient of y in the order of the experts [R, H] if the plan says so."""
        if not self.gathered:
            return self.grad_TH
        return layer_backward.gather_rows(self.grad_TH, self.routing, self.top_k)

    def compute_again(self) -> tuple[Tensor, Tensor]:
        """Return the rows in front of the activation [S, N], and memory [R, I]."""
        saved_SN = self.x_TH.new_empty(self.routing.row_S.shape[0], self.params.in_columns)
        h_RI = layer0.gather_gemm_act(
            self.x_TH, self.weights_TA, self.routing, with_dense_biases(self.params), self.math,
            self.plan.layer0, self.top_k, saved_SN,
        )  # fmt: skip
        return saved_SN, h_RI

    def grad_hidden(
        self, grads: Tensor, saved_SN: Tensor, arrive: Tensor, wh_RI: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return (d_pre [R, N], wh [R, I], d_w parts) of `layer_backward.grad_hidden`.

        wh is None where the gradient of w_out is not asked for, else in the memory given, if any.
        """
        if not self.needs.w_out:
            wh_RI = None
        elif wh_RI is None:
            wh_RI = saved_SN.new_empty(self.routing.slot_R.shape[0], self.params.w_out.shape[1])
        d_pre_RN, d_w_PR = layer_backward.grad_hidden(
            grads,
            saved_SN,
            self.weights_at("between", "after"),
            self.routing,
            self.params,
            self.math,
            self.plan.grad_hidden,
            self.top_k,
            gathered=self.gathered,
            arrive=arrive,
            wh_RI=wh_RI,
        )
        return d_pre_RN, wh_RI, d_w_PR

    def grad_tokens(
        self, d_pre_RN: Tensor, rows_RH: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (d_x [T, H], d_w [1, R] of weights that multiply before, else None).

        `rows_RH`: memory [R, H] to use.
        """
        before_TA = self.weights_at("before")
        d_x = d_w_PR = None
        if self.needs.weights and before_TA is not None:
            d_w_PR = d_pre_RN.new_empty(1, d_pre_RN.shape[0], dtype=torch.float32)
        if not self.needs.x and d_w_PR is None:
            return None, None
        parts = []
        for index, (rows, weight) in enumerate(self._in_projections(d_pre_RN)):
            part_RH = layer1.gemm_rows(
                rows, weight.transpose(1, 2), None, self.routing, self.plan.layer1,
                rows_RH if index == 0 else None,
            )  # fmt: skip
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

    def grad_in_projections(
        self, d_pre_RN: Tensor, rows_RH: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of w_in and w_up; `rows_RH`: memory [R, H] to use."""
        needed = (self.needs.w_in, self.needs.w_up and self.params.w_up is not None)
        if needed == (False, False):
            return None, None
        before_TA = self.weights_at("before")
        # multiplied in the GEMM, the tokens would pass through registers
        gathered = self.gathered or before_TA is not None
        tokens = self.x_TH
        if gathered:
            tokens = layer_backward.gather_rows(
                self.x_TH, self.routing, self.top_k, before_TA, rows_RH
            )
        grads: list[Tensor | None] = [None, None]
        for index, (rows, weight) in enumerate(self._in_projections(d_pre_RN)):
            if needed[index]:
                into = self._into("w_up" if index else "w_in")
                grads[index] = self._grad_matrix(tokens, rows, weight, into, gathered=gathered)
        return grads[0], grads[1]

    def grad_out_projection(self, grads: Tensor, wh_RI: Tensor | None) -> Tensor | None:
        """Return the gradient of w_out; `grads` is the gradient of y, or its rows."""
        if wh_RI is None:
            return None
        into = self._into("w_out")
        return self._grad_matrix(
            grads, wh_RI, self.params.w_out, into, gathered=self.gathered, flipped=True
        )

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

    def _into(self, name: str) -> Tensor | None:
        return None if self.into is None else getattr(self.into, name)

    def _grad_matrix(
        self,
        tokens: Tensor,
        rows: Tensor,
        weight: Tensor,
        into: Tensor | None,
        *,
        gathered: bool,
        flipped: bool = False,
    ) -> Tensor | None:
        """Return the gradient of `weight`, None if it was added to `into`.

        `flipped`: the rows' columns are the first dimension of the matrices.
        """
        total = torch.empty_like(weight) if into is None else into
        grad_params.grad_weight(
            tokens,
            rows,
            total.transpose(1, 2) if flipped else total,
            self.routing,
            self.plan.grad_weight,
            self.top_k,
            gathered=gathered,
            add=into is not None,
        )
        return total if into is None else None
