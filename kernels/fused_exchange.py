"""The fused path of the all-to-all form: dispatch, both GEMMs and combine over symmetric memory.

    publish -> receive routing -> tables -> layer0 (fetch + GEMM + activation)
            -> layer1 (GEMM + sums to their owners) -> sum own

No host read, no collective: ranks meet in the kernels' waits only, so a CUDA graph can hold a call.

Legend: T tokens, C capacity in tokens, A experts per token, P ranks, L local experts, R tile rows,
H model dim, I expert intermediate dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from comet_compile.kernels import layer0
from comet_compile.kernels.exchange_kernels import (
    publish_tokens_kernel,
    receive_routing_kernel,
    sum_own_kernel,
)
from comet_compile.kernels.expert_weights import view_weight
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.fused import with_dense_biases
from comet_compile.kernels.launch import descriptor, div_up, full_grid, launch, power_of_2
from comet_compile.kernels.layer0_exchange import dispatch_gemm_act_kernel
from comet_compile.kernels.layer1 import TRITON_DTYPES
from comet_compile.kernels.layer1_exchange import gemm_combine_kernel
from comet_compile.kernels.plan import Plan, choose_plan, read_device
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.route_tiles import (
    count_bins,
    empty_routing,
    max_tiles,
    order_by_turn,
    place_slots,
    slots_per_block,
)
from comet_compile.kernels.workspace import Layout, Workspace

# Per second and CTA, with some to spare: 16 CTAs fetch rows of 4 KiB at 161 GB/s, the GEMMs run at
# 600 TF on 132 multiprocessors (2 x H100, NVLink, 2026-11-22).
_CTA_BYTES, _CTA_FLOPS = 8e9, 4.5e12
_NUM_FETCHERS = 24
# With 16 or 24 of 132 CTAs sending beside the tiles a layer took as long as with none (Qwen3-30B,
# 8192 tokens, 1.40 ms and 1.38): what they send meanwhile, their tiles cost. All send at the end.
_NUM_SENDERS = 0


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """A plan for both GEMMs, and how the tokens travel."""

    gemms: Plan
    capacity: int  # C
    num_fetchers: int  # CTAs of layer0 that fetch tokens
    num_senders: int  # CTAs of layer1 that send sums before they run out of tiles
    # parts of the tiles: own ones that layer0 computes first, and layer1 last
    lead: tuple[float, float]
    block_tokens: int = 64  # tokens of one arrival count

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for reports."""
        facts = dataclasses.asdict(self)
        return {**self.gemms.as_dict(), **{k: v for k, v in facts.items() if k != "gemms"}}


