"""Every class of experts in the installed transformers is rewritten, or refused for a known reason.

The classes are read from the package, so what a new release adds fails here by name. The page in
benchmarks/results is made by benchmarks/families.py from the same outcomes.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import transformers
from e2e import harness
from zoo import hf_families
from zoo.hf_families import Family

from comet_compile import records

FAMILIES = [pytest.param(family, id=family.name) for family in hf_families.families()]

# What is left as it is, and the reason that comet gives.
REFUSED = {
    ("Inkling2Experts", "grouped_mm"): "unknown_activation",  # SwiGLU with soft caps
    ("Inkling2Experts", "batched_mm"): "unknown_activation",
    # a norm over each expert's row, which batched_mm takes of rows in the order of their tokens
    ("MuseSparkExperts", "grouped_mm"): "not_equivalent",
}
# Models with loops or matrices of their own; none of them is rewritten yet.
OWN_EXPERTS = {
    "aria", "dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7",
    "switch_transformers", "vitpose_backbone",
}  # fmt: skip


def check(family: Family, implementation: str, *, train: bool) -> None:
    layer = hf_families.layer(family, implementation)
    with records.collect() as graphs:
        outcome = harness.compile_and_compare(layer, [hf_families.tokens()], train=train)
    reason = REFUSED.get((family.name, implementation))
    if reason is None:
        harness.assert_rewritten(outcome, 1, train=train)
    else:
        assert [one.reason for graph in graphs for one in graph.regions] == [reason]


@pytest.mark.parametrize("family", FAMILIES)
def test_inference(family: Family) -> None:
    check(family, "grouped_mm", train=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_training(family: Family) -> None:
    check(family, "grouped_mm", train=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_batched_mm(family: Family) -> None:
    check(family, "batched_mm", train=True)


def test_no_class_is_missed() -> None:
    families = hf_families.families()
    assert sum(len(family.classes) for family in families) == hf_families.num_decorated()
    assert len({name for family in families for name in family.classes}) > 20
    assert set(hf_families.own_experts()) <= OWN_EXPERTS, (
        f"transformers {transformers.__version__} has sparse models outside the shared interface "
        "that nobody has looked at"
    )
