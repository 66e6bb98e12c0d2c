"""comet::moe_layer over gloo: every rank's outputs and gradients against the unsharded layer.

Starting processes costs seconds, so three start once, run everything in a group of three and in a
group of two of them, and the tests look at what came back.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.gloo import run_ranks
from moe_cases import GRAD_NAMES, Case, make_case, token_loop
from numerics import assert_matches_ref
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from comet_compile.errors import PeerTimeoutError, PlanMismatchError
from comet_compile.kernels import exchange, ops  # noqa: F401, ops registers the ops
from comet_compile.kernels.agreement import AGREEMENTS

LOCAL_EXPERTS = 3
# tokens of each rank, by the size of the group
TOKENS = {2: [7, 4], 3: [5, 0, 9]}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases_before": {"biases": True, "weight_place": "before"},
    "biases_between": {"biases": True, "weight_place": "between"},
    "biases_after": {"biases": True, "weight_place": "after"},
    "separate_up": {"separate_up": True, "biases": True},
    "interleaved": {"activation": "swiglu_oai:interleaved:alpha=1.702:limit=1.5"},
    "relu2_no_weights": {"activation": "relu2", "with_weights": False},
    "permuted_f32": {"permuted": True, "dtype": torch.float32},
    "bf16": {"permuted": True, "dtype": torch.bfloat16},
    "bf16_odd": {"hidden": 6, "inter": 5, "dtype": torch.bfloat16},
    "bf16_f32_weights": {
        "dtype": torch.bfloat16,
        "weights_dtype": torch.float32,
        "product_dtype": torch.float32,
    },
    "f32_out": {"dtype": torch.bfloat16, "out_dtype": torch.float32},
    "int32_ids": {"ids_dtype": torch.int32},
    "top_1": {"top_k": 1},
    "one_rank_receives_nothing": {"ids_to": "first_rank"},
    "all_to_one_expert": {"ids_to": "last_expert"},
    "every_id_out_of_range": {"ids_to": "nowhere"},
    "repeated_in_a_row": {"ids_to": "pairs"},
}
REPEATED = ("bf16", "permuted_f32", "biases_after")


def build_case(name: str, world_size: int) -> Case:
    """The whole group's layer."""
    options = dict(CASES[name])
    ids_to = options.pop("ids_to", None)
    num_experts = LOCAL_EXPERTS * world_size
    shape = (sum(TOKENS[world_size]), options.pop("top_k", 3))
    generator = torch.Generator().manual_seed(1)
    if ids_to == "first_rank":
        options["ids"] = torch.randint(0, LOCAL_EXPERTS, shape, generator=generator)
    elif ids_to == "last_expert":
        options["ids"] = torch.full(shape, num_experts - 1)
    elif ids_to == "nowhere":
        options["ids"] = torch.tensor([-1, num_experts, 2**40]).expand(shape).contiguous()
    elif ids_to == "pairs":
        ids = torch.randint(0, num_experts, (shape[0], 2), generator=generator)
        options["ids"] = ids[:, [0, 0, 1]]
    return make_case(
        **{"num_tokens": shape[0], "num_experts": num_experts, "top_k": shape[1], **options}
    )


def shard(case: Case, rank: int, world_size: int, form: str) -> Case:
    """The rank's part: its experts, and its tokens where those are sharded."""
    experts = slice(rank * LOCAL_EXPERTS, (rank + 1) * LOCAL_EXPERTS)
    first = sum(TOKENS[world_size][:rank])
    tokens = slice(first, first + TOKENS[world_size][rank])
    changes: dict[str, Any] = {}
    for name in ("w_in", "w_up", "w_out", "b_in", "b_up", "b_out"):
        value = getattr(case, name)
        changes[name] = None if value is None else value[experts]
    if form == "all_to_all":
        for name in ("x", "ids", "weights", "grad_y"):
            value = getattr(case, name)
            changes[name] = None if value is None else value[tokens]
    else:
        local = case.ids - rank * LOCAL_EXPERTS
        mine = (local >= 0) & (local < LOCAL_EXPERTS)
        changes["ids"] = torch.where(mine, local, LOCAL_EXPERTS)
    return dataclasses.replace(case, **changes)


def run_op(case: Case, form: str, group: dist.ProcessGroup, save: str = "nothing") -> list[Tensor]:
    """Return [y, gradients ...] of this rank."""
    where = {"form": form, "group_name": group.group_name}
    y, saved, token = torch.ops.comet.moe_layer(
        *case.tensors(), None, **case.options(), out_dtype=case.out_dtype, save=save, **where
    )
    assert token.shape == (1,)
    *grads, token = torch.ops.comet.moe_layer_backward(
        case.grad_y, *case.tensors(), saved, token, **case.options(), needs=[True] * 8, **where
    )
    return [y, *grads]


