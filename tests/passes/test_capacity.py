"""Layers whose experts have room for so many rows: the same tokens are dropped, bit for bit."""

from __future__ import annotations

import joint_graphs
import lockstep
import pytest
import torch
from torch import Tensor, fx
from torch._inductor.fx_passes import joint_graph
from zoo import all_experts, capacity

from comet_compile import records

aten = torch.ops.aten
T = 12

in_both_modes = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])


def tokens(num_tokens: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, all_experts.HIDDEN, generator=generator).bfloat16()


def assert_same(graph: fx.Graph, rewritten: fx.Graph) -> None:
    """Require equal results for random tokens and routers, many of whose tokens are dropped."""
    for seed in range(4):
        inputs = lockstep.random_inputs(graph, 1, seed, T)
        results = [lockstep.execute(g, inputs, 1) for g in (rewritten, graph)]
        assert not lockstep.differences(*results)


@in_both_modes
@pytest.mark.parametrize("name", capacity.REWRITTEN)
def test_rewritten(name: str, train: bool) -> None:
    graph = joint_graphs.capture(capacity.REWRITTEN[name](), tokens(), train=train)
    rewritten = joint_graphs.clone(graph)
    with records.collect() as collected:
        counts = joint_graphs.run_pass(rewritten)
    expected = {"regions_found": 1, "regions_portable": 1}
    assert counts == expected | ({"regions_backward_portable": 1} if train else {})
    for product in (aten.bmm, aten.mm):
        left = joint_graphs.nodes_of(rewritten, product.default)
        assert all("router" in str(n.meta.get("stack_trace")) for n in left)
    assert_same(graph, rewritten)
    (region,) = collected[0].regions
    assert ("beyond a capacity" in region.detail) == (name != "roomy")


@in_both_modes
@pytest.mark.parametrize("name", ["choices_first", "tokens_first"])
def test_symbolic_number_of_tokens(name: str, train: bool) -> None:
    layer = capacity.REWRITTEN[name]()
    graph = joint_graphs.capture(layer, tokens(), train=train, dynamic=True)
    rewritten = joint_graphs.clone(graph)
    assert joint_graphs.is_rewritten(joint_graphs.run_pass(rewritten))
    assert joint_graphs.nodes_of(rewritten, aten.bmm.default) == []


@in_both_modes
@pytest.mark.parametrize("name", capacity.REFUSED)
def test_refused(name: str, train: bool) -> None:
    graph = joint_graphs.capture(capacity.REFUSED[name](), tokens(), train=train)
    before = joint_graphs.listing(graph)
    counts = joint_graphs.run_pass(graph)
    # a one-hot tensor of weights is not followed to the tokens
    reason = "no_tokens" if name == "one_hot_weighted" else "not_equivalent"
    assert counts == {"regions_found": 1, "regions_rejected": 1, f"rejected.{reason}": 1}
    assert joint_graphs.listing(graph) == before


@in_both_modes
@pytest.mark.parametrize("name", ["one_hot", "one_hot_loop"])
def test_products_of_one_matrix(name: str, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs Inductor makes products of matrices of einsum's batches of one."""
    monkeypatch.setattr(joint_graph, "get_gpu_type", lambda: "cpu")
    graph = joint_graphs.capture(capacity.REWRITTEN[name](), tokens(), train=train)
    assert all(n.meta["val"].shape[0] != 1 for n in joint_graphs.nodes_of(graph, aten.bmm.default))
    rewritten = joint_graphs.clone(graph)
    counts = joint_graphs.run_pass(rewritten)
    assert joint_graphs.num_rewritten(counts) == 1
    assert_same(graph, rewritten)


def test_compiled() -> None:
    layer, x = capacity.Capacity(), tokens()
    expected = layer(x)
    got = torch.compile(layer, backend="comet", fullgraph=True)(x)
    dropped = (expected == 0).all(1)
    assert dropped.any(), "else the layer drops no token altogether"
    assert torch.equal((got == 0).all(1), dropped)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
