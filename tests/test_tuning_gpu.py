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

from comet_compile import refining
from comet_compile.cli import main
from comet_compile.kernels import ops, paths, tuned  # noqa: F401, registers the ops
from comet_compile.kernels.plan import read_device
from comet_compile.tuning_layer import LayerSize, TunedLayer, make_layer, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
OPTIONS = {
    "activation": "silu_glu",
    "weight_place": "after",
    "product_dtype": torch.float32,
    "form": "local",
    "group_name": "",
}
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


def test_the_first_use_of_a_shape_refines_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "tuned_folder", lambda: tmp_path)
    monkeypatch.setattr(paths, "refine", None)
    tuned.tables.cache_clear()
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return values.mul_(shape[-1] ** -0.5)

    x = torch.randn(700, 256, generator=generator, device="cuda", dtype=torch.bfloat16)
    weights, ids = torch.rand(700, 8, generator=generator, device="cuda").topk(2, -1)
    leaves = [x, weights, normal(8, 384, 256), normal(8, 256, 192)]

    def step() -> list[torch.Tensor]:
        inputs = [one.detach().requires_grad_() for one in leaves]
        y, saved, _ = torch.ops.comet.moe_layer(
            inputs[0], ids, inputs[1], inputs[2].transpose(1, 2), None, inputs[3].transpose(1, 2),
            *[None] * 4, **OPTIONS, out_dtype=torch.bfloat16, save="pre_activation",
        )  # fmt: skip
        grads = torch.ops.comet.moe_layer_backward(
            torch.ones_like(y), inputs[0], ids, inputs[1], inputs[2].transpose(1, 2), None,
            inputs[3].transpose(1, 2), *[None] * 3, saved, None, **OPTIONS,
            needs=[True, True, True, False, True, False, False, False],
        )  # fmt: skip
        return [y, *(one for one in grads[:8] if one.numel())]

    before = step()
    refining.switch_on(30.0)
    for one in (step(), step()):
        for got, expected in zip(one, before, strict=True):
            error = (got.float() - expected.float()).norm() / expected.float().norm()
            assert error < 0.01
    entries = json.loads(next(tmp_path.glob("nvidia*.json")).read_text())["entries"]
    assert {entry["direction"] for entry in entries} == {"forward", "backward"}
    assert all(entry["tried"] > 5 for entry in entries)
    tuned.tables.cache_clear()
