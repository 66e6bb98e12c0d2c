"""The routings that regions are interpreted on: in shape, in range, and telling things apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from comet_compile.passes.samples import REPEATED, SENTINEL_HIGH, SENTINEL_LOW, routings

# (tokens, ids per token, experts, ranks, experts per rank)
SHAPES = (
    (6, 2, 4, 1, 4),
    (6, 2, 4, 2, 2),
    (1, 8, 128, 1, 128),  # one token, as in decoding
    (1, 1, 3, 1, 3),
    (5, 1, 8, 8, 1),  # one expert per rank
    (12, 4, 8, 4, 2),  # more ids than experts of one rank
    (3, 4, 4, 2, 2),  # every token goes to every expert
)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
UNUSUAL = {REPEATED, SENTINEL_HIGH, SENTINEL_LOW}


def by_name(shape: tuple[int, ...]) -> dict[str, tuple[Tensor, ...]]:
    listed = list(routings(*shape))
    names = [name for name, _ in listed]
    assert len(set(names)) == len(names)
    return dict(listed)


@each_shape
def test_ids_have_the_shape_and_range(shape: tuple[int, ...]) -> None:
    num_tokens, top_k, num_experts, num_ranks, _ = shape
    for name, ids in by_name(shape).items():
        assert len(ids) == num_ranks
        for own in ids:
            assert own.shape == (num_tokens, top_k)
            assert own.dtype == torch.int64
            if name == SENTINEL_LOW:
                assert own.min() >= -1
            elif name == SENTINEL_HIGH:
                assert own.max() <= num_experts
            else:
                assert 0 <= own.min() <= own.max() < num_experts


@each_shape
def test_ids_of_a_token_differ_but_where_they_must_not(shape: tuple[int, ...]) -> None:
    top_k = shape[1]
    for name, ids in by_name(shape).items():
        if name in UNUSUAL:
            continue
        for own in ids:
            assert all(row.unique().numel() == top_k for row in own), name
    if top_k > 1:
        for own in by_name(shape)[REPEATED]:
            assert all(row.unique().numel() == 1 for row in own)


@each_shape
def test_every_expert_gets_a_token(shape: tuple[int, ...]) -> None:
    _, _, num_experts, _, _ = shape
    usual = [ids for name, ids in by_name(shape).items() if name not in UNUSUAL]
    for rank in range(shape[3]):
        reached = torch.cat([ids[rank].flatten() for ids in usual]).unique()
        assert reached.tolist() == list(range(num_experts))


@each_shape
def test_is_deterministic(shape: tuple[int, ...]) -> None:
    first, second = by_name(shape), by_name(shape)
    assert list(first) == list(second)
    for name, ids in first.items():
        assert all(torch.equal(a, b) for a, b in zip(ids, second[name], strict=True))


def test_some_routing_leaves_experts_without_tokens() -> None:
    (own,) = by_name((6, 2, 8, 1, 8))["empty_experts"]
    assert not set(own.flatten().tolist()) & {0, 7}


def sent(ids: tuple[Tensor, ...], experts_per_rank: int) -> list[list[int]]:
    """How many rows each rank sends to each rank."""
    owner = [own.flatten() // experts_per_rank for own in ids]
    return [torch.bincount(o, minlength=len(ids)).tolist() for o in owner]


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_exchanged_numbers_of_rows_are_not_symmetric(num_ranks: int) -> None:
    """Splits that are rotated, or the wrong way around, must not fit by chance."""
    found = by_name((1, 2, 2 * num_ranks, num_ranks, 2))
    tables = [sent(ids, 2) for name, ids in found.items() if name not in UNUSUAL]

    def tells(change: str) -> bool:
        for table in tables:
            received = [list(column) for column in zip(*table, strict=True)]
            if change == "swap" and received != table:
                return True
            if change == "rotate" and any(r[1:] + r[:1] != r for r in received):
                return True
        return False

    assert tells("swap")
    assert tells("rotate")


def test_a_rank_that_receives_nothing() -> None:
    table = sent(by_name((6, 2, 8, 4, 2))["one_rank_receives_all"], 2)
    assert all(row[0] == 12 and sum(row[1:]) == 0 for row in table)
