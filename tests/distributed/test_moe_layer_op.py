"""comet::moe_layer over gloo: every rank's outputs and gradients against the unsharded layer.

Starting processes costs seconds, so each world size starts once, runs all cases, and the tests look
at what came back.
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

from comet_compile.kernels import exchange, ops  # noqa: F401, ops registers the ops
from comet_compile.kernels.agreement import AGREEMENTS

LOCAL_EXPERTS = 3
# tokens of each rank, by world size
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
    "one_rank_receives_nothing": {"ids_to": "first_rank"},
    "all_to_one_expert": {"ids_to": "last_expert"},
    "every_id_out_of_range": {"ids_to": "nowhere"},
    "repeated_in_a_row": {"ids_to": "pairs"},
}


def build_case(name: str, world_size: int) -> Case:
    """The whole group's layer."""
    options = dict(CASES[name])
    ids_to = options.pop("ids_to", None)
    num_experts = LOCAL_EXPERTS * world_size
    shape = (sum(TOKENS[world_size]), 3)
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


def run_op(case: Case, form: str, save: str = "nothing") -> list[Tensor]:
    """Return [y, gradients ...] of this rank."""
    where = {"form": form, "group_name": dist.group.WORLD.group_name}
    y, saved, token = torch.ops.comet.moe_layer(
        *case.tensors(), None, **case.options(), out_dtype=case.out_dtype, save=save, **where
    )
    assert token.shape == (1,)
    *grads, token = torch.ops.comet.moe_layer_backward(
        case.grad_y, *case.tensors(), saved, token, **case.options(), needs=[True] * 8, **where
    )
    return [y, *grads]


def rank_main(rank: int, world_size: int) -> dict[Any, Any]:
    # A result that reads an uninitialised row comes out NaN.
    torch.use_deterministic_algorithms(True)
    outcome: dict[Any, Any] = {}
    for name in CASES:
        case = build_case(name, world_size)
        mine = shard(case, rank, world_size, "all_to_all")
        outcome["all_to_all", name] = run_op(mine, "all_to_all")
        exchange.MIN_CHUNK_BYTES, whole = 1, exchange.MIN_CHUNK_BYTES
        outcome["chunked", name] = run_op(mine, "all_to_all")
        exchange.MIN_CHUNK_BYTES = whole
        mine = shard(case, rank, world_size, "replicated")
        outcome["replicated", name] = run_op(mine, "replicated")
        outcome["saved", name] = run_op(mine, "replicated", "pre_activation")
    return outcome


@pytest.fixture(scope="module", params=TOKENS, ids="P{}".format)
def outcome(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    return run_ranks(rank_main, request.param)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["all_to_all", "replicated"])
def test_sharded_layer_matches_the_unsharded(
    outcome: list[dict[Any, Any]], form: str, name: str
) -> None:
    case = build_case(name, len(outcome))
    ref_y, ref_grads = token_loop(case.to(torch.float64))
    eager_y, eager_grads = token_loop(case)
    results = [ranks[form, name] for ranks in outcome]
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
@pytest.mark.parametrize(("one", "other"), [("all_to_all", "chunked"), ("replicated", "saved")])
def test_same_bits_however_it_runs(
    outcome: list[dict[Any, Any]], one: str, other: str, name: str
) -> None:
    # gloo's sum depends on nothing but the values, so this holds for the all-reduce too
    for rank, results in enumerate(outcome):
        for index, (a, b) in enumerate(zip(results[one, name], results[other, name], strict=True)):
            # float sums over rows of other lengths may round in another order
            tolerance = {} if a.dtype == torch.float64 else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(
                a, b, **tolerance, msg=lambda m, r=rank, i=index: f"rank {r}, output {i}: {m}"
            )


def _chunk_sizes(rank: int, world_size: int) -> Any:
    exchange.MIN_CHUNK_BYTES = 1
    case = shard(build_case("plain", world_size), rank, world_size, "all_to_all")
    plan = exchange.plan_exchange(case.ids, LOCAL_EXPERTS, 64, dist.group.WORLD)
    return [(c.num_tokens, c.send_rows, c.recv_rows, c.recv_slots) for c in plan.chunks]


def test_a_row_crosses_to_a_rank_once() -> None:
    sizes = run_ranks(_chunk_sizes, 2)
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


def _mismatch(rank: int, world_size: int) -> list[str]:
    case = shard(build_case("plain", world_size), rank, world_size, "all_to_all")
    if rank == 1:
        case.activation = "gelu_glu"
    subgroup = dist.new_group([0, 1])
    errors = []
    for group in (dist.group.WORLD, subgroup):
        where = {"form": "all_to_all", "group_name": group.group_name, "save": "nothing"}
        try:
            torch.ops.comet.moe_layer(
                *case.tensors(), None, **case.options(), out_dtype=case.out_dtype, **where
            )
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def test_ranks_with_different_plans_are_told_both() -> None:
    for errors in run_ranks(_mismatch, 2, timeout=60):
        assert len(errors) == 2
        for error in errors:
            assert error.startswith("PlanMismatchError: ranks of process group")
            assert "they differ in activation" in error
            assert 'ranks [0]: {"activation": "silu_glu"' in error
            assert 'ranks [1]: {"activation": "gelu_glu"' in error


def _lost_peer(rank: int, world_size: int) -> tuple[str, float]:
    if rank == 1:
        return "", 0.0
    AGREEMENTS.set_timeout(0.5)
    start = time.monotonic()
    with pytest.raises(Exception, match="did not come") as caught:
        AGREEMENTS.agree({"op": "test"}, dist.group.WORLD)
    return f"{caught.typename}: {caught.value}", time.monotonic() - start


def test_lost_peer_is_named_before_the_deadline_of_the_group() -> None:
    error, seconds = run_ranks(_lost_peer, 2, timeout=60)[0]
    assert error.startswith("PeerTimeoutError: rank 0 of process group")
    assert "waited 0.5 s at comet handshake 0" in error
    assert "group ranks [1] (global ranks [1])" in error
    assert seconds < 10


def _agree_often(rank: int, world_size: int) -> int:
    # Disjoint groups beside each other, the second with other ranks first.
    pair = [[0, 1], [2]][rank // 2]
    group = dist.new_group(pair, use_local_synchronization=True)
    for plan in ("a", "b", "a", "b"):
        AGREEMENTS.agree({"plan": plan, "pair": pair}, group)
        AGREEMENTS.agree({"plan": plan}, dist.group.WORLD)
    return AGREEMENTS._groups[dist.group.WORLD].num_handshakes


def test_a_plan_is_agreed_on_once_per_group() -> None:
    assert run_ranks(_agree_often, 3, timeout=60) == [2, 2, 2]


def test_fake_process_group_runs_without_a_handshake() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        case = shard(build_case("biases_after", 2), 0, 2, "all_to_all")
        for form in ("all_to_all", "replicated"):
            y, *_ = run_op(case, form)
            assert y.shape == case.x.shape
    finally:
        dist.destroy_process_group()
