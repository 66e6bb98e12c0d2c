"""Expert parallel layers as other frameworks write them: rewritten, or refused for their reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed.gloo import RankPool
from e2e import harness
from zoo import ep, frameworks

from comet_compile import records

REWRITTEN: dict[str, dict[str, int]] = {
    "MegatronAllToAll": {},
    "MegaBlocks": {},
    "TitanPadded": {},
    "GatherReduceScatter": {},
    "DeepSpeedCapacity": {},
    "GShard": {},
    "Tutel": {},
    "FairseqBase": {"num_experts": 2, "top_k": 1},
}
# why not, in how many graphs
REFUSED = {
    # who goes where is a map over the tokens of all ranks: no ids [T, top_k] lead to it
    "MegatronAllGather": ("not_equivalent", 1),
    # splits that the host reads, and a list of chunks: Dynamo breaks the graph at each
    "MegatronChunks": ("no_expert_ids", None),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_layer(name: str, pair: RankPool) -> None:
    pair.run(_layer, name)


def _layer(rank: int, world_size: int, name: str) -> None:
    layer = getattr(frameworks, name)(**REWRITTEN[name])
    step = [ep.tokens(24, seed=10 + peer) for peer in range(world_size)]
    outcome = harness.compare_with_oracle(layer, [step], rank=rank, train=True)
    assert outcome.graphs == 1
    harness.assert_rewritten(outcome, 1, train=True)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_layer(name: str, pair: RankPool) -> None:
    reason, num_graphs = REFUSED[name]
    for found, graphs in pair.run(_refused, name):
        assert set(found) == {reason}
        assert num_graphs in (None, graphs)


def _refused(rank: int, world_size: int, name: str) -> tuple[list[Any], int]:
    layer = getattr(frameworks, name)()
    x = ep.tokens(24, seed=10 + rank)
    with torch.no_grad(), harness.fresh_compilation(), records.collect() as graphs:
        y = torch.compile(layer, backend="comet")(x)
        assert torch.equal(y, layer(x)), "what is refused is left as it was"
    return [region.reason for graph in graphs for region in graph.regions], len(graphs)
