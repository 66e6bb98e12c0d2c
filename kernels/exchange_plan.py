"""How an exchange between ranks runs: its capacity, its tiles, and who travels when.

Legend: T tokens, C capacity in tokens, A experts per token, P ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from comet_compile.kernels import cost_model, layer0, machine_file, tuned
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.launch import div_up, power_of_2
from comet_compile.kernels.plan import Plan, choose_plan, read_device
from comet_compile.kernels.route_tiles import max_tiles

# What a CTA fetches and computes in a second, with some to spare, on an H100 with NVLink. Only the
# ratio counts: how many own tiles fill the time in which the peers' tokens come.
_CTA_BYTES, _CTA_FLOPS = 8e9, 4.5e12
# CTAs that send beside the tiles lack more for tiles than they save: with 16 of 132, layer1 took
# 0.50 ms instead of 0.46 (Qwen3-30B), 4.4 instead of 3.8 (DeepSeek-V3), 2.8 instead of 2.7
# (Mixtral; 2 x H100, 8192 tokens a rank, benchmarks/results/kernels_ep_h100.json). So all send at
# the end.
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
    params: ExpertParams,
    math: LayerMath,
    top_k: int,
    capacity: int,
    num_ranks: int,
    index: int,
    *,
    use_tables: bool = True,
) -> ExchangePlan:
    """Return the plan for calls of at most `capacity` tokens per rank, the same on all ranks.

    `use_tables` says that all ranks have the same tuned plans and the same measured machine.
    """
    projection = layer0.view_in_projection(params, math.activation)
    assert projection is not None, "checked by fused.why_not"
    device = read_device(index)
    hidden, inter = params.w_in.shape[1], params.w_out.shape[1]
    gated, interleaved = math.activation.gated, projection.mode == "interleaved"
    gemms = choose_plan(
        capacity * top_k,
        params.num_experts,
        hidden,
        inter,
        gated=gated,
        interleaved=interleaved,
        device=device,
    )
    peers_bytes = (num_ranks - 1) * capacity * hidden * params.w_in.element_size()
    flops = (4 if gated else 2) * capacity * top_k * hidden * inter
    num_fetchers = max(1, min(cost_model.USUAL_FETCHERS, device.num_sms // 4))
    machine = machine_file.machine_of(device, use_file=use_tables)
    if machine is not None and gated:
        load = cost_model.Load(
            hidden, inter, params.num_experts * num_ranks, top_k, (capacity,) * num_ranks
        )
        chosen = cost_model.choose_fetchers(load, machine, num_fetchers)
        if chosen != num_fetchers:
            num_fetchers = chosen
            gemms = dataclasses.replace(gemms, source="planned by the cost model")
    lead0 = _part(peers_bytes / num_fetchers, flops / device.num_sms)
    # own tiles for about two rounds: nobody then waits for the last of the others
    num_jobs = capacity * top_k // gemms.block_m * div_up(hidden, gemms.layer1.block_n)
    lead1 = min(0.25, 2 * device.num_sms / max(1, num_jobs))
    plan = ExchangePlan(gemms, capacity, num_fetchers, _NUM_SENDERS, (lead0, lead1))
    if not use_tables:
        return plan
    shape = tuned.Shape(
        num_ranks, tuned.bucket(capacity), top_k, params.num_experts, hidden, inter, gated,
        interleaved, params.w_in.element_size(),
    )  # fmt: skip
    return tuned.apply(plan, shape, device)


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


def row_bytes(
    params: ExpertParams, capacity: int, top_k: int, num_ranks: int, *, backward: bool = False
) -> int:
    """Return the bytes of all rows, if all tokens chose this rank.

    Forward: h and the experts' outputs. Backward: also the rows in front of the activation, their
    gradients, h times its weight, and tokens or their gradients in the order of the experts.
    """
    slots = capacity * top_k * num_ranks
    hidden, inter = params.w_in.shape[1], params.w_out.shape[1]
    columns = hidden + inter
    if backward:
        columns += inter + 2 * params.in_columns + hidden
    return slots * columns * params.w_in.element_size()


def max_rows(params: ExpertParams, capacity: int, top_k: int, num_ranks: int, block_m: int) -> int:
    """Return how many tile rows a rank can have."""
    return max_tiles(capacity * top_k * num_ranks, params.num_experts, block_m) * block_m