def plan_exchange(
    params: ExpertParams, math: LayerMath, top_k: int, capacity: int, num_ranks: int, index: int
) -> ExchangePlan:
    """Return the plan for calls of at most `capacity` tokens per rank, the same on all ranks."""
    projection = layer0.view_in_projection(params, math.activation)
    assert projection is not None, "checked by fused.why_not"
    device = read_device(index)
    gemms = choose_plan(
        capacity * top_k,
        params.num_experts,
        params.w_in.shape[1],
        params.w_out.shape[1],
        gated=math.activation.gated,
        wide=projection.mode != "halves" or projection.view.k_contiguous,
        device=device,
    )
    hidden, inter = params.w_in.shape[1], params.w_out.shape[1]
    peers_bytes = (num_ranks - 1) * capacity * hidden * params.w_in.element_size()
    flops = (4 if math.activation.gated else 2) * capacity * top_k * hidden * inter
    num_fetchers = max(1, min(_NUM_FETCHERS, device.num_sms // 4))
    lead0 = _part(peers_bytes / num_fetchers, flops / device.num_sms)
    # own tiles for about two rounds: nobody then waits for the last of the others
    num_jobs = capacity * top_k // gemms.block_m * div_up(hidden, gemms.layer1.block_n)
    lead1 = min(0.25, 2 * device.num_sms / max(1, num_jobs))
    return ExchangePlan(gemms, capacity, num_fetchers, _NUM_SENDERS, (lead0, lead1))


def _part(bytes_of_a_cta: float, flops_of_a_cta: float) -> float:
    """Return which part of a GEMM's time the transfer beside it takes."""
    if flops_of_a_cta == 0:
        return 0.0
    return min(1.0, bytes_of_a_cta / _CTA_BYTES / (flops_of_a_cta / _CTA_FLOPS))


def capacity_for(tokens: Sequence[int]) -> int:
    """Return C for ranks of these numbers of tokens: the most of them, and up to an eighth more.

    Rounded so that calls of similar sizes share a layout.
    """
    most = max(1, *tokens)
    step = max(64, power_of_2(most) // 8)
    return div_up(most, step) * step


def row_bytes(params: ExpertParams, capacity: int, top_k: int, num_ranks: int) -> int:
    """Return the bytes of h and of the experts' output rows, if all tokens chose this rank."""
    slots = capacity * top_k * num_ranks
    columns = params.w_in.shape[1] + params.w_out.shape[1]
    return slots * columns * params.w_in.element_size()


def all_to_all_forward(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    plan: ExchangePlan,
    workspace: Workspace,
    deadline: float,
    out_TH: Tensor,
) -> tuple[()]:
    """Write y [T, H] for tokens sharded over the group, expert e on group rank ``e // L``.

    `deadline` is in seconds. Returns nothing, as `recording.replay` wants it.
    """
    call = _Call(routed, params, math, plan, workspace, deadline)
    call.publish()
    call.receive()
    call.sum_own(call.combine(call.compute_hidden()), out_TH)
    return ()


class _Call:
    """The stages of one call. Each is a launch or two; a test runs them rank by rank."""

    def __init__(
        self,
        routed: Routed,
        params: ExpertParams,
        math: LayerMath,
        plan: ExchangePlan,
        workspace: Workspace,
        deadline: float,
        *,
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
            self.capacity, self.top_k, self.hidden, self.num_ranks, self.x.element_size()
        )
        ws, layout, rows = workspace, self.layout, (self.num_ranks, self.capacity, self.hidden)
        self.tokens = ws.view(layout.tokens, rows, self.x.dtype)
        self.sums = ws.view(layout.sums, rows, self.x.dtype)
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
            self.tokens,
            self.own_ids,
            self.own_weights,
            ws.view(ws.NUM_TOKENS, (1,), torch.int32),
            ws.peers,
            ws.READY,
            ws.published,
            ws.epoch,
            self.num_tokens,
            self.x.stride(0),
            ws.rank,
            A=self.top_k,
            E=self.params.num_experts * self.num_ranks,
            H=self.hidden,
            P=self.num_ranks,
            BT=block_t,
            BH=block_h,
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
            num_all, num_experts, gemms.block_m, self.x.device, num_arrivals
        )
        place_slots(self.ids_S, hist, num_experts, block, self.routing)
        self.order = order_by_turn(hist, num_experts, self.num_ranks, self.routing, self.plan.lead)

    def compute_hidden(self) -> Tensor:
        """Return h [R, I]: fetch the peers' tokens, multiply, activate."""
        ws, tiles, params, act = (
            self.workspace,
            self.plan.gemms.layer0,
            self.params,
            self.math.activation,
        )
        projection = layer0.view_in_projection(params, act)
        assert projection is not None, "checked by fused.why_not"
        inter = params.w_out.shape[1]
        routing = self.routing
        h_RI = self.x.new_empty(routing.slot_R.shape[0], inter)
        columns = 2 * tiles.block_n if projection.mode == "interleaved" else tiles.block_n
        scaled = self.weights_S is not None and self.math.weight_place != "after"
        first_bias, second_bias = layer0.bias_pointers(params, projection)
        block_h = power_of_2(self.hidden)
        launch(
            dispatch_gemm_act_kernel,
            full_grid(tiles.num_programs),
            self.tokens,
            projection.view.descriptor(columns, tiles.block_k),
            descriptor(h_RI, h_RI.shape, h_RI.stride(), (tiles.block_m, tiles.block_n)),
            routing.slot_R,
            routing.expert_M,
            routing.first_row_M,
            routing.num_tiles,
            self.weights_S if scaled else None,
            first_bias,
            second_bias,
            routing.arrive if tiles.paced else None,
            0 if params.b_in is None else params.b_in.stride(0),
            0.0 if act.alpha is None else act.alpha,
            0.0 if act.limit is None else act.limit,
            self.order.tile_2M[0],
            self.order.turn_2M[0],
            self.order.lead_2,
            ws.peers,
            self.layout.tokens,
            self.ids_S,
            self.num_tokens_P,
            ws.fetched,
            ws.epoch,
            *self.waits,
            ws.rank,
            self.plan.num_fetchers,
            self.capacity,
            TOP_K=self.top_k,
            H=self.hidden,
            I=inter,
            BM=tiles.block_m,
            BN=tiles.block_n,
            BK=tiles.block_k,
            GROUP_M=tiles.group_m,
            MODE=projection.mode,
            K_CONTIGUOUS=projection.view.k_contiguous,
            SWAPPED=projection.view.swapped,
            KIND=act.kind,
            GATED=act.gated,
            UP_FIRST=projection.up_first,
            CLAMP=act.limit is not None,
            SCALE=self.math.weight_place if scaled else "",
            L=params.num_experts,
            P=self.num_ranks,
            BT=self.plan.block_tokens,
            BH=block_h,
            ROWS=max(1, 16384 // block_h),
            CLOCK=self.clock,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        return h_RI

    def combine(self, h_RI: Tensor) -> Tensor:
        """Return the experts' output rows [R, H]; every peer has been sent its tokens' sums."""
        ws, tiles, routing, params = (
            self.workspace,
            self.plan.gemms.layer1,
            self.routing,
            self.params,
        )
        rows_RH = self.x.new_empty(h_RI.shape[0], self.hidden)
        view = view_weight(params.w_out)
        launch(
            gemm_combine_kernel,
            full_grid(tiles.num_programs),
            descriptor(h_RI, h_RI.shape, h_RI.stride(), (tiles.block_m, tiles.block_k)),
            view.descriptor(tiles.block_n, tiles.block_k),
            descriptor(rows_RH, rows_RH.shape, rows_RH.stride(), (tiles.block_m, tiles.block_n)),
            rows_RH,
            routing.expert_M,
            routing.num_tiles,
            params.b_out,
            0 if params.b_out is None else params.b_out.stride(0),
            self.order.tile_2M[1],
            self.order.turn_2M[1],
            self.order.lead_2[1:],
            routing.row_S,
            self._after(),
            self.num_tokens_P,
            ws.peers,
            self.layout.sums,
            ws.ARRIVED,
            ws.tasks,
            ws.done,
            ws.sent,
            ws.epoch,
            *self.waits,
            ws.rank,
            self.plan.num_senders,
            self.capacity,
            I=h_RI.shape[1],
            BM=tiles.block_m,
            BN=tiles.block_n,
            BK=tiles.block_k,
            GROUP_M=tiles.group_m,
            K_CONTIGUOUS=view.k_contiguous,
            STEPS=4,
            BULK=self.bulk,
            CLOCK=self.clock,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **self._sizes(32 * tiles.num_warps, 32 if tiles.num_warps == 8 else 8),
        )
        return rows_RH

    def sum_own(self, rows_RH: Tensor, out_TH: Tensor) -> None:
        """Write y [T, H]."""
        ws = self.workspace
        launch(
            sum_own_kernel,
            full_grid(4 * self.num_sms),
            rows_RH,
            self.routing.row_S,
            self._after(),
            self.sums,
            self.own_ids,
            ws.flags(ws.ARRIVED),
            out_TH,
            ws.summed,
            ws.epoch,
            *self.waits,
            self.num_tokens,
            ws.rank,
            self.capacity,
            L=self.params.num_experts,
            CLOCK=self.clock,
            num_warps=8,
            **self._sizes(256, 8),
        )

    def _after(self) -> Tensor | None:
        return self.weights_S if self.math.weight_place == "after" else None

    def _sizes(self, threads: int, elements: int) -> dict[str, Any]:
        """Constants of the kernels that sum rows, `elements` of a result for each thread."""
        block_h = min(8 * threads, power_of_2(self.hidden))
        return {
            "A": self.top_k,
            "H": self.hidden,
            "P": self.num_ranks,
            "BT": max(1, min(16, elements * threads // block_h)),
            "BH": block_h,
            "PRODUCT": TRITON_DTYPES[self.math.product_dtype],
        }
