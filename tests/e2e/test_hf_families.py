"""Every class of experts in the installed transformers is rewritten, or refused for a known reason.

The classes are read from the package, so what a new release adds fails here by name. `model_page`
makes a page of the outcomes.
"""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import model_page
import transformers
from e2e import harness
from zoo import hf_families
from zoo.hf_families import Family

from comet_compile import records

FAMILIES = [pytest.param(family, id=family.name) for family in hf_families.families()]


def check(family: Family, implementation: str, *, train: bool) -> None:
    layer = hf_families.layer(family, implementation)
    with records.collect() as graphs:
        outcome = harness.compile_and_compare(layer, [hf_families.tokens()], train=train)
    reason = model_page.REFUSED.get((family.name, implementation))
    if reason is None:
        harness.assert_rewritten(outcome, 1, train=train)
    else:
        assert [one.reason for graph in graphs for one in graph.regions] == [reason]


# Training has the same forward in a joint graph: for every other family that is enough by default.
INFERENCE = [
    pytest.param(family, id=family.name, marks=[pytest.mark.slow] if turn % 2 else [])
    for turn, family in enumerate(hf_families.families())
]


@pytest.mark.parametrize("family", INFERENCE)
def test_inference(family: Family) -> None:
    check(family, "grouped_mm", train=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_training(family: Family) -> None:
    check(family, "grouped_mm", train=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_batched_mm(family: Family) -> None:
    check(family, "batched_mm", train=True)


in_both_modes = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])


@in_both_modes
@pytest.mark.parametrize("name", model_page.OWN_REWRITTEN)
def test_own_experts(name: str, train: bool) -> None:
    layer = hf_families.OwnLayer(name, torch.bfloat16)
    outcome = harness.compile_and_compare(layer, [hf_families.tokens()], train=train)
    harness.assert_rewritten(outcome, 1, train=train)


@in_both_modes
@pytest.mark.parametrize("name", model_page.OWN_REWRITTEN)
def test_own_experts_in_float32(name: str, train: bool) -> None:
    layer = hf_families.OwnLayer(name, torch.float32)
    x = hf_families.tokens(dtype=torch.float32)
    wide = copy.deepcopy(layer).double()
    ref = harness.results(wide, wide, x.double(), train)
    eager = harness.results(layer, layer, x, train)
    with harness.fresh_compilation():
        compiled = torch.compile(layer, backend=harness.BACKEND, fullgraph=True)
        got = harness.results(layer, compiled, x, train)
        harness.assert_rewritten(harness.snapshot(compiled), 1, train=train)
    harness.assert_all_match(got, ref, eager, name)


def test_no_class_is_missed() -> None:
    families = hf_families.families()
    assert sum(len(family.classes) for family in families) == hf_families.num_decorated()
    assert len({name for family in families for name in family.classes}) > 20
    known = {*model_page.OWN_EXPERTS, *model_page.OWN_REWRITTEN}
    assert set(hf_families.own_experts()) <= known, (
        f"transformers {transformers.__version__} has sparse models outside the shared interface "
        "that nobody has looked at"
    )


def test_the_page_is_current() -> None:
    text = model_page.PAGE.read_text()
    if f"## transformers {transformers.__version__}\n" not in text:
        pytest.skip(f"transformers {transformers.__version__} is not on the page")
    assert model_page.page(transformers.__version__, text) == text, "run make models"
