"""The fused backward between ranks that are buffers of one process, in Triton's interpreter.

As in `test_fused_exchange.py`: float16 only, and one stage of all ranks after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from covering import covering
from exchange_ranks import Ranks
from fused_layers import math, params, routed, stored_pair
from moe_cases import GRAD_NAMES, Case
from numerics import assert_matches_ref

from comet_compile.kernels import portable
from comet_compile.kernels.experts import Matrices, Needs, weight_gradients
from comet_compile.kernels.refs import moe_layer_backward_ref

pytestmark = pytest.mark.usefixtures("interpreted")

# Tokens of two ranks: of their four experts, two have a whole tile and part of another.
SEVERAL_TILES = (31, 25)


def joined(layers: Sequence[Case]) -> Case:
    """All ranks' tokens as those of one device."""
    first = layers[0]
    return dataclasses.replace(
        first,
        x=torch.cat([layer.x for layer in layers]),
        ids=torch.cat([layer.ids for layer in layers]),
        weights=None
        if first.weights is None
        else torch.cat([layer.weights for layer in layers if layer.weights is not None]),
        grad_y=torch.cat([layer.grad_y for layer in layers]),
    )


def check(ranks: Ranks, num_tokens: tuple[int, ...], seed: int = 0) -> list[dict[str, Tensor]]:
    """Assert that every rank's gradients err at most as `numerics` allows; return them."""
    layers = ranks.tokens(num_tokens, seed)
    results = ranks.run_backward(layers)
    whole = joined(layers)
    wide = whole.to(torch.float64)
    refs = moe_layer_backward_ref(
        wide.grad_y, *wide.tensors(), activation=whole.activation, weight_place=whole.weight_place
    )
    args = routed(whole), params(whole), math(whole)
    d_x, d_weights, part = portable.local_backward(whole.grad_y, args[0], None, *args[1:], Needs())
    eagers = (d_x, d_weights, *weight_gradients([part], args[1], Needs()))
    ends = torch.tensor((0, *num_tokens)).cumsum(0).tolist()
    found = []
    for rank, result in enumerate(results):
        ranks.workspaces[rank].check()
        tokens = slice(ends[rank], ends[rank + 1])
        mine = slice(rank * ranks.num_experts, (rank + 1) * ranks.num_experts)
        grads = {}
        for name, grad, ref, eager in zip(GRAD_NAMES, result, refs, eagers, strict=True):
            leaf = getattr(whole, name)
            if leaf is None:
                assert grad is None, name
                continue
            assert grad is not None
            assert eager is not None
            part_of = tokens if name in ("x", "weights") else mine
            assert grad.dtype == leaf.dtype
            what = f"d_{name}, rank {rank}"
            assert_matches_ref(
                grad, ref[part_of], eager[part_of], what=what, rounded_to=whole.x.dtype
            )
            grads[name] = grad
        found.append(grads)
    return found


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [((11, 9), 2, 2), ((0, 14), 2, 1), ((9, 0, 16), 3, 3), ((5, 1, 6, 3), 1, 2)],
    ids=str,
)
def test_numbers_of_tokens(num_tokens: tuple[int, ...], num_experts: int, top_k: int) -> None:
    check(Ranks(len(num_tokens), num_experts=num_experts, top_k=top_k), num_tokens)


def test_no_token_anywhere() -> None:
    for grads in check(Ranks(2), (0, 0)):
        assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize("biases", [False, True])
def test_weight_places(weight_place: str, biases: bool) -> None:
    check(Ranks(2, capacity=32, weight_place=weight_place, biases=biases), SEVERAL_TILES)


@pytest.mark.parametrize("weight_place", ["before", "after"])
def test_no_routing_weights(weight_place: str) -> None:
    check(Ranks(2, with_weights=False, weight_place=weight_place), (11, 9))


@pytest.mark.parametrize("activation", ["swiglu_oai:interleaved:alpha=1.702:limit=1.5", "relu2"])
@pytest.mark.parametrize("permuted", [False, True], ids=["n_contiguous", "k_contiguous"])
def test_activations(activation: str, permuted: bool) -> None:
    check(Ranks(2, activation=activation, permuted=permuted), (11, 9))


@pytest.mark.parametrize(
    ("up_before", "permuted", "weight_place"),
    covering([False, True], [False, True], ["before", "after"]),
)
def test_separate_up(up_before: bool, permuted: bool, weight_place: str) -> None:
    ranks = Ranks(
        2, capacity=32, separate_up=True, permuted=permuted, weight_place=weight_place, biases=True
    )
    ranks.whole = stored_pair(ranks.whole, up_before)
    check(ranks, SEVERAL_TILES)


@pytest.mark.parametrize("weight_place", ["before", "after"])
def test_gathering_the_tokens_first(weight_place: str) -> None:
    ranks = Ranks(2, capacity=32, weight_place=weight_place, biases=True, gathers=True)
    check(ranks, SEVERAL_TILES)


