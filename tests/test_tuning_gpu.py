"""`comet tune` on a GPU: plans are really run, compared and timed, and a fused call takes them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton", reason="plans need Triton")

from comet_compile.cli import main
from comet_compile.kernels import tuned
from comet_compile.kernels.plan import read_device
from comet_compile.tuning_layer import LayerSize, TunedLayer, make_layer, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZE = LayerSize(hidden=256, inter=128, experts=8, top_k=2, tokens=512)


@pytest.mark.parametrize("backward", [False, True])
def test_plans_are_timed_and_wrong_or_too_large_ones_are_not(backward: bool) -> None:
    layer = make_layer(SIZE, None, backward=backward)
    gemm = "grad_weight" if backward else "layer1"
    tiles = getattr(layer.plan, gemm)

    def with_tiles(**changes: int) -> object:
        return dataclasses.replace(layer.plan, **{gemm: dataclasses.replace(tiles, **changes)})

    same, other, huge = measure(
        layer, [layer.plan, with_tiles(num_stages=2), with_tiles(num_stages=40)], repeats=3
    )
    assert 0 < same < math.inf
    assert 0 < other < math.inf
    assert huge == math.inf

    def garbled(plan: object) -> tuple[torch.Tensor | None, ...]:
        results = layer.run(plan)
        if plan is layer.plan:
            return results
        return tuple(None if one is None else one * 1.1 for one in results)

    wrong = TunedLayer(layer.plan, garbled)
    assert measure(wrong, [with_tiles(num_stages=2)], repeats=1) == [math.inf]


def test_the_command_tunes_and_a_call_takes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    arguments = ["tune", "--shapes", "256x128x8x2", "--tokens", "512", "--out", str(path)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text())
    assert [entry["complete"] for entry in document["entries"]] == [True, True]
    # whatever was faster here, a call takes a plan that the file names
    document["entries"][0]["changes"]["layer0.group_m"] = 4
    path.write_text(json.dumps(document))
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    tuned.tables.cache_clear()
    layer = make_layer(SIZE, None, backward=False)
    shape = tuned.Shape(**document["entries"][0]["shape"])
    plan = tuned.apply(layer.plan, shape, read_device(torch.cuda.current_device()))
    assert plan.source == f"planned by {path}"
    assert plan.layer0.group_m == 4
    layer.run(plan)
    torch.cuda.synchronize()
