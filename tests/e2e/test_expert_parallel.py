"""Expert parallel layers over all-to-all, in real gloo processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from distributed.gloo import RankPool, run_ranks
from e2e import harness
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from zoo import ep, near_misses, textbook, titan

LAYERS = {
    "titan": titan.TitanMoE,
    "funcol": textbook.FuncolMoE,
    "in_place": textbook.InPlaceMoE,
    "in_place_function": textbook.InPlaceFunctionMoE,
}
TIMEOUT = 240.0  # seconds, for machines whose cores are shared


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, pair: RankPool) -> None:
    pair.run(_layer, name)


def _layer(rank: int, world_size: int, name: str) -> None:
    # eager does not differentiate the in-place exchange, so there is nothing to compare with
    for train in (False,) if name == "in_place" else (False, True):
        outcome = _compare(LAYERS[name](), rank, world_size, train=train)
        assert outcome.graphs == 1
        harness.assert_rewritten(outcome, 1, train=train)


def test_layer_with_generated_code(pair: RankPool) -> None:
    pair.run(_generated_code)


def _generated_code(rank: int, world_size: int) -> None:
    outcome = _compare(titan.TitanMoE(), rank, world_size, train=True, codegen=True)
    harness.assert_rewritten(outcome, 1, train=True)


def test_scores_before_experts(pair: RankPool) -> None:
    pair.run(_scores_before_experts)


def _scores_before_experts(rank: int, world_size: int) -> None:
    layer = titan.TitanMoE(score_before_experts=True)
    outcome = _compare(layer, rank, world_size, train=True)
    harness.assert_rewritten(outcome, 1, train=True)


def test_two_layers_in_one_graph(pair: RankPool) -> None:
    pair.run(_two_layers)


def _two_layers(rank: int, world_size: int) -> None:
    stack = ep.Stack([titan.TitanMoE(seed=0), titan.TitanMoE(seed=1)])
    outcome = _compare(stack, rank, world_size, train=True)
    assert outcome.graphs == 1
    harness.assert_rewritten(outcome, 2, train=True)


@pytest.mark.parametrize("case", ["checkpointed", "input_without_gradient", "frozen_experts"])
def test_training_with_less_than_everything(case: str, pair: RankPool) -> None:
    pair.run(_training_case, case)


def _training_case(rank: int, world_size: int, case: str) -> None:
    layer = titan.TitanMoE()
    if case == "frozen_experts":
        for weight in (layer.w1_LIH, layer.w3_LIH, layer.w2_LHI):
            weight.requires_grad_(False)
    outcome = harness.compare_with_oracle(
        layer,
        [_tokens([16] * world_size)],
        rank=rank,
        train=True,
        input_grad=case != "input_without_gradient",
        wrap=_checkpointed if case == "checkpointed" else lambda module: module,
    )
    harness.assert_rewritten(outcome, 1, train=True)


def _checkpointed(module: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(module, x, use_reentrant=False)


def test_token_counts_differ_by_rank_and_step(pair: RankPool) -> None:
    pair.run(_token_counts)


def _token_counts(rank: int, world_size: int) -> None:
    steps = [_tokens([16, 16]), _tokens([12, 21]), _tokens([40, 5]), _tokens([7, 30])]
    layer = titan.TitanMoE()
    outcome = harness.compare_with_oracle(layer, steps, rank=rank, train=True)
    assert outcome.graphs == 2, "one static graph, one dynamic"
    harness.assert_rewritten(outcome, 1, train=True)


# by default each number in one mode: 0 and 1 in the one that compiles both directions
FEW_TOKENS = [
    pytest.param(few, train, marks=[] if train == (few < 2) else [pytest.mark.slow])
    for few in (0, 1, 2)
    for train in (False, True)
]


@pytest.mark.parametrize(("few", "train"), FEW_TOKENS)
def test_one_rank_has_few_tokens(few: int, train: bool, pair: RankPool) -> None:
    # sizes 0 and 1 get graphs of their own on one rank only; were such a graph refused, its rank
    # would wait in a collective that the others never call
    pair.run(_few_tokens, [[10, 10], [few, 8]], train, True)


@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.slow), True])
def test_one_rank_starts_with_no_token(train: bool, pair: RankPool) -> None:
    pair.run(_few_tokens, [[0, 10], [6, 0], [0, 0]], train, None)


def _few_tokens(
    rank: int, world_size: int, counts: list[list[int]], train: bool, dynamic: bool | None
) -> None:
    layer = titan.TitanMoE()
    steps = [_tokens(of_ranks) for of_ranks in counts]
    outcome = harness.compare_with_oracle(layer, steps, rank=rank, train=train, dynamic=dynamic)
    harness.assert_rewritten(outcome, 1, train=train)


def test_one_rank_receives_no_rows(pair: RankPool) -> None:
    pair.run(_no_rows)


def _no_rows(rank: int, world_size: int) -> None:
    ids_TA = torch.tensor([[0, 1]]).expand(9, 2)
    step = [ep.tokens(9, seed=10 + peer, ids_TA=ids_TA) for peer in range(world_size)]
    outcome = harness.compare_with_oracle(titan.TitanMoE(), [step], rank=rank, train=True)
    harness.assert_rewritten(outcome, 1, train=True)


def test_subgroups_and_device_mesh() -> None:
    run_ranks(_subgroups, 4, timeout=TIMEOUT)


def _subgroups(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    strided = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    for layer in (
        titan.TitanMoE(mesh["ep"]),
        textbook.InPlaceMoE(strided[rank % 2]),
    ):
        place = dist.get_rank(ep.process_group(layer.group))
        ranks = dist.get_process_group_ranks(ep.process_group(layer.group))
        xs = [ep.tokens(10 + peer, seed=peer) for peer in ranks]
        outcome = harness.compare_with_oracle(layer, [xs], rank=place, train=False)
        harness.assert_rewritten(outcome, 1, train=False)


def test_one_rank_is_a_group_too(alone: RankPool) -> None:
    alone.run(_layer, "titan")


@pytest.mark.parametrize("name", ["combine_on_other_group", "break_after_dispatch"])
def test_near_miss_is_left_alone(name: str, pair: RankPool) -> None:
    pair.run(_near_miss, name)


def _near_miss(rank: int, world_size: int, name: str) -> None:
    kind = near_misses.DISTRIBUTED[name]
    layer = kind()
    outcome = _compare(layer, rank, world_size, train=False, fullgraph=kind.fullgraph)
    harness.assert_untouched(outcome)
    assert outcome.comet["regions_rejected"] > 0


def test_group_that_does_not_exist(alone: RankPool) -> None:
    alone.run(_no_such_group)


def _no_such_group(rank: int, world_size: int) -> None:
    layer = near_misses.NoSuchGroup()
    x = ep.tokens(8)
    with harness.fresh_compilation(), torch.no_grad():
        compiled = torch.compile(layer, backend=harness.BACKEND, fullgraph=True)
        with pytest.raises(RuntimeError, match="no_such_group"):
            compiled(x)
        harness.assert_untouched(harness.snapshot(compiled))


def _compare(
    layer: torch.nn.Module,
    rank: int,
    world_size: int,
    *,
    train: bool,
    codegen: bool = False,
    fullgraph: bool = True,
) -> harness.Outcome:
    steps = [_tokens([16] * world_size)]
    return harness.compare_with_oracle(
        layer, steps, rank=rank, train=train, codegen=codegen, fullgraph=fullgraph
    )


def _tokens(counts: list[int]) -> list[Tensor]:
    """Return the tokens of every rank; each count has its own seed."""
    return [ep.tokens(count, seed=10 * peer + count) for peer, count in enumerate(counts)]
