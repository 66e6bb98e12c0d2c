"""The begin of a call between ranks: its views of symmetric memory, who sends what, the tables.

    publish -> receive (routing, tables); `exchange_call` goes on from there

Legend: T tokens, C capacity in tokens, A experts per token, P ranks, L local experts, S = P*C*A
slots, R tile rows, H model dim.
"""

from __future__ import annotations

import dataclasses

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
from comet_compile.kernels.tile_order import empty_order, order_by_turn
from comet_compile.kernels.workspace import Layout, Workspace


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """What a rank knows of the slots of all ranks, as memory to be handed from call to call."""

    slots: tuple[Tensor, Tensor | None, Tensor]  # ids [S], weights [S], numbers of tokens [P]
    routing: Tensor
    order: Tensor

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them; `of` takes them."""
        return *self.slots, self.routing, self.order

    @property
    def totals(self) -> Tensor:
        """[2] int32: the number of tiles, the number of slots that have a row."""
        return self.routing[:2]

    @classmethod
    def of(cls, tensors: tuple[Tensor | None, ...]) -> Tables:
        """Return the tables of `tensors`."""
        ids_S, weights_S, num_tokens_P, routing, order = tensors
        assert ids_S is not None
        assert num_tokens_P is not None
        assert routing is not None
        assert order is not None
        return cls((ids_S, weights_S, num_tokens_P), routing, order)


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
        self.x, self.ids, self.weights = routed.x, routed.ids, routed.weights
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
        self.grad_y, self.grads = grad_y, None
        if grad_y is not None:
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
        x, grad_y = _with_dense_rows(self.x), None
        if self.grad_y is not None:
            grad_y = _with_dense_rows(self.grad_y.to(x.dtype))
        launch(
            publish_tokens_kernel,
            full_grid(grid),
            x,
            self.ids.contiguous(),
            None if self.weights is None else self.weights.contiguous(),
            grad_y,
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
            x.stride(0),
            0 if grad_y is None else grad_y.stride(0),
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
        bins = count_bins(num_experts)
        self.take()
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
        place_slots(self.ids_S, hist, num_experts, block, self.routing)
        order_by_turn(hist, num_experts, self.num_ranks, self.routing, self.plan.lead, self.order)

    def take(self, tables: Tables | None = None, num_rows: int | None = None) -> None:
        """Have tables of this rank's experts, to be filled by `receive`, or those of `tables`.

        `num_rows`: how many rows to have room for; by default for any routing's.
        """
        num_experts, gemms, device = self.params.num_experts, self.plan.gemms, self.x.device
        num_all = self.num_ranks * self.capacity * self.top_k
        if tables is None:
            self.ids_S = self.own_ids.new_empty(num_all)
            self.weights_S = None if self.weights is None else self.own_weights.new_empty(num_all)
            self.num_tokens_P = self.own_ids.new_empty(self.num_ranks)
        else:
            self.ids_S, self.weights_S, self.num_tokens_P = tables.slots
        num_tiles = max_tiles(num_all, num_experts, gemms.block_m)
        num_arrivals = gemms.layer0.num_arrivals(num_tiles, self.params.w_out.shape[1])
        routing = empty_routing(
            num_all, num_experts, gemms.block_m, device, num_arrivals + self.num_more_arrivals(),
            None if tables is None else tables.routing,
        )  # fmt: skip
        self.routing = routing if num_rows is None else routing.with_rows(num_rows)
        self.more_arrive = routing.arrive[num_arrivals:]
        self.order = empty_order(
            num_experts, self.num_ranks, num_tiles, device, None if tables is None else tables.order
        )

    @property
    def tables(self) -> Tables:
        """What `receive` has found."""
        slots = self.ids_S, self.weights_S, self.num_tokens_P
        return Tables(slots, self.routing.memory, self.order.memory)

    def num_more_arrivals(self) -> int:
        """Return how many counters for pacing other GEMMs than layer0 take."""
        return 0


def _with_dense_rows(tokens: Tensor) -> Tensor:
    return tokens if tokens.stride(1) == 1 else tokens.contiguous()
