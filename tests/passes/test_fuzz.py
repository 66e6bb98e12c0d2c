"""300 random layers and 300 near-misses of such; `make fuzz` judges 10,000 of each."""

from __future__ import annotations

import fuzz
import pytest
from zoo import composed

from comet_compile.passes import find

CHUNKS = [range(start, start + 50) for start in range(0, 300, 50)]


@pytest.mark.parametrize("seeds", CHUNKS, ids=str)
def test_correct_layers_are_rewritten_to_the_same(seeds: range) -> None:
    tally = fuzz.run(fuzz.groups(seeds), defect=False)
    assert not tally.bugs, tally
    assert tally.outcomes["rewritten"] >= 0.95 * len(seeds), tally


@pytest.mark.parametrize("seeds", CHUNKS, ids=str)
def test_near_misses_are_refused(seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    # the first cuts of a region are the likely ones; `make fuzz` tries all
    monkeypatch.setattr(find, "_MAX_CANDIDATES", 5)
    tally = fuzz.run(fuzz.groups(seeds), defect=True)
    assert not tally.bugs, tally
    assert tally.outcomes["rewritten"] == 0, tally


def test_every_step_and_defect_is_drawn() -> None:
    recipes = [composed.draw(seed, defect=True) for seed in range(300)]
    assert {recipe.defect for recipe in recipes} == set(composed.DEFECTS)
    for field, ways in (("scores", 6), ("counts", 5), ("order", 3), ("gather", 7), ("pairing", 5),
                        ("activation", 6), ("place", 4), ("combine", 5)):  # fmt: skip
        assert len({getattr(recipe, field) for recipe in recipes}) == ways, field
