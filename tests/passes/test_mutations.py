"""Accepted regions, broken one thing at a time: a broken region is never replaced.

The judge is independent of the prover: the broken graph and what the pass made of it are run
node by node on dense random numbers, for all ranks (`lockstep.py`). A changed graph may be
rewritten only into exactly what it computes. That happens where the change lies at the region's
border, so that the region proper is as it was (a gradient scaled after it was made, another order
of a whole stack of experts), or where it makes another correct layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable

import joint_graphs
import lockstep
import mutations
import pytest
import torch
from mutations import Mutation
from torch import fx, nn
from zoo import all_experts, near_misses
from zoo.textbook import FuncolMoE, InPlaceFunctionMoE
from zoo.titan import TitanMoE

from comet_compile.passes import find

NUM_TOKENS = 6
HIDDEN = 32
SEEDS = (0, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer that is accepted; `tries` mutations of it, of which `refused` at least are broken
    and refused."""

    name: str
    model: Callable[[], nn.Module]
    train: bool
    tries: int
    refused: int
    world_size: int = 1
    batched_input: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{'training' if self.train else 'inference'}"


def _hf(name: str, implementation: str, train: bool, tries: int, refused: int) -> Case:
    model = functools.partial(joint_graphs.small_block, name, implementation)
    kind = implementation.removesuffix("_mm")
    return Case(f"{name}_{kind}", model, train, tries, refused, batched_input=True)


def _two_layers() -> nn.Module:
    return nn.Sequential(near_misses.LocalMoE(), near_misses.LocalMoE())


def _float32_experts() -> nn.Module:
    """Experts whose GEMMs are an op of transformers."""
    return joint_graphs.small_block("mixtral", "grouped_mm", torch.float32)


CASES = (
    Case("local", near_misses.LocalMoE, False, 50, 30),
    Case("local", near_misses.LocalMoE, True, 44, 28),
    # what is proven of one layer must not be taken for its broken twin
    Case("two_layers", _two_layers, True, 20, 10),
    Case("batched", near_misses.BatchedMoE, False, 44, 18),
    Case("batched", near_misses.BatchedMoE, True, 40, 20),
    Case("all_experts", all_experts.AllExperts, False, 44, 18, batched_input=True),
    Case("all_experts", all_experts.AllExperts, True, 40, 16, batched_input=True),
    Case("all_experts_after", all_experts.WeightedSum, True, 30, 12, batched_input=True),
    _hf("mixtral", "grouped_mm", False, 30, 15),
    _hf("gpt_oss", "grouped_mm", False, 12, 6),
    _hf("gpt_oss", "batched_mm", True, 8, 4),
    Case("mixtral_float32", _float32_experts, True, 16, 8, batched_input=True),
    Case("titan", TitanMoE, False, 20, 10, 2),
    Case("titan", TitanMoE, True, 10, 5, 2),
    Case("funcol", FuncolMoE, False, 15, 8, 2),
    Case("funcol", FuncolMoE, True, 8, 4, 2),
    Case("in_place_function", InPlaceFunctionMoE, True, 8, 4, 2),
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """An accepted graph, the names of the nodes that the pass replaces, inputs and results."""

    case: Case
    graph: fx.Graph
    num_regions: int
    region: frozenset[str]
    inputs: list[dict[str, lockstep.Ranked]]
    results: list[list[list[object]]]


def make_subject(case: Case) -> Subject:
    shape = (1, NUM_TOKENS, HIDDEN) if case.batched_input else (NUM_TOKENS, HIDDEN)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator).bfloat16()
    graph = joint_graphs.capture(case.model(), x, train=case.train)
    rewritten = joint_graphs.clone(graph)
    num_regions = joint_graphs.num_rewritten(joint_graphs.run_pass(rewritten))
    assert num_regions > 0
    kept = {node.name for node in rewritten.nodes}
    inputs = [lockstep.random_inputs(graph, case.world_size, seed, NUM_TOKENS) for seed in SEEDS]
    results = [lockstep.execute(graph, i, case.world_size) for i in inputs]
    subject = Subject(
        case, graph, num_regions, frozenset({n.name for n in graph.nodes} - kept), inputs, results
    )
    assert not differs(subject, rewritten, results), "the rewritten graph computes the same"
    return subject


def differs(subject: Subject, graph: fx.Graph, results: list[list[list[object]]]) -> str:
    """Where `graph` gives something else than `results`, or an empty string."""
    for inputs, expected in zip(subject.inputs, results, strict=True):
        actual = lockstep.execute(graph, inputs, subject.case.world_size)
        difference = lockstep.differences(actual, expected)
        if difference:
            return difference
    return ""


def verdict(subject: Subject, mutation: Mutation) -> str:
    """What became of one mutation; verdicts in capitals are bugs."""
    mutant = joint_graphs.clone(subject.graph)
    try:
        mutations.mutate(mutant, mutation)
    except mutations.Inapplicable:
        return "inapplicable"
    rewritten = joint_graphs.clone(mutant)
    before = joint_graphs.listing(rewritten)
    num_rewritten = joint_graphs.num_rewritten(joint_graphs.run_pass(rewritten))
    if num_rewritten == 0 and joint_graphs.listing(rewritten) != before:
        return "REFUSED BUT CHANGED"
    refused = num_rewritten < subject.num_regions
    try:
        results = [lockstep.execute(mutant, i, subject.case.world_size) for i in subject.inputs]
    except (RuntimeError, IndexError, AssertionError, TypeError) as error:
        return "broken and refused" if refused else f"ACCEPTED, IT FAILS: {error}"
    wrong = differs(subject, rewritten, results) if num_rewritten else ""
    if wrong:
        return f"WRONG: {wrong}"
    broken = mutation.kind in mutations.SILENT_KINDS or any(
        lockstep.differences(changed, own)
        for changed, own in zip(results, subject.results, strict=True)
    )
    if refused:
        return "broken and refused" if broken else "refused though equal"
    return "rewritten to the same" if broken else "equal and rewritten"


def judge(subject: Subject, chosen: Iterable[Mutation]) -> Counter[str]:
    """Count verdicts, and fail with a list of the mutations that show a bug."""
    counts: Counter[str] = Counter()
    bugs = []
    nodes = {node.name: node for node in subject.graph.nodes}
    for mutation in chosen:
        found = verdict(subject, mutation)
        counts[found] += 1
        if found[:2].isupper():
            bugs.append(f"{mutation}: {found}: {nodes[mutation.node].format_node()}")
    assert not bugs, "\n".join(bugs)
    return counts


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Iterable[Case]:
    group = (
        joint_graphs.fake_group(request.param.world_size)
        if request.param.world_size > 1
        else contextlib.nullcontext()
    )
    with group:
        yield request.param


def test_broken_regions_are_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # the first cuts of a region are the likely ones; the slow test below tries all
    monkeypatch.setattr(find, "_MAX_CANDIDATES", 5)
    subject = make_subject(case)
    found = list(mutations.mutations(subject.graph, subject.region))
    counts = judge(subject, mutations.sampled(found, case.tries, seed=0))
    assert counts["broken and refused"] >= case.refused, counts


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_broken_region_is_refused(case: Case) -> None:
    subject = make_subject(case)
    counts = judge(subject, mutations.mutations(subject.graph, subject.region))
    assert counts["broken and refused"] >= case.refused, counts


def test_at_least_two_hundred_are_broken_and_refused() -> None:
    assert sum(case.refused for case in CASES) >= 200
