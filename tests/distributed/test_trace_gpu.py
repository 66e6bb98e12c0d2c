"""`comet trace` between two GPUs: what is noted is what was done, and when."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.gloo import run_ranks

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

SIZE = {"hidden": 1024, "inter": 512, "experts": 8, "top_k": 4, "tokens": 2000}


def trace_main(rank: int, num_ranks: int) -> dict[str, Any]:
    from comet_compile.kernels.schedule import overlap_of
    from comet_compile.kernels.workspace import workspace_for
    from comet_compile.tracer import trace_layer
    from comet_compile.tuning_layer import LayerSize, make_layer

    size = LayerSize(**SIZE)
    layer = make_layer(size, dist.group.WORLD, backward=False)
    before = layer.run(layer.plan)[0]
    traced = trace_layer(size, dist.group.WORLD)
    workspace = workspace_for(0, dist.group.WORLD, torch.device("cuda", rank))
    after = make_layer(size, dist.group.WORLD, backward=False)
    spans = traced.schedule.spans
    return {
        "same": bool(torch.equal(before, after.run(after.plan)[0])),
        "off": workspace.trace is None,
        "lost": traced.num_lost,
        "us": (traced.us_without, traced.us, traced.schedule.total_us),
        "num_ctas": traced.schedule.num_ctas,
        "hidden": [overlap_of(spans, one, traced.schedule.num_ctas) for one in range(num_ranks)],
        "spans": [dataclasses.astuple(span) for span in spans] if rank == 0 else [],
    }


def test_every_cta_of_both_ranks_is_on_one_time_line() -> None:
    found = run_ranks(trace_main, 2, backend="nccl")
    for one in found:
        assert one["same"]
        assert one["off"]
        assert one["lost"] == 0
        without, with_stamps, total = one["us"]
        assert with_stamps < 1.5 * without + 50
        # from the first stamp to the last is less than from one event to the other, on one clock
        assert total < 1.5 * with_stamps + 100
        assert all(0 <= part <= 1 for part in one["hidden"])
    spans, num_ctas = found[0]["spans"], found[0]["num_ctas"]
    for rank in range(2):
        own = [span for span in spans if span[0] == rank]
        assert {span[1] for span in own} == set(range(num_ctas))
        assert {span[2] for span in own} >= {"multiply", "fetch", "send"}
        for layer in ("layer0", "layer1"):
            tiles = [span[3] for span in own if span[3].startswith(f"{layer}, tile")]
            assert len(tiles) == len(set(tiles)) > 100
        # a rank adds up its tokens once the peer has sent: both clocks show it
        sent = max(span[5] for span in spans if span[0] != rank and span[2] == "send")
        begun = min(span[4] for span in own if span[3] == "add up own tokens")
        assert begun > sent - 10
