"""`comet.refine`: which calls search, within what time, and what is done with what was found."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="plans need Triton")

from comet_compile import refining, tuning_layer
from comet_compile.config import CometConfig
from comet_compile.errors import CometWarning, OptionError
from comet_compile.kernels import fused, paths, tuned
from comet_compile.kernels.activation import Activation
from comet_compile.kernels.cost_model import H100
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.portable import Routed

MATH = LayerMath(Activation.parse("silu_glu"), "after", torch.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder of tables, on a machine with an H100."""
    monkeypatch.setattr(tuned, "tuned_folder", lambda: tmp_path)
    monkeypatch.setattr(tuned, "shipped_file", lambda device: tmp_path / "shipped" / "none.json")
    monkeypatch.setattr(fused, "read_device", lambda index: H100.device)
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.tables.cache_clear()
    yield tmp_path
    tuned.tables.cache_clear()


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans that were measured: by a clock that likes wide groups of layer0."""
    plans: list[Any] = []

    def measure(layer: Any, some: Sequence[Any], repeats: int) -> list[float]:
        assert layer.alone, "no other rank may be waited for"
        plans.extend(some)
        return [100.0 + 5 * abs(math.log2(one.layer0.group_m / 32)) for one in some]

    monkeypatch.setattr(tuning_layer, "measure", measure)
    return plans


def layer(num_tokens: int = 4096) -> tuple[Routed, ExpertParams, LayerMath]:
    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
            return torch.empty(shape, dtype=dtype, device="cuda")

        routed = Routed(
            empty(num_tokens, 2048),
            empty(num_tokens, 8, dtype=torch.int64),
            empty(num_tokens, 8, dtype=torch.float32),
        )
        w_in, w_out = empty(128, 1536, 2048), empty(128, 2048, 768)
        return routed, ExpertParams(w_in.transpose(1, 2), None, w_out.transpose(1, 2)), MATH


def refined(seconds: float, num_tokens: int = 4096) -> tuple[Any, Any]:
    """(the rule's plan, what a refiner makes of it)."""
    args = layer(num_tokens)
    plan = fused.plan_layer(*args)
    return plan, refining.Refiner(seconds)("forward", plan, *args, lambda plan: ())


def test_what_is_faster_is_taken_and_kept(folder: Path, tried: list[Any]) -> None:
    plan, found = refined(60.0)
    assert plan.layer0.group_m != 32
    assert found.layer0.group_m == 32
    assert found.source == "refined when it was first used"
    (entry,) = json.loads(tuned.cached_file(H100.device).read_text())["entries"]
    assert entry["changes"] == {"layer0.group_m": 32}
    assert entry["complete"]
    # the next process finds it in the table, and does not search
    tuned.tables.cache_clear()
    tried.clear()
    known, again = refined(60.0)
    assert known.layer0.group_m == 32
    assert again is known
    assert tried == []


def test_a_spent_budget_ends_the_search_and_keeps_what_it_has(
    folder: Path, tried: list[Any]
) -> None:
    refined(60.0)
    whole = len(tried)
    tuned.cached_file(H100.device).unlink()
    tried.clear()
    refined(1e-9)
    # one candidate, and the comparison at the end
    assert 2 <= len(tried) <= 4 < whole
    (entry,) = json.loads(tuned.cached_file(H100.device).read_text())["entries"]
    assert not entry["complete"]


def test_where_nothing_is_faster_the_rule_stands(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_layer, "measure", lambda layer, plans, repeats: [7.0] * len(plans))
    plan, found = refined(60.0)
    assert found is plan


def test_a_folder_that_cannot_be_written_is_named(
    folder: Path, tried: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").write_text("")
    monkeypatch.setattr(tuned, "tuned_folder", lambda: folder / "file" / "tuned")
    with pytest.warns(CometWarning, match="is not kept"):
        _, found = refined(60.0)
    assert found.layer0.group_m == 32


def test_a_layer_asks_once_in_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def refine(direction: str, plan: Any, *rest: Any) -> Any:
        asked.append((direction, plan))
        return f"{plan}, {direction} refined"

    class Kernels:
        def local_forward(self, *args: Any, save: bool, plan: Any) -> Any:
            return torch.empty(0), plan

        def local_backward(self, *args: Any, frees: bool = False) -> Any:
            return args[6]

    monkeypatch.setattr(paths, "refine", refine)
    monkeypatch.setattr(paths, "_refined", set())
    monkeypatch.setattr(paths, "plan_here", lambda *args, **options: paths._plans[KEY])
    monkeypatch.setattr(paths, "_plans", {KEY: "rule"})
    monkeypatch.setattr(paths, "fused", Kernels)
    monkeypatch.setattr(paths, "fused_backward", Kernels)
    monkeypatch.setattr(paths, "replay", lambda key, tensors, call, *rest: call())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    args = layer(1)
    grad_y = torch.empty(1, 1)

    def forward() -> Any:
        return paths.local_forward(*args, torch.bfloat16, save=True, number=3)[1]

    def backward() -> Any:
        return paths.local_backward(grad_y, args[0], grad_y, *args[1:], None, 3)  # type: ignore[arg-type]

    monkeypatch.setattr(paths, "on_device", lambda device: contextlib.nullcontext())
    capturing = True
    assert forward() == "rule"
    assert asked == [], "a graph that is captured holds no search"
    capturing = False
    assert forward() == forward() == "rule, forward refined"
    assert backward() == backward() == "rule, forward refined, backward refined"
    assert asked == [("forward", "rule"), ("backward", "rule, forward refined")]


KEY = paths._plan_key(3, alone=True)


def test_the_option_is_off_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CometConfig().refine is None
    monkeypatch.setattr(paths, "refine", None)
    config, _ = CometConfig.from_options({"comet.refine": 2.5}, environ={})
    assert config.fingerprint() == CometConfig().fingerprint(), "graphs are the same"
    refining.switch_on(2.5)
    assert paths.refine == refining.Refiner(2.5)
    with pytest.raises(OptionError, match="a positive number of seconds"):
        CometConfig.from_options({"comet.refine": 0}, environ={})
