"""Combinations of parameters of which few run by default.

Most of what goes wrong in a combination goes wrong in two of its values already. So a set of
combinations that has every pair of values runs always, the others are marked slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest


def covering(*axes: Sequence[object]) -> list[pytest.param]:
    """Return all combinations, one value of each axis; few that have all pairs are not slow.

    Example: of the eight of ``covering("ab", "xy", (1, 2))``, a-x-1, a-y-2, b-x-2 and b-y-1 always
    run.
    """
    places = list(itertools.product(*(range(len(axis)) for axis in axes)))
    missing = set().union(*map(_pairs, places))
    chosen = set()
    while missing:
        best = max(places, key=lambda place: len(_pairs(place) & missing))
        chosen.add(best)
        missing -= _pairs(best)
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, place, strict=True)),
            marks=[] if place in chosen else [pytest.mark.slow],
        )
        for place in places
    ]


def _pairs(place: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(itertools.combinations(enumerate(place), 2))
