"""The fused exchange between ranks that are buffers of one process, in Triton's interpreter.

float16 only: bfloat16 goes wrong in the interpreter. What one process cannot show (waits that
others end, symmetric memory) is in `distributed/test_fused_exchange_gpu.py`.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from covering import covering
from exchange_ranks import Ranks, finish, order_tiles_ref
from fused_layers import math, params, routed, stored_pair
from moe_cases import Case
from numerics import assert_matches_ref
from torch import Tensor

from comet_compile.errors import PeerTimeoutError
from comet_compile.kernels import portable
from comet_compile.kernels.exchange_plan import capacity_for
from comet_compile.kernels.refs import moe_layer_ref
from comet_compile.kernels.route_tiles import (
    count_bins,
    empty_routing,
    place_slots,
)
from comet_compile.kernels.tile_order import empty_order, order_by_turn
from comet_compile.kernels.workspace import _FLAGS_BYTES, _MAX_RANKS, Layout, Workspace

pytestmark = pytest.mark.usefixtures("interpreted")


def check(ranks: Ranks, num_tokens: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Assert that every rank's y errs at most as `numerics` allows; return them."""
    layers = ranks.tokens(num_tokens, seed)
    results = ranks.run(layers)
    for rank, (y, layer) in enumerate(zip(results, layers, strict=True)):
        ranks.workspaces[rank].check()
        assert y.isfinite().all()
        assert_matches_ref(y, *expected(layer), what=f"y of rank {rank}")
    return results


def expected(layer: Case) -> tuple[Tensor, Tensor]:
    """(y in float64, y by the portable path) of one rank's tokens over all experts."""
    ref = moe_layer_ref(
        *layer.to(torch.float64).tensors(),
        activation=layer.activation,
        weight_place=layer.weight_place,
    )
    args = routed(layer), params(layer), math(layer)
    return ref, portable.local_forward(*args, layer.out_dtype)[0]


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [
        ((7,), 3, 2),  # alone
        ((7, 5), 2, 2),
        ((0, 6), 2, 1),
        ((0, 0), 2, 2),
        ((9, 0, 16), 3, 3),  # one has nothing, one as many as fit
        ((5, 1, 6, 3), 1, 2),
    ],
    ids=str,
)
def test_numbers_of_tokens(num_tokens: tuple[int, ...], num_experts: int, top_k: int) -> None:
    ranks = Ranks(len(num_tokens), num_experts=num_experts, top_k=top_k, biases=True)
    check(ranks, num_tokens)


@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize("product_dtype", [torch.float16, torch.float32])
def test_weight_places(weight_place: str, product_dtype: torch.dtype) -> None:
    ranks = Ranks(2, weight_place=weight_place, product_dtype=product_dtype, biases=True)
    check(ranks, (7, 5))


@pytest.mark.parametrize("weight_place", ["before", "after"])
def test_no_routing_weights(weight_place: str) -> None:
    check(Ranks(2, with_weights=False, weight_place=weight_place), (7, 5))


@pytest.mark.parametrize(
    "activation",
    ["silu_glu:up_first", "swiglu_oai:interleaved:alpha=1.702:limit=1.5", "relu2"],
)
@pytest.mark.parametrize("permuted", [False, True], ids=["n_contiguous", "k_contiguous"])
def test_activations(activation: str, permuted: bool) -> None:
    check(Ranks(2, activation=activation, permuted=permuted, biases=True), (7, 5))


@pytest.mark.parametrize("up_before", [False, True], ids=["in_memory_after", "in_memory_before"])
def test_separate_up(up_before: bool) -> None:
    ranks = Ranks(2, separate_up=True, biases=True)
    ranks.whole = stored_pair(ranks.whole, up_before)
    check(ranks, (7, 5))


