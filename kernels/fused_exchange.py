"""The fused path of the all-to-all form: dispatch, both GEMMs and combine over symmetric memory.

    publish -> receive routing -> tables -> layer0 (fetch + GEMM + activation)
            -> layer1 (GEMM + sums to their owners) -> sum own

No host read in here, no collective: ranks meet in the kernels' waits only, so a CUDA graph can hold
a call. A backward comes in parts, so that its caller may read in between how many rows there are
(`exchange_paths`). The stages are those of `exchange_call`.

Legend: T tokens, C capacity in tokens, A experts per token, P ranks, S = P*C*A slots, R tile rows,
H model dim, I expert intermediate dim, N columns of the in-projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comet_compile.kernels import fused_backward, grad_routing
from comet_compile.kernels.exchange_call import ExchangeCall
from comet_compile.kernels.exchange_entry import Tables
from comet_compile.kernels.exchange_plan import ExchangePlan
from comet_compile.kernels.experts import ExpertParams, LayerMath, Matrices, Needs
from comet_compile.kernels.grad_routing import push_scores_kernel, sum_scores_kernel
from comet_compile.kernels.launch import div_up, full_grid, launch
from comet_compile.kernels.launch_log import release
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.workspace import Workspace


def all_to_all_forward(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    plan: ExchangePlan,
    workspace: Workspace,
    deadline: float,
    out_TH: Tensor,
    saved_SN: Tensor | None = None,
) -> tuple[()]:
    """Write y [T, H] for tokens sharded over the group, expert e on group rank ``e // L``.

    `saved_SN` is given the rows in front of the activation as by `layer0.gather_gemm_act`, as many
    as find room. `deadline` is in seconds. Returns nothing, as `recording.replay` wants it.
    """
    call = ExchangeCall(routed, params, math, plan, workspace, deadline)
    call.publish()
    call.receive()
    call.sum_own(call.combine(call.compute_hidden(saved_SN)), out_TH)
    return ()


def begin_backward(
    grad_y: Tensor,
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    needs: Needs,
    plan: ExchangePlan,
    workspace: Workspace,
    deadline: float,
) -> tuple[Tensor | None, ...]:
    """Begin a backward; return its tables, as `Tables.tensors`, for `all_to_all_backward`."""
    call = BackwardCall(grad_y, routed, params, math, needs, plan, workspace, deadline)
    call.publish()
    call.receive()
    return call.tables.tensors()


def fetch_for_saved(
    grad_y: Tensor,
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    needs: Needs,
    plan: ExchangePlan,
    workspace: Workspace,
    deadline: float,
    tables: tuple[Tensor | None, ...],
) -> tuple[()]:
    """Fetch what a backward with saved rows needs of the peers; returns nothing."""
    call = BackwardCall(grad_y, routed, params, math, needs, plan, workspace, deadline)
    call.take(Tables.of(tables))
    call.fetch_for_saved()
    return ()


def all_to_all_backward(
    grad_y: Tensor,
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    needs: Needs,
    plan: ExchangePlan,
    workspace: Workspace,
    deadline: float,
    tables: tuple[Tensor | None, ...],
    num_rows: int | None = None,
    saved_SN: Tensor | None = None,
    into: Matrices | None = None,
    *,
    is_fetched: bool = False,
    frees: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return (d_x, d_weights, d_w_in, d_w_up, d_w_out, d_b_in, d_b_up, d_b_out).

    What `needs` does not ask for, or whose input is None, is None; d_x must be asked for.
    `num_rows`: how many there is memory for, by default as many as any routing can need.
    `saved_SN`: what the forward was given under that name; None has the rows computed again.
    `is_fetched`: by `fetch_for_saved`. With `frees`, the rows' memory is given back when they have
    been read. The gradients of matrices are added to `into` if given, and None here. All of these
    are each rank's own affair.
    """
    call = BackwardCall(
        grad_y, routed, params, math, needs, plan, workspace, deadline,
        saved_SN=saved_SN, is_fetched=is_fetched, frees=frees, into=into,
    )  # fmt: skip
    call.take(Tables.of(tables), num_rows)
    call.compute()
    return call.finish()