@pytest.mark.parametrize(
    ("activation", "weight_place", "keeps"),
    [
        pytest.param("silu_glu", "after", (True, True), marks=pytest.mark.slow),
        ("silu_glu:interleaved", "between", (True, False)),
        pytest.param("relu2", "before", (False, True), marks=pytest.mark.slow),
    ],
)
def test_saved_rows_give_the_same_bits(
    activation: str, weight_place: str, keeps: tuple[bool, bool]
) -> None:
    # whether its rows were kept is each rank's own affair
    options = {"activation": activation, "weight_place": weight_place}
    ranks = Ranks(2, capacity=32, biases=True, gathers=True, **options)
    layers = ranks.tokens(SEVERAL_TILES)
    saved = [ranks.memory_for_rows(layer) for layer in layers]
    ranks.run(layers, saved)
    kept = [rows if keep else None for rows, keep in zip(saved, keeps, strict=True)]
    for needs in (Needs(), Needs(w_in=False), Needs(w_in=False, weights=False)):
        again = ranks.run_backward(layers, needs)
        for workspace in ranks.workspaces:  # what was fetched is not fetched again
            ranks.poison_fetched(workspace)
        for first, second in zip(ranks.run_backward(layers, needs, kept), again, strict=True):
            for name, grad, other in zip(GRAD_NAMES, first, second, strict=True):
                assert (grad is None) == (other is None), name
                assert grad is None or torch.equal(grad, other), name


@pytest.mark.parametrize(("gathers", "keeps"), [(True, True), (False, False)])
def test_memory_for_no_more_rows_than_there_are(gathers: bool, keeps: bool) -> None:
    ranks = Ranks(2, capacity=32, biases=True, gathers=gathers)
    layers = ranks.tokens(SEVERAL_TILES)
    plain = ranks.run_backward(layers)
    saved: list[Tensor | None] = [None, None]
    if keeps:
        rows = [ranks.memory_for_rows(layer) for layer in layers]
        ranks.run(layers, rows)
        saved = [*rows]
    got = ranks.run_backward(layers, saved=saved, fits=True, frees=True)
    for rank, grads in enumerate(plain):
        kept = saved[rank]
        assert kept is None or kept.untyped_storage().nbytes() == 0
        for name, grad, other in zip(GRAD_NAMES, got[rank], grads, strict=True):
            assert (grad is None) == (other is None), name
            assert grad is None or torch.equal(grad, other), name


def test_rows_that_find_no_room_are_left_out() -> None:
    ranks = Ranks(2, capacity=32)
    layers = ranks.tokens(SEVERAL_TILES)
    every = [ranks.memory_for_rows(layer) for layer in layers]
    ranks.run(layers, every)
    some = [ranks.memory_for_rows(layer, 30) for layer in layers]
    # behind the room begins other memory
    behind = [torch.cat([rows, rows]) for rows in some]
    ranks.run(layers, [rows[:30] for rows in behind])
    for rows, whole in zip(behind, every, strict=True):
        assert torch.equal(rows[:30], whole[:30])
        assert rows[30:].isnan().all()


def test_one_rank_adds_to_gradients_that_it_has() -> None:
    ranks = Ranks(2, gathers=True, biases=True)
    layers = ranks.tokens((11, 9))
    plain = ranks.run_backward(layers)
    zeros = [None if grad is None else torch.zeros_like(grad) for grad in plain[1][2:5]]
    added = ranks.run_backward(layers, into=[None, Matrices(*zeros, has_values=True)])
    for rank, grads in enumerate(plain):
        got = (*added[rank][:2], *zeros, *added[rank][5:]) if rank == 1 else added[rank]
        assert rank == 0 or added[rank][2:5] == (None, None, None)
        for name, grad, other in zip(GRAD_NAMES, got, grads, strict=True):
            assert (grad is None) == (other is None), name
            assert grad is None or torch.equal(grad, other), name


def test_calls_of_both_directions_follow_each_other() -> None:
    ranks = Ranks(2)
    first = check(ranks, (11, 9))
    layers = ranks.tokens((11, 9))
    ranks.run(layers)
    check(ranks, (3, 16), 1)
    ranks.run(layers)
    for grads, again in zip(first, check(ranks, (11, 9)), strict=True):
        for name, grad in grads.items():
            assert torch.equal(grad, again[name]), name
    for ws in ranks.workspaces:
        assert int(ws.epoch) == 5
        assert not any(int(counter) for counter in (ws.abort, ws.published, ws.summed, ws.scored))


def test_only_what_is_needed() -> None:
    ranks = Ranks(2, biases=True)
    layers = ranks.tokens((11, 9))
    every = ranks.run_backward(layers)
    for asked in ("x", "weights", "w_in", "w_out"):
        needs = Needs(**{name: name in ("x", asked) for name in GRAD_NAMES})
        for all_grads, some in zip(every, ranks.run_backward(layers, needs), strict=True):
            for name, grad, one in zip(GRAD_NAMES, all_grads, some, strict=True):
                if name in ("x", asked):
                    assert one is not None, (asked, name)
                    assert torch.equal(one, grad), (asked, name)
                else:
                    assert one is None, (asked, name)
