"""300 random layers and 300 near-misses of such; `make fuzz` judges 10,000 of each."""

from __future__ import annotations

import fuzz
import pytest
from zoo import recipes

from comet_compile.passes import find

CORRECT, DEFECT = (fuzz.graphs(range(300), defect=defect) for defect in (False, True))
PARTS = range(6)


@pytest.mark.parametrize("part", PARTS)
def test_correct_layers_are_rewritten_to_the_same(part: int) -> None:
    graphs = CORRECT[part :: len(PARTS)]
    tally = fuzz.run(graphs)
    assert not tally.bugs, tally
    num_layers = sum(len(graph.seeds) for graph in graphs)
    assert tally.of()["rewritten"] >= 0.95 * num_layers, tally


@pytest.mark.parametrize("part", PARTS)
def test_near_misses_are_refused(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # the first cuts of a region are the likely ones; `make fuzz` tries all
    monkeypatch.setattr(find, "_MAX_CANDIDATES", 5)
    tally = fuzz.run(DEFECT[part :: len(PARTS)])
    assert not tally.bugs, tally
    assert tally.of()["rewritten"] == 0, tally


def test_every_step_and_defect_is_drawn() -> None:
    drawn = [recipes.draw(seed, defect=True) for seed in range(300)]
    assert {recipe.defect for recipe in drawn} == recipes.DEFECTS
    for field, ways in (("layout", 4), ("way", 11), ("scores", 6), ("counts", 5), ("order", 3),
                        ("gather", 7), ("pairing", 5), ("activation", 6), ("place", 4),
                        ("combine", 5)):  # fmt: skip
        assert len({getattr(recipe, field) for recipe in drawn}) == ways, field