def rank_main(rank: int, world_size: int) -> dict[Any, Any]:
    """Everything this file wants from processes; groups of 3 and 2, the latter of ranks 1 and 2."""
    # A result that reads an uninitialised row comes out NaN.
    torch.use_deterministic_algorithms(True)
    agreed = agree_often(rank)
    offers = offer_twice(rank)
    pair = dist.new_group([1, 2])
    outcome = run_cases(dist.group.WORLD)
    outcome["agreed"] = agreed
    outcome["offers"] = offers
    if rank in (1, 2):
        outcome |= run_cases(pair)
        outcome["chunks"] = chunk_sizes(pair)
        outcome["mismatch"] = mismatch(pair)
        outcome["lost"] = lost_peer(pair)
    return outcome


def run_cases(group: dist.ProcessGroup) -> dict[Any, Any]:
    outcome: dict[Any, Any] = {}
    num_ranks, rank = group.size(), group.rank()
    for name in CASES:
        case = build_case(name, num_ranks)
        mine = shard(case, rank, num_ranks, "all_to_all")
        outcome[num_ranks, "all_to_all", name] = run_op(mine, "all_to_all", group)
        exchange.MIN_CHUNK_BYTES, whole = 1, exchange.MIN_CHUNK_BYTES
        outcome[num_ranks, "chunked", name] = run_op(mine, "all_to_all", group)
        if name in REPEATED:
            outcome[num_ranks, "again", name] = run_op(mine, "all_to_all", group)
        exchange.MIN_CHUNK_BYTES = whole
        if name in REPEATED:
            save = "pre_activation" if rank else "nothing"  # each rank's own affair
            outcome[num_ranks, "asked to save", name] = run_op(mine, "all_to_all", group, save)
        mine = shard(case, rank, num_ranks, "replicated")
        outcome[num_ranks, "replicated", name] = run_op(mine, "replicated", group)
        outcome[num_ranks, "saved", name] = run_op(mine, "replicated", group, "pre_activation")
    return outcome


def chunk_sizes(pair: dist.ProcessGroup) -> list[Any]:
    case = shard(build_case("plain", 2), pair.rank(), 2, "all_to_all")
    exchange.MIN_CHUNK_BYTES, whole = 1, exchange.MIN_CHUNK_BYTES
    plan = exchange.plan_exchange(case.ids, LOCAL_EXPERTS, 64, pair)
    exchange.MIN_CHUNK_BYTES = whole
    return [(c.num_tokens, c.send_rows, c.recv_rows, c.recv_slots) for c in plan.chunks]


def mismatch(pair: dist.ProcessGroup) -> str:
    case = shard(build_case("plain", 2), pair.rank(), 2, "all_to_all")
    case.activation = ["sigmoid_glu", "gelu_glu"][pair.rank()]
    with pytest.raises(PlanMismatchError) as caught:
        run_op(case, "all_to_all", pair)
    return str(caught.value)


def lost_peer(pair: dist.ProcessGroup) -> tuple[str, float]:
    if pair.rank() == 1:
        return "", 0.0
    AGREEMENTS.set_timeout(0.5)
    start = time.monotonic()
    with pytest.raises(PeerTimeoutError) as caught:
        AGREEMENTS.agree({"op": "only on one rank"}, pair)
    AGREEMENTS.set_timeout(None)
    return str(caught.value), time.monotonic() - start


def agree_often(rank: int) -> int:
    # Disjoint groups of different sizes, each made by its members alone. torch names such groups by
    # how many the process has, so this comes before ranks differ in that.
    members = [[0, 1], [0, 1], [2]][rank]
    group = dist.new_group(members, use_local_synchronization=True)
    before = AGREEMENTS.num_handshakes(dist.group.WORLD)
    for plan in ("a", "b", "a", "b"):
        AGREEMENTS.agree({"plan": plan, "members": members}, group)
        AGREEMENTS.agree({"plan": plan}, dist.group.WORLD)
    return AGREEMENTS.num_handshakes(dist.group.WORLD) - before


def offer_twice(rank: int) -> list[list[Any]]:
    plan = {"op": "what can each rank do?"}
    first = [None, "a reason", {"rank": rank}][rank]
    return [AGREEMENTS.gather(plan, offer, dist.group.WORLD) for offer in (first, "too late")]


@pytest.fixture(scope="module")
def outcomes() -> list[dict[Any, Any]]:
    return run_ranks(rank_main, 3, timeout=240)


@pytest.fixture(params=TOKENS, ids="P{}".format)
def group_outcomes(
    request: pytest.FixtureRequest, outcomes: list[dict[Any, Any]]
) -> list[dict[Any, Any]]:
    """What each rank of the group of that size returned, by (form, name)."""
    ranks = outcomes[1:] if request.param == 2 else outcomes
    return [
        {key[1:]: value for key, value in rank.items() if key[0] == request.param} for rank in ranks
    ]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["all_to_all", "replicated"])