@pytest.mark.parametrize(
    ("num_tokens", "lead"),
    [
        *itertools.product([(37, 40)], [(0.0, 0.0), (0.6, 0.0), (0.0, 0.6), (1.0, 1.0)]),
        # a rank without tokens, and more turns than two
        ((9, 0, 16), (0.6, 0.0)),
        ((9, 0, 16), (0.0, 0.6)),
        pytest.param((9, 0, 16), (0.0, 0.0), marks=pytest.mark.slow),
        pytest.param((9, 0, 16), (1.0, 1.0), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_parts_of_the_tiles_that_lead(
    num_tokens: tuple[int, ...], lead: tuple[float, float]
) -> None:
    check(Ranks(len(num_tokens), capacity=64, lead=lead), num_tokens)


@pytest.mark.parametrize("block_tokens", [2, 32])
def test_blocks_of_tokens(block_tokens: int) -> None:
    check(Ranks(2, capacity=64, block_tokens=block_tokens), (23, 40))


def test_calls_follow_each_other() -> None:
    ranks = Ranks(3, num_experts=1)
    first = check(ranks, (9, 0, 16))
    for seed, num_tokens in enumerate(((0, 16, 9), (16, 9, 0), (1, 1, 1)), start=1):
        check(ranks, num_tokens, seed)
    for y, again in zip(first, check(ranks, (9, 0, 16)), strict=True):
        assert torch.equal(y, again)
    for ws in ranks.workspaces:
        assert int(ws.epoch) == 5
        counters = (ws.abort, ws.published, ws.summed)
        assert not any(int(counter) for counter in counters)


def test_a_capacity_that_is_no_power_of_two() -> None:
    check(Ranks(2, capacity=24, top_k=3), (24, 20))


@pytest.mark.parametrize(
    ("num_turns", "routing", "lead"),
    covering([1, 2, 5], ["random", "one_expert", "late_only", "nowhere"], [0.0, 0.25, 0.5, 1.0]),
)
def test_order_of_tiles(num_turns: int, routing: str, lead: float) -> None:
    num_experts, block_m, block, blocks_per_turn = 5, 16, 16, 4
    slots_per_turn = block * blocks_per_turn
    generator = torch.Generator().manual_seed(num_turns)
    ids = torch.randint(0, num_experts + 1, (num_turns, slots_per_turn), generator=generator)
    if routing == "one_expert":
        ids[:] = 3
    elif routing == "late_only":
        ids[:-1] = num_experts
    elif routing == "nowhere":
        ids[:] = num_experts
    ids_S = ids.flatten().int()
    bins = count_bins(num_experts)
    hist = torch.stack(
        [torch.bincount(part, minlength=bins) for part in ids_S.view(-1, block)]
    ).int()
    tables = empty_routing(ids_S.numel(), num_experts, block_m, ids_S.device)
    place_slots(ids_S, hist.flatten(), num_experts, block, tables)
    leads = (lead, 1.0 - lead)
    order = empty_order(num_experts, num_turns, tables.expert_M.shape[0], ids_S.device)
    order_by_turn(hist.flatten(), num_experts, num_turns, tables, leads, order)

    num_tiles = int(tables.num_tiles)
    turn_S = [slot // slots_per_turn for slot in range(ids_S.numel())]
    for which, part in enumerate(leads):
        tiles = order.tile_2M[which, :num_tiles].tolist()
        turns = order.turn_2M[which, :num_tiles].tolist()
        wanted = order_tiles_ref(tables, turn_S, part, own_only=which == 1)
        assert list(zip(turns, tiles, strict=True)) == wanted
        lead_tiles = int(order.lead_2[which])
        assert lead_tiles <= num_tiles
        assert all(turn == 0 for turn, _ in wanted[:lead_tiles]) or which == 0
        assert which == 1 or num_tiles * part <= lead_tiles < num_tiles * part + 1
        if part == 0.0:
            assert tiles == list(range(num_tiles))
    assert (num_tiles == 0) == (routing == "nowhere")


def test_a_lost_peer_gives_nan_and_is_named() -> None:
    ranks = Ranks(3, num_experts=1)
    check(ranks, (4, 3, 2))
    calls = ranks.calls(ranks.tokens((4, 3, 2), 1))
    present = [call for call in calls if call.workspace.rank != 1]
    for call in present:
        call.publish()
    for call in present:
        call.receive()
    results = finish(present)
    for call, y in zip(present, results, strict=True):
        assert y.isnan().all()
        with pytest.raises(
            PeerTimeoutError,
            match=r"gave up waiting for group rank 1 in call 2 .*, phase dispatch.* \(flag at 1\)",
        ):
            call.workspace.check()
    ranks.workspaces[1].check()


def test_a_peer_lost_before_it_sends_its_sums() -> None:
    ranks = Ranks(2)
    calls = ranks.calls(ranks.tokens((4, 3)))
    for call in calls:
        call.publish()
    for call in calls:
        call.receive()
    (y,) = finish(calls[:1])
    assert y.isnan().all()
    with pytest.raises(PeerTimeoutError, match=r"group rank 1 in call 1 .*, phase combine"):
        ranks.workspaces[0].check()


def test_nothing_waits_after_a_lost_peer() -> None:
    ranks = Ranks(2)
    for seed in range(3):
        (call, _) = ranks.calls(ranks.tokens((4, 3), seed))
        call.publish()
        call.receive()
        (y,) = finish([call])
        assert y.isnan().all()
        # what went wrong first is what the user is told
        with pytest.raises(PeerTimeoutError, match=r"in call 1 .*, phase dispatch"):
            call.workspace.check()


@pytest.mark.parametrize("sizes", [(64, 2, 40, 2), (1, 1, 8, 1), (333, 8, 2880, 7)], ids=str)
def test_layout(sizes: tuple[int, int, int, int]) -> None:
    capacity, top_k, hidden, num_ranks = sizes
    layout = Layout.of(capacity, top_k, hidden, num_ranks, 2)
    rows, table = num_ranks * capacity * hidden * 2, capacity * top_k * 4
    ends = _FLAGS_BYTES
    for start, size in zip(dataclasses.astuple(layout), (rows, rows, table, table), strict=False):
        assert start % 256 == 0
        assert start >= ends
        ends = start + size
    assert layout.num_bytes >= ends


def test_flags_of_all_ranks_lie_in_front_of_the_buffers() -> None:
    flags = (Workspace.READY, Workspace.ARRIVED, Workspace.NUM_TOKENS)
    for start, end in zip(flags, (*flags[1:], _FLAGS_BYTES), strict=True):
        assert end - start >= 4 * (1 if start == Workspace.NUM_TOKENS else _MAX_RANKS)


@pytest.mark.parametrize(
    ("tokens", "capacity"),
    [
        ([0], 64),
        ([0, 0], 64),
        ([1, 64], 64),
        ([65, 3], 128),
        ([4096] * 8, 4096),
        ([4097, 1], 5120),
        ([5000, 5100], 5120),
    ],
    ids=str,
)
def test_capacity(tokens: list[int], capacity: int) -> None:
    assert capacity_for(tokens) == capacity


def test_capacities_are_few_and_close() -> None:
    capacities = {most: capacity_for([most, 1]) for most in range(1, 9000, 7)}
    for most, capacity in capacities.items():
        assert most <= capacity <= max(64, most + 64, most * 5 // 4)
    assert len(set(capacities.values())) < 50
