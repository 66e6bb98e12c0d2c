"""The example that trains a language model: what it writes, and that it fails when it should."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from distributed.gloo import RankPool

SCRIPT = Path(__file__).parents[2] / "examples" / "train_lm.py"
STEPS = 12


def load() -> Any:
    spec = importlib.util.spec_from_file_location("train_lm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Any:
    return load()


@contextlib.contextmanager
def without_codegen() -> Iterator[None]:
    """Let Inductor's code call PyTorch's kernels, so that no compiler is waited for, or a cache."""
    with (
        torch._inductor.config.patch(
            fallback_by_default=True, compile_threads=1, fx_graph_cache=False
        ),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@pytest.fixture
def no_codegen() -> Iterator[None]:
    with without_codegen():
        yield


def curve(*tail: float) -> list[float]:
    return [5.0 - 0.1 * step for step in range(20 - len(tail))] + list(tail)


def make_runs(script: ModuleType, num_steps: int = 20) -> dict[str, Any]:
    """Runs that are all alike, but for nudged ones that leave eager's last loss by 0.01."""
    layers = {"compiled": 2, "forward fused": 1, "forward portable": 1, "backward fused": 0}
    layers["backward portable"] = 2
    runs = {
        name: script.Run(*(curve()[:num_steps] for _ in range(3)), (5.5, 3.0), dict(layers))
        for name in script.RUNS
    }
    for name in script.NUDGED:
        runs[name].losses[-1] += 0.01
    return runs


def problems_of(script: ModuleType, runs: dict[str, Any]) -> list[str]:
    return script.find_problems(runs, script.compare(runs))


def test_accepts_what_rounding_explains(script: ModuleType) -> None:
    runs = make_runs(script)
    assert problems_of(script, runs) == []
    runs["comet"].losses[-1] += 2 * 0.01 + script.FLOOR - 1e-4
    assert problems_of(script, runs) == []


@pytest.mark.parametrize(
    ("field", "step", "factor", "quantity"),
    [
        ("losses", 3, 1 + 1e-5, "loss, first 10 steps"),
        ("losses", 19, 1 + 2e-2, "loss, all steps"),  # 0.06 from a loss of 3.1; 0.04 is allowed
        ("losses", 19, math.nan, "loss, all steps"),
        ("expert_norms", 0, 1 + 1e-5, "experts' gradients, first 10"),
        ("other_norms", 9, 1 - 1e-5, "other gradients, first 10"),
    ],
)
def test_rejects_a_curve_that_rounding_does_not_explain(
    script: ModuleType, field: str, step: int, factor: float, quantity: str
) -> None:
    runs = make_runs(script)
    getattr(runs["comet"], field)[step] *= factor
    [problem] = problems_of(script, runs)
    assert problem.startswith(f"{quantity}: comet is ")


@pytest.mark.parametrize("after", [5.1, math.nan])
def test_rejects_a_run_that_learned_too_little(script: ModuleType, after: float) -> None:
    runs = make_runs(script)
    runs["inductor"].held_out = (5.5, after)
    [problem] = problems_of(script, runs)
    assert problem.startswith("inductor learned too little: held out 5.500, then ")


@pytest.mark.parametrize("key", ["forward fused", "backward portable", "compiled"])
def test_rejects_a_layer_that_was_left_as_it_was(script: ModuleType, key: str) -> None:
    runs = make_runs(script)
    runs["comet"].layers[key] -= 1
    assert problems_of(script, runs)[0].startswith("comet rewrote the ")


def read(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON that lies in the folder with a picture of three curves, and nothing else."""
    assert {path.name for path in folder.iterdir()} == {f"{name}.json", f"{name}.svg"}
    picture = ElementTree.parse(folder / f"{name}.svg").getroot()
    labels = [text.text or "" for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    for label in ("eager", "inductor", "comet"):
        assert any(text.startswith(f"{label} (held out: ") for text in labels), labels
    return json.loads((folder / f"{name}.json").read_text())


def assert_learned(document: dict[str, Any], num_steps: int) -> None:
    """Assert that every run learned, and that comet rewrote both layers both ways."""
    assert set(document["runs"]) == {"eager", "inductor", "comet", "nudged 1", "nudged 2"}
    for run in document["runs"].values():
        assert len(run["losses"]) == num_steps
        # a byte is worth log(256) nats to who knows nothing
        assert run["losses"][0] == pytest.approx(math.log(256), abs=0.3)
        assert run["held_out"][1] < run["held_out"][0] - 0.5
    layers = document["runs"]["comet"]["layers"]
    assert (layers["forward portable"], layers["backward portable"]) == (2, 2)
    assert document["problems"] == []
    assert str(Path.home()) not in document["command"]


@pytest.mark.usefixtures("no_codegen")
def test_qwen3_moe_learns_alike_eager_and_compiled(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--steps", str(STEPS), "--out", str(tmp_path)]) == 0
    document = read(tmp_path, "train_lm_cpu")
    assert_learned(document, STEPS)
    [loss, *_] = document["checks"]
    assert f"{loss['differences']['comet']:.1e}" in capsys.readouterr().out
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("no_codegen")
def test_fails_when_comet_leaves_the_layers_alone(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COMET_ENABLED", "0")
    train, others = script.train, make_runs(script, num_steps=1)

    def only_comet(name: str, *args: Any) -> Any:
        return train(name, *args) if name == "comet" else others[name]

    monkeypatch.setattr(script, "train", only_comet)
    with pytest.raises(SystemExit, match="1"):
        script.main(["--steps", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for direction in ("forward", "backward"):
        assert f"FAILED: comet rewrote the {direction} of 0 of 2 layers" in printed


def train_spread(rank: int, world_size: int) -> dict[str, Any]:
    """Return two short runs of a rank, whose experts lie on both ranks."""
    script, args = load(), argparse.Namespace(device="cpu", steps=2, seed=0)
    script.HELD_OUT_BATCHES = 1
    with without_codegen():
        return {
            name: vars(script.train(name, args, torch.device("cpu"))) for name in ("eager", "comet")
        }


def test_experts_spread_over_two_ranks_train_alike(pair: RankPool) -> None:
    first, second = pair.run(train_spread)
    assert first == second
    eager, comet = first["eager"], first["comet"]
    for field in ("losses", "expert_norms", "other_norms"):
        assert comet[field] == pytest.approx(eager[field], rel=1e-2)  # experts are in bfloat16
    assert (comet["layers"]["forward portable"], comet["layers"]["backward portable"]) == (2, 2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("ranks", "name"), [(1, "train_lm_cpu"), (2, "train_lm_cpu_2ranks")])
def test_runs_as_a_user_runs_it(tmp_path: Path, ranks: int, name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--ranks", str(ranks), "--out", str(tmp_path / "out")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_learned(read(tmp_path / "out", name), 200)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--ranks", "3"), "3 ranks cannot share 8 experts evenly"),
        (("--device", "cuda", "--ranks", "16"), "--ranks 16 needs as many GPUs"),
    ],
)
def test_says_what_cannot_work(
    script: ModuleType, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(list(args))
    assert message in capsys.readouterr().err
