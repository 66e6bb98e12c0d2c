"""Bounds of integer values, against the values that the operations really give."""

from __future__ import annotations

import math
from collections.abc import Callable

import joint_graphs
import pytest
import torch
from torch import Tensor, fx

from comet_compile.passes.ranges import are_distinct, interval

E, T = 8, 6


def _topk(x: Tensor) -> Tensor:
    return x.topk(3, dim=1).indices


# (function of logits [T, E], the tightest bounds)
BOUNDED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[float, float]]] = {
    "topk": (_topk, (0, E - 1)),
    "argmax": (lambda x: x.argmax(1), (0, E - 1)),
    "argsort": (lambda x: x.argsort(1), (0, E - 1)),
    "view": (lambda x: _topk(x).reshape(-1).clone(), (0, E - 1)),
    "int32": (lambda x: _topk(x).to(torch.int32), (0, E - 1)),
    "select": (lambda x: _topk(x)[:, 1], (0, E - 1)),
    "shifted": (lambda x: _topk(x) - 1, (-1, E - 2)),
    "added": (lambda x: _topk(x) + x.argmax(1, keepdim=True), (0, 2 * E - 2)),
    "difference": (lambda x: _topk(x) - x.argmax(1, keepdim=True), (1 - E, E - 1)),
    "remainder": (lambda x: (_topk(x) - 5) % 4, (0, 3)),
    "fmod": (lambda x: torch.fmod(_topk(x) - 5, 4), (-3, 2)),
    "clamped": (lambda x: (_topk(x) - 1).clamp(0, 3), (0, 3)),
    "clamped_below": (lambda x: (_topk(x) - 1).clamp(min=0), (0, E - 2)),
    "masked": (lambda x: torch.where(x[:, :3] > 0, _topk(x), E), (0, E)),
    "joined": (lambda x: torch.cat([_topk(x), _topk(x) + E], dim=1), (0, 2 * E - 1)),
}

UNBOUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "rounded": lambda x: x.to(torch.int64),
    "product": lambda x: _topk(x) * x.to(torch.int64)[:, :3],
    "counts": lambda x: _topk(x).cumsum(0),
}

DISTINCT: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "topk": (_topk, True),
    "converted": (lambda x: _topk(x).to(torch.int32), True),
    "topk_of_columns": (lambda x: x.topk(3, dim=0).indices, False),
    "argmax_twice": (lambda x: torch.stack([x.argmax(1), x.abs().argmax(1)], 1), False),
    "remainder": (lambda x: _topk(x) % 4, False),
    "values": (lambda x: x.topk(3, dim=1).values, False),
    "clamped": (lambda x: _topk(x).clamp(1, 3), False),
}


def output_of(function: Callable[[Tensor], Tensor]) -> fx.Node:
    graph = joint_graphs.capture(function, torch.randn(T, E), train=False)
    (node,) = graph.output_node().args[0]
    return node


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_are_right_and_tight(name: str) -> None:
    function, bounds = BOUNDED[name]
    low, high = interval(output_of(function))
    assert (low, high) == bounds
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        values = function(torch.randn(T, E, generator=generator))
        assert low <= values.min()
        assert values.max() <= high


@pytest.mark.parametrize("name", UNBOUNDED)
def test_unknown_values_have_no_bounds(name: str) -> None:
    low, high = interval(output_of(UNBOUNDED[name]))
    assert low == -math.inf
    assert high == math.inf


@pytest.mark.parametrize("name", DISTINCT)
def test_distinct_in_a_row(name: str) -> None:
    function, expected = DISTINCT[name]
    assert are_distinct(output_of(function)) == expected


def test_numbers_bound_themselves() -> None:
    assert interval(3) == (3, 3)
    assert interval(None) == (-math.inf, math.inf)
