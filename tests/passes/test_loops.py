"""Python loops over the experts of a layer become the sparse layer that they are."""

from __future__ import annotations

import joint_graphs
import lockstep
import pytest
import torch
from torch import Tensor, fx, nn
from zoo import loops

aten = torch.ops.aten
T = 6

in_both_modes = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])


def tokens(hidden: int = loops.HIDDEN, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, T // 2, hidden, generator=generator).to(dtype)


def check(graph: fx.Graph, train: bool) -> fx.Node:
    """Require that the one layer is rewritten and computes the same; return its op."""
    rewritten = joint_graphs.clone(graph)
    counts = joint_graphs.run_pass(rewritten)
    expected = {"regions_found": 1, "regions_portable": 1}
    assert counts == expected | ({"regions_backward_portable": 1} if train else {})
    for seed in range(2):
        inputs = lockstep.random_inputs(graph, 1, seed, T)
        results = [lockstep.execute(g, inputs, 1) for g in (rewritten, graph)]
        assert not lockstep.differences(*results)
    return joint_graphs.only(rewritten, joint_graphs.MOE)


def assert_refused(layer: nn.Module, reason: str, train: bool) -> None:
    graph = joint_graphs.capture(layer, tokens(), train=train)
    before = joint_graphs.listing(graph)
    assert joint_graphs.rejections(joint_graphs.run_pass(graph)) == [reason]
    assert joint_graphs.listing(graph) == before, "a refused region is left as it was"


@in_both_modes
@pytest.mark.parametrize("name", loops.REWRITTEN)
def test_rewritten(name: str, train: bool) -> None:
    layer = loops.REWRITTEN[name]()
    op = check(joint_graphs.capture(layer, tokens(), train=train), train)
    assert op.kwargs["weight_place"] == ("before" if name == "weights_before" else "after")
    gelu = name.endswith("biases")
    assert op.kwargs["activation"] == ("gelu" if gelu else "silu_glu")
    assert [table is not None for table in op.args[6:9]] == [gelu, False, gelu]


@in_both_modes
@pytest.mark.parametrize("name", loops.REFUSED)
def test_refused(name: str, train: bool) -> None:
    layer, reason = loops.REFUSED[name]
    assert_refused(layer(), reason, train)
