"""Layers that run all experts on all tokens become the sparse layer that they are."""

from __future__ import annotations

from collections.abc import Callable

import joint_graphs
import lockstep
import pytest
import torch
from torch import Tensor, fx, nn
from zoo import all_experts

aten = torch.ops.aten
T = 6

in_both_modes = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
Layer = Callable[..., all_experts.AllExperts]


def tokens(
    batch: int = 2,
    seq: int = 3,
    hidden: int = all_experts.HIDDEN,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, seq, hidden, generator=generator).to(dtype)


def check(graph: fx.Graph, train: bool, num_tokens: int = T) -> fx.Node:
    """Require that the one layer is rewritten and computes the same; return its op."""
    rewritten = joint_graphs.clone(graph)
    counts = joint_graphs.run_pass(rewritten)
    expected = {"regions_found": 1, "regions_portable": 1}
    assert counts == expected | ({"regions_backward_portable": 1} if train else {})
    assert joint_graphs.nodes_of(rewritten, aten.bmm.default) == []
    for seed in range(2):
        inputs = lockstep.random_inputs(graph, 1, seed, num_tokens)
        results = [lockstep.execute(g, inputs, 1) for g in (rewritten, graph)]
        assert not lockstep.differences(*results)
    return joint_graphs.only(rewritten, joint_graphs.MOE)


@in_both_modes
@pytest.mark.parametrize("name", all_experts.REWRITTEN)
def test_rewritten(name: str, train: bool) -> None:
    layer = all_experts.REWRITTEN[name]()
    op = check(joint_graphs.capture(layer, tokens(), train=train), train)
    assert op.kwargs["weight_place"] == ("after" if name.startswith("after") else "before")
    assert op.kwargs["activation"] == "silu_glu"
    ids, weights = op.args[1:3]
    assert list(ids.meta["val"].shape) == list(weights.meta["val"].shape) == [T, layer.top_k]
    biases = [table is not None for table in op.args[6:9]]
    assert biases == ([True, False, True] if name == "after_biases" else [False] * 3)


@in_both_modes
@pytest.mark.parametrize("name", ["llama4", "after_einsum"])
def test_float32(name: str, train: bool) -> None:
    layer = all_experts.REWRITTEN[name](dtype=torch.float32)
    check(joint_graphs.capture(layer, tokens(dtype=torch.float32), train=train), train)


@in_both_modes
@pytest.mark.parametrize("name", ["llama4", "mask", "after_einsum", "after_sum"])
def test_symbolic_number_of_tokens(name: str, train: bool) -> None:
    layer = all_experts.REWRITTEN[name]()
    graph = joint_graphs.capture(layer, tokens(), train=train, dynamic=True)
    counts = joint_graphs.run_pass(graph)
    assert joint_graphs.is_rewritten(counts), counts
    assert joint_graphs.nodes_of(graph, aten.bmm.default) == []


# tokens [batch, seq], experts, ids per token, hidden, intermediate: of which some are equal
COINCIDING = {
    "T=E": (1, 8, 8, 2, 24, 40),
    "T=E,S=1": (8, 1, 8, 2, 24, 40),
    "T=A": (1, 2, 8, 2, 24, 40),
    "T=1": (1, 1, 8, 2, 24, 40),
    "A=1": (1, 6, 8, 1, 24, 40),
    "TA=E": (1, 4, 8, 2, 24, 40),
    "T=H": (1, 24, 8, 2, 24, 40),
    "T=E=H": (1, 24, 24, 2, 24, 40),
    "H=2I": (1, 6, 8, 2, 16, 8),
    "2I=E=T": (1, 16, 16, 2, 24, 8),
    "E=A": (1, 6, 4, 4, 24, 40),
    "E=A=T": (1, 4, 4, 4, 24, 40),
    "E=1": (1, 6, 1, 1, 24, 40),
    "T=E=H=I": (1, 8, 8, 2, 8, 8),
}


@in_both_modes
@pytest.mark.parametrize("name", ["llama4", "after_sum"])
@pytest.mark.parametrize("sizes", COINCIDING)
def test_coinciding_sizes(sizes: str, name: str, train: bool) -> None:
    batch, seq, experts, top_k, hidden, inner = COINCIDING[sizes]
    layer = all_experts.REWRITTEN[name](experts, top_k, hidden, inner)
    x = tokens(batch, seq, hidden)
    check(joint_graphs.capture(layer, x, train=train), train, batch * seq)


def assert_refused(layer: nn.Module, reason: str, train: bool) -> None:
    graph = joint_graphs.capture(layer, tokens(), train=train)
    before = joint_graphs.listing(graph)
    counts = joint_graphs.run_pass(graph)
    assert joint_graphs.rejections(counts) == [reason]
    assert counts["regions_found"] == counts["regions_rejected"] == 1
    assert joint_graphs.listing(graph) == before, "a refused region is left as it was"


@in_both_modes
@pytest.mark.parametrize("name", all_experts.REFUSED)
def test_refused(name: str, train: bool) -> None:
    layer, reason = all_experts.REFUSED[name]
    assert_refused(layer(), reason, train)


@pytest.mark.parametrize("name", all_experts.REFUSED_IN_TRAINING)
def test_refused_in_training(name: str) -> None:
    layer, reason = all_experts.REFUSED_IN_TRAINING[name]
    check(joint_graphs.capture(layer(), tokens(), train=False), train=False)
    assert_refused(layer(), reason, train=True)


@in_both_modes
def test_scores_are_proven_for_each_layer(train: bool) -> None:
    """Behind the scores, the two regions are the same expression."""
    model = nn.Sequential(all_experts.AllExperts(), all_experts.FiniteFill())
    graph = joint_graphs.capture(model, tokens(), train=train)
    counts = joint_graphs.run_pass(graph)
    assert counts["regions_found"] == 2
    assert counts["regions_portable"] == counts["rejected.not_equivalent"] == 1


def test_the_rows_of_all_experts_count() -> None:
    graph = joint_graphs.capture(all_experts.AllExperts(), tokens(), train=False)
    rows = T * all_experts.NUM_EXPERTS
    counts = joint_graphs.run_pass(joint_graphs.clone(graph), max_proof_rows=rows - 1)
    assert joint_graphs.rejections(counts) == ["too_large"]
    assert joint_graphs.is_rewritten(joint_graphs.run_pass(graph, max_proof_rows=rows))


class Heads(nn.Module):
    """Small networks on the same tokens, summed: no experts, though products with stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 32, 48))
        self.second = nn.Parameter(torch.randn(4, 48, 32))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.bmm(x.expand(4, -1, -1), self.first).relu()
        return torch.bmm(rows, self.second).sum(0)


class Embedded(Heads):
    """The same behind integers that enter the graph, and that no expert has as its number."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 32))

    def forward(self, words: Tensor) -> Tensor:
        return super().forward(self.table[words])


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.bmm(torch.softmax(torch.bmm(query, key.mT), -1), value)


@in_both_modes
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Heads(), (torch.randn(6, 32),)),
        (Embedded(), (torch.arange(6),)),
        (attention, (torch.randn(4, 6, 8),) * 3),
    ],
    ids=["heads", "embedded", "attention"],
)
def test_products_that_are_no_experts(model: Callable, inputs: tuple, train: bool) -> None:
    graph = joint_graphs.capture(model, *inputs, train=train)
    before = joint_graphs.listing(graph)
    assert joint_graphs.run_pass(graph) == {}
    assert joint_graphs.listing(graph) == before
