"""The begin of a call between ranks: its views of symmetric memory, who sends what, the tables.

    publish -> receive (routing, tables); `exchange_call` goes on from there

Legend: T tokens, C capacity in tokens, A experts per token, P ranks, L local experts, S = P*C*A
slots, R tile rows, H model dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comet_compile.kernels.exchange_kernels import publish_tokens_kernel, receive_routing_kernel
from comet_compile.kernels.exchange_plan import ExchangePlan
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.fused import with_dense_biases
from comet_compile.kernels.launch import div_up, full_grid, launch, power_of_2
from comet_compile.kernels.plan import read_device
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.route_tiles import (
    count_bins,
    empty_routing,
    max_tiles,
    place_slots,
    slots_per_block,
)
from comet_compile.kernels.tile_order import order_by_turn
from comet_compile.kernels.workspace import Layout, Workspace


class ExchangeEntry:
    """What a rank has and knows when the tokens are on their way."""

    def __init__(
        self,
        routed: Routed,
        params: ExpertParams,
        math: LayerMath,
        plan: ExchangePlan,
        workspace: Workspace,
        deadline: float,
        *,
        grad_y: Tensor | None = None,
        clock: bool = True,
    ) -> None:
        self.x = routed.x if routed.x.stride(1) == 1 else routed.x.contiguous()
        self.ids = routed.ids.contiguous()
        self.weights = None if routed.weights is None else routed.weights.contiguous()
        self.params = with_dense_biases(params)
        self.math, self.plan, self.workspace = math, plan, workspace
        self.clock = clock
        # before sm_90 a CTA stores its tiles itself
        self.bulk = clock and read_device(self.x.device.index or 0).capability >= (9, 0)
        self.deadline = int(deadline * 1e9) if clock else 1000
        self.num_tokens, self.top_k = routed.ids.shape
        self.hidden, self.num_ranks = params.w_in.shape[1], workspace.num_ranks
        self.num_sms = plan.gemms.layer0.num_programs
        self.capacity = plan.capacity
        assert self.num_tokens <= self.capacity, "capacity_for covers all ranks"
        self.layout = Layout.of(
            self.capacity,
            self.top_k,
            self.hidden,
            self.num_ranks,
            self.x.element_size(),
            backward=grad_y is not None,
        )
        ws, layout, rows = workspace, self.layout, (self.num_ranks, self.capacity, self.hidden)
        self.tokens = ws.view(layout.tokens, rows, self.x.dtype)
        self.sums = ws.view(layout.sums, rows, self.x.dtype)
        self.grad_y = self.grads = None
        if grad_y is not None:
            self.grad_y = grad_y if grad_y.stride(1) == 1 else grad_y.contiguous()
            self.grads = ws.view(layout.grads, rows, self.x.dtype)
        table = (self.capacity, self.top_k)
        self.own_ids = ws.view(layout.ids, table, torch.int32)
        self.own_weights = ws.view(layout.weights, table, torch.float32)
        self.waits = (ws.abort, ws.message, self.deadline)

    def publish(self) -> None:
        """Copy tokens and routing to where the peers read them."""
        ws = self.workspace
        block_h = min(1024, power_of_2(self.hidden))
        block_t = max(1, 8192 // block_h)
        grid = max(1, min(8 * self.num_sms, div_up(self.num_tokens, block_t)))
        launch(
            publish_tokens_kernel,
            full_grid(grid),
            self.x,
            self.ids,
            self.weights,
            self.grad_y,
            self.tokens,
            self.grads,
            self.own_ids,
            self.own_weights,
            ws.view(ws.NUM_TOKENS, (1,), torch.int32),
            ws.peers,
            ws.READY,
            ws.published,
            ws.epoch,
            self.num_tokens,
            self.x.stride(0),
            0 if self.grad_y is None else self.grad_y.stride(0),
            ws.rank,
            ws.trace,
            A=self.top_k,
            E=self.params.num_experts * self.num_ranks,
            H=self.hidden,
            P=self.num_ranks,
            BT=block_t,
            BH=block_h,
            CLOCK=self.clock,
            num_warps=8,
        )

    def receive(self) -> None:
        """Wait for the peers' routing and make the tables of this rank's experts."""
        ws, num_experts = self.workspace, self.params.num_experts
        num_slots = self.capacity * self.top_k
        # blocks must not straddle turns
        block = min(slots_per_block(num_slots), num_slots & -num_slots)
        blocks_per_turn = div_up(num_slots, block)
        num_all = self.num_ranks * num_slots
        bins = count_bins(num_experts)
        self.ids_S = self.own_ids.new_empty(num_all)
        self.weights_S = None if self.weights is None else self.own_weights.new_empty(num_all)
        self.num_tokens_P = self.own_ids.new_empty(self.num_ranks)
        hist = self.own_ids.new_empty(self.num_ranks * blocks_per_turn * bins)
        launch(
            receive_routing_kernel,
            full_grid(blocks_per_turn, self.num_ranks),
            ws.peers,
            self.layout.ids,
            self.layout.weights,
            ws.NUM_TOKENS,
            ws.flags(ws.READY),
            self.ids_S,
            self.weights_S,
            self.num_tokens_P,
            hist,
            ws.counters,
            ws.counters.shape[0],
            ws.epoch,
            *self.waits,
            ws.rank,
            blocks_per_turn,
            self.capacity,
            A=self.top_k,
            L=num_experts,
            P=self.num_ranks,
            E_P=bins,
            COUNTERS_P=power_of_2(ws.counters.shape[0]),
            BLOCK=block,
            CLOCK=self.clock,
            num_warps=4,
        )
        gemms = self.plan.gemms
        num_tiles = max_tiles(num_all, num_experts, gemms.block_m)
        num_arrivals = gemms.layer0.num_arrivals(num_tiles, self.params.w_out.shape[1])
        self.routing = empty_routing(
            num_all,
            num_experts,
            gemms.block_m,
            self.x.device,
            num_arrivals + self.num_more_arrivals(),
        )
        self.more_arrive = self.routing.arrive[num_arrivals:]
        place_slots(self.ids_S, hist, num_experts, block, self.routing)
        self.order = order_by_turn(hist, num_experts, self.num_ranks, self.routing, self.plan.lead)

    def num_more_arrivals(self) -> int:
        """Return how many counters for pacing other GEMMs than layer0 take."""
        return 0