def test_sharded_layer_matches_the_unsharded(
    group_outcomes: list[dict[Any, Any]], form: str, name: str
) -> None:
    case = build_case(name, len(group_outcomes))
    ref_y, ref_grads = token_loop(case.to(torch.float64))
    eager_y, eager_grads = token_loop(case)
    results = [ranks[form, name] for ranks in group_outcomes]
    if form == "all_to_all":
        y = torch.cat([result[0] for result in results])
    else:
        y = results[0][0]
        assert all(result[0].equal(y) for result in results)
    assert_matches_ref(y, ref_y, eager_y, what="y")

    for index, grad_name in enumerate(GRAD_NAMES, start=1):
        if grad_name not in ref_grads:
            assert all(result[index].shape == (0,) for result in results)
            continue
        parts = [result[index] for result in results]
        if form == "replicated" and grad_name in ("x", "weights"):
            grad = torch.stack(parts).sum(0)
        else:
            grad = torch.cat(parts)
        what = f"d_{grad_name}"
        assert_matches_ref(grad, ref_grads[grad_name], eager_grads[grad_name], what=what)


@pytest.mark.parametrize("name", CASES)
def test_chunked_is_unchunked(group_outcomes: list[dict[Any, Any]], name: str) -> None:
    for results in group_outcomes:
        # torch's default bounds: matrices of other heights may be multiplied in another order
        torch.testing.assert_close(results["chunked", name], results["all_to_all", name])


@pytest.mark.parametrize("name", REPEATED)
def test_chunked_gives_the_same_bits_again(group_outcomes: list[dict[Any, Any]], name: str) -> None:
    for results in group_outcomes:
        torch.testing.assert_close(results["again", name], results["chunked", name], rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_saved_rows_give_the_same_bits(group_outcomes: list[dict[Any, Any]], name: str) -> None:
    for results in group_outcomes:
        torch.testing.assert_close(
            results["saved", name], results["replicated", name], rtol=0, atol=0
        )


@pytest.mark.parametrize("name", REPEATED)
def test_a_rank_that_asks_to_save_gives_the_same_bits(
    group_outcomes: list[dict[Any, Any]], name: str
) -> None:
    for results in group_outcomes:
        whole, asked = results["all_to_all", name], results["asked to save", name]
        torch.testing.assert_close(whole, asked, rtol=0, atol=0)


def test_a_row_crosses_to_a_rank_once(outcomes: list[dict[Any, Any]]) -> None:
    sizes = [rank["chunks"] for rank in outcomes[1:]]
    case = build_case("plain", 2)
    valid = (case.ids >= 0) & (case.ids < 2 * LOCAL_EXPERTS)
    owner = torch.where(valid, case.ids // LOCAL_EXPERTS, -1)
    first = 0
    for rank, chunks in enumerate(sizes):
        assert len(chunks) == exchange.NUM_SLICES
        last = first + TOKENS[2][rank]
        assert sum(chunk[0] for chunk in chunks) == TOKENS[2][rank]
        for peer in range(2):
            rows = (owner[first:last] == peer).any(1).sum()
            assert sum(chunk[1][peer] for chunk in chunks) == rows
            assert rows == sum(chunk[2][rank] for chunk in sizes[peer])
        assert sum(chunk[3] for chunk in chunks) == (owner == rank).sum()
        first = last


def test_ranks_with_different_plans_are_told_both(outcomes: list[dict[Any, Any]]) -> None:
    for rank in outcomes[1:]:
        assert "they differ in activation:" in rank["mismatch"]
        assert 'ranks [0]: {"activation": "sigmoid_glu"' in rank["mismatch"]
        assert 'ranks [1]: {"activation": "gelu_glu"' in rank["mismatch"]


def test_lost_peer_is_named_before_the_deadline_of_the_group(
    outcomes: list[dict[Any, Any]],
) -> None:
    error, seconds = outcomes[1]["lost"]
    assert error.startswith("rank 0 of process group")
    assert "waited 0.5 s at comet handshake" in error
    assert "group ranks [1] (global ranks [2])" in error
    assert seconds < 10


def test_a_plan_is_agreed_on_once_per_group(outcomes: list[dict[Any, Any]]) -> None:
    assert [rank["agreed"] for rank in outcomes] == [2, 2, 2]


def test_every_rank_sees_what_each_offered_first(outcomes: list[dict[Any, Any]]) -> None:
    for rank in outcomes:
        assert rank["offers"] == [[None, "a reason", {"rank": 2}]] * 2


def test_fake_process_group_runs_without_a_handshake() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        case = shard(build_case("biases_after", 2), 0, 2, "all_to_all")
        for form in ("all_to_all", "replicated"):
            y, *_ = run_op(case, form, dist.group.WORLD)
            assert y.shape == case.x.shape
    finally:
        dist.destroy_process_group()
