"""A rank's experts, by the ids of all ranks' experts: where they begin is proven."""

from __future__ import annotations

import joint_graphs
import lockstep
import pytest
import torch
from torch import Tensor
from zoo import ep
from zoo.near_misses import LocalMoE

aten = torch.ops.aten
T, LOCAL = 9, 4


class Share(LocalMoE):
    """The experts from `first` on of three times as many; tokens that chose others get zeros.

    `masked_from` is `first`, unless somebody slipped.
    """

    def __init__(self, first: int, masked_from: int | None = None) -> None:
        super().__init__(num_experts=LOCAL)
        self.first = first
        self.masked_from = first if masked_from is None else masked_from
        self.gate = torch.nn.Parameter(ep.expert_weights(3 * LOCAL)["gate"])

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        scores, ids = ep.route(x, self.gate, self.top_k)
        is_mine = (ids >= self.masked_from) & (ids < self.masked_from + LOCAL)
        flat = torch.where(is_mine, ids - self.first, LOCAL).reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.zeros(LOCAL + 1, dtype=torch.int64).scatter_add(
            0, flat, torch.ones_like(flat)
        )
        mine = is_mine.reshape(-1)[order].unsqueeze(1)
        token = order // self.top_k
        rows = torch.where(mine, x[token], 0.0)
        out = torch.where(mine, self.ffn(rows, counts[:-1].cumsum(0).to(torch.int32)), 0.0)
        weight = torch.where(mine, scores.reshape(-1)[order].unsqueeze(1), 0.0)
        return torch.zeros_like(x).index_add(0, token, (out * weight).to(x.dtype))


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("first", [0, LOCAL, 2 * LOCAL])
def test_a_share_of_the_experts_is_a_layer(first: int, train: bool) -> None:
    graph = joint_graphs.capture(Share(first), ep.tokens(T), train=train)
    rewritten = joint_graphs.clone(graph)
    assert joint_graphs.num_rewritten(joint_graphs.run_pass(rewritten)) == 1
    for seed in range(3):
        inputs = lockstep.random_inputs(graph, 1, seed, T)
        results = [lockstep.execute(g, inputs, 1) for g in (rewritten, graph)]
        assert not lockstep.differences(*results)
    ids = joint_graphs.only(rewritten, joint_graphs.MOE).args[1]
    if first:
        assert ids.target is aten.sub.Tensor
        assert ids.args[1] == first


@pytest.mark.parametrize("masked_from", [LOCAL - 1, LOCAL + 1])
def test_a_mask_beside_the_share_is_refused(masked_from: int) -> None:
    graph = joint_graphs.capture(Share(LOCAL, masked_from), ep.tokens(T), train=False)
    counts = joint_graphs.run_pass(graph)
    assert joint_graphs.num_rewritten(counts) == 0
    assert counts["regions_rejected"] == 1