class BackwardCall(ExchangeCall):
    """The stages of one backward on one rank.

    Tokens and the gradients of y are fetched, while the rows in front of the activation are
    computed again if they were not saved; from then on it is the local backward on P*C tokens. The
    gradients of the tokens travel while those of w_in are computed.
    """

    def __init__(
        self,
        grad_y: Tensor,
        routed: Routed,
        params: ExpertParams,
        math: LayerMath,
        needs: Needs,
        plan: ExchangePlan,
        workspace: Workspace,
        deadline: float,
        *,
        saved_SN: Tensor | None = None,
        is_fetched: bool = False,
        frees: bool = False,
        into: Matrices | None = None,
        clock: bool = True,
    ) -> None:
        super().__init__(
            routed, params, math, plan, workspace, deadline,
            grad_y=grad_y, clock=clock,
        )  # fmt: skip
        self.needs, self.saved_SN, self.into = needs, saved_SN, into
        self.is_fetched, self.frees = is_fetched, frees and saved_SN is not None
        self.needs_weights = needs.weights and self.weights is not None
        self.weights_dtype = None if routed.weights is None else routed.weights.dtype
        self.scores = workspace.view(
            self.layout.scores, (self.num_ranks, self.capacity * self.top_k), torch.float32
        )

    def num_more_arrivals(self) -> int:
        """Return how many counters grad_hidden takes."""
        return fused_backward.num_arrivals(self.ids_S.shape[0], self.params, self.plan.gemms)

    def compute(self) -> None:
        """Compute all gradients; every peer has been sent those of its tokens and weights."""
        params, plan = self.params, self.plan.gemms
        assert self.grads is not None
        weights_TA = None if self.weights_S is None else self.weights_S.view(-1, self.top_k)
        local = fused_backward.Call(
            x_TH=self.tokens.view(-1, self.hidden),
            grad_TH=self.grads.view(-1, self.hidden),
            weights_TA=weights_TA,
            routing=self.routing,
            top_k=self.top_k,
            params=params,
            math=self.math,
            needs=self.needs,
            plan=plan,
            gathered=plan.gathers,
            into=self.into,
        )
        # what is large is let go of as soon as it has been used
        saved_SN, wh_RI = self._rows(local)
        grads = local.gather_grads()
        d_pre_RN, wh_RI, d_w_PR = local.grad_hidden(grads, saved_SN, self.more_arrive, wh_RI)
        if self.frees:
            release(saved_SN)
        del saved_SN
        d_biases = local.grad_biases(d_pre_RN, grads)
        d_w_out = local.grad_out_projection(grads, wh_RI)
        del wh_RI, grads
        self.rows_RH = self.multiply_and_send(
            d_pre_RN,
            params.w_in.transpose(1, 2),
            None if params.w_up is None else params.w_up.transpose(1, 2),
            None,
            self._weights_before(),
        )
        if self.needs_weights:
            if self.math.weight_place == "before":
                d_w_PR = d_w_PR.new_empty(1, self.rows_RH.shape[0])
                grad_routing.dot_tokens(
                    local.x_TH, self.rows_RH, d_w_PR[0], self.routing, self.top_k
                )
            d_w_TA = local.grad_scores(d_w_PR)
            assert d_w_TA is not None
            self._push_scores(d_w_TA)
        # the tokens' gradients are on their way
        d_w_in, d_w_up = local.grad_in_projections(d_pre_RN, None)
        self.param_grads = (d_w_in, d_w_up, d_w_out, *d_biases)

    def finish(self) -> tuple[Tensor | None, ...]:
        """Return the gradients; those of tokens and weights have what the peers sent."""
        d_weights = self._sum_scores() if self.needs_weights else None
        d_x_TH = self.x.new_empty(self.num_tokens, self.hidden)
        self.sum_and_end(self.rows_RH, self._weights_before(), d_x_TH)
        return d_x_TH, d_weights, *self.param_grads

    def fetch_for_saved(self) -> None:
        """Fetch what a call with saved rows needs of the peers."""
        dots = self.needs_weights and self.math.weight_place == "before"
        self.fetch(tokens=self.needs.w_in or self.needs.w_up or dots)

    def _rows(self, local: fused_backward.Call) -> tuple[Tensor, Tensor | None]:
        """Fetch; return the rows in front of the activation, and memory [R, I] if there is some."""
        if self.saved_SN is not None:
            if not self.is_fetched:
                self.fetch_for_saved()
            return self.saved_SN, None
        num_rows = min(self.ids_S.shape[0], self.routing.slot_R.shape[0])
        saved_SN = self.x.new_empty(num_rows, self.params.in_columns)
        return saved_SN, self.compute_hidden(saved_SN)

    def _weights_before(self) -> Tensor | None:
        return self.weights_S if self.math.weight_place == "before" else None

    def _push_scores(self, d_w_TA: Tensor) -> None:
        """Send every rank the gradients of its tokens' routing weights that arise here."""
        ws, num_slots = self.workspace, self.capacity * self.top_k
        launch(
            push_scores_kernel,
            full_grid(div_up(num_slots, 1024), self.num_ranks),
            d_w_TA,
            self.num_tokens_P,
            ws.peers,
            self.layout.scores,
            ws.SCORED,
            ws.scored,
            ws.epoch,
            ws.abort,
            ws.rank,
            num_slots,
            A=self.top_k,
            P=self.num_ranks,
            BLOCK=1024,
            num_warps=4,
        )

    def _sum_scores(self) -> Tensor:
        """Return d_weights [T, A]."""
        ws, num_slots = self.workspace, self.num_tokens * self.top_k
        out_TA = self.x.new_empty(self.num_tokens, self.top_k, dtype=self.weights_dtype)
        launch(
            sum_scores_kernel,
            full_grid(max(1, div_up(num_slots, 1024))),
            self.scores,
            ws.flags(ws.SCORED),
            out_TA,
            ws.epoch,
            *self.waits,
            num_slots,
            ws.rank,
            self.capacity * self.top_k,
            P=self.num_ranks,
            BLOCK=1024,
            CLOCK=self.clock,
            num_warps=4,
        )
        return out_TA
