"""benchmarks/moe_layer.py in tiny sizes on CPU, and the page that benchmarks/report.py makes."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BASELINES = {"eager", "inductor", "gemms", "comet", "comet-op", "comet-portable"}
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run_tiny(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run the benchmark from another folder and return what it stored."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "moe_layer.py"), *arguments]
    command += ["--device", "cpu", "--tiny", "--repeats", "2", "--out", str(out)]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    document: dict[str, Any] = json.loads(out.read_text())
    return document


def rows_of(document: dict[str, Any], mode: str) -> dict[str, dict[str, Any]]:
    """Return the rows of one mode by baseline, after checking what holds for each."""
    rows = {row["baseline"]: row for row in document["rows"] if row["mode"] == mode}
    for name, row in rows.items():
        assert row["failed"] is None, f"{name}: {row['failed']}"
        times = row["call_ms"]
        assert 0 < times["q1"] <= times["median"] <= times["q3"]
        assert times["runs"] == 2
        if name.startswith("comet-portable") or name == "comet":
            assert [region["status"] for region in row["regions"]] == ["portable"]
        if name != "gemms":
            assert max(row["errors"].values()) < 0.02  # bf16 carries 8 bits
    return rows


def test_local_suite(tmp_path: Path) -> None:
    arguments = ("--suite", "local", "--only", "qwen3-30b-a3b/16384", "--modes", "forward", "train")
    document = run_tiny(tmp_path, *arguments)
    forward, train = rows_of(document, "forward"), rows_of(document, "train")
    assert set(forward) == set(train) == BASELINES
    assert all(row["tf"] > 0 for row in forward.values())
    assert set(train["comet"]["errors"]) == {"y", "d_x", "d_w_in", "d_w_out"}
    assert "COMET_PORTABLE" in forward["comet-portable"]["path"]
    assert document["versions"]["torch"]
    assert document["commit"]


def test_suite_of_traps(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the blocks are those of transformers")
    arguments = ("--suite", "traps", "--modes", "forward", "train")
    document = run_tiny(tmp_path, *arguments, "--baselines", "eager", "comet")
    cases = {row["case"] for row in document["rows"]}
    assert cases == {
        "traps/llama4-scout/48",
        "traps/mixtral-8x7b/48/modules",
        *(f"traps/qwen3-30b-a3b/48/{way}" for way in ("float32", "autocast")),
        *(f"traps/qwen3-30b-a3b/{tokens}/batched_mm" for tokens in (1, 4, 16)),
    }
    for case in cases:
        own = {"rows": [row for row in document["rows"] if row["case"] == case]}
        forward, train = rows_of(own, "forward"), rows_of(own, "train")
        assert set(forward) == {"eager", "comet"}
        assert bool(train) == (not case.endswith("batched_mm"))
        for row in train.values():
            assert set(row["errors"]) == {"y", "d_x", "d_w_in", "d_w_out"}
            assert case.endswith("float32") == (max(row["errors"].values()) < 1e-5)


def test_expert_parallel_suite(tmp_path: Path) -> None:
    arguments = ("--suite", "ep", "--only", "qwen3-30b-a3b/8192/empty")
    document = run_tiny(tmp_path, *arguments, "--baselines", "eager", "comet", "gemms")
    assert set(rows_of(document, "forward")) == {"eager", "comet", "gemms"}
    assert document["device"]["ranks"] == 2


def test_time_limit_says_what_was_not_run(tmp_path: Path) -> None:
    document = run_tiny(tmp_path, "--suite", "local", "--time-limit", "0")
    assert document["rows"] == []
    assert "local/mixtral-8x7b/48" in document["not_run"]


def row(case: str, baseline: str, median: float | None, **more: Any) -> dict[str, Any]:
    """Return a row as the benchmark stores it; None for a row that failed."""
    times = {"median": median, "q1": median, "q3": median, "runs": 3}
    failed = "RuntimeError: no | such thing" if median is None else None
    return {
        "case": case,
        "mode": "forward",
        "baseline": baseline,
        "call_ms": None if median is None else times,
        "graph_ms": None,
        "tf": None if median is None else 100.0 / median,
        "backward_tf": None,
        "peak_extra_mib": 512.0,
        "symmetric_mib": 1024.0 if baseline == "comet" else None,
        "errors": {"y": 0.004},
        "regions": [{"status": "fused", "reason": None}] if baseline == "comet" else [],
        "path": "fused" if baseline == "comet" else None,
        "failed": failed,
        **more,
    }


def document(date: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema": 1,
        "date": date,
        "command": "python moe_layer.py",
        "commit": "abc123",
        "tiny": False,
        "device": {"name": "Some GPU", "ranks": 1},
        "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        "not_run": [],
        "rows": rows,
    }


SMALL, LARGE = "local/qwen3-30b-a3b/64", "local/qwen3-30b-a3b/4096"
OLD = document("2026-01-01 10:00 UTC", [row(LARGE, "eager", 9.0), row(LARGE, "comet", 9.0)])
NEW = document(
    "2026-01-02 10:00 UTC",
    [
        row(LARGE, "inductor", 2.0),
        row(LARGE, "comet", 1.0),
        row(SMALL, "inductor", 1.0),
        row(SMALL, "comet", 2.0),
        row(SMALL, "gemms", None),
    ],
)
TARGETS = [
    {"case": LARGE, "mode": "forward", "metric": "tf", "must": 90, "aim": 100},
    {"case": SMALL, "mode": "forward", "metric": "ms", "must": 1.0, "aim": 0.5},
    {"case": "ep/olmoe/8192", "mode": "forward", "metric": "speedup", "must": 1.3, "aim": 1.6},
]


def load(path: str) -> ModuleType:
    """Import one file of the benchmarks, which finds those beside it as if it were run."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"bench_{Path(path).stem}", BENCHMARKS / path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report() -> ModuleType:
    return load("report.py")


def test_page_shows_losses_like_wins(report: ModuleType) -> None:
    page = report.render_page(report.Results({"old.json": OLD, "new.json": NEW}), TARGETS)
    lines = page.splitlines()
    assert [line for line in lines if line.startswith(f"| {SMALL} | forward |")] == [
        f"| {SMALL} | forward | ms |  | 1 | 2 |  |  | 1 | 0.5 | **short: 0.50 of must** |",
        f"| {SMALL} | forward | 1.000 | failed | 2.000 | 0.5 |  |",
        f"| {SMALL} | forward | 50 / 100 / - | 0.00400 / 0.00400 / - "
        "| 0.50 + 1.00 symmetric / 0.50 / - "
        "| 1 fused; ran fused |",
    ]
    assert f"| {LARGE} | forward | TF |  | 50 | 100 |  |  | 90 | 100 | aim met |" in lines
    assert f"- {SMALL} forward, gemms: RuntimeError: no | such thing" in lines
    assert any(line.startswith("| ep/olmoe/8192 |") and "not run" in line for line in lines)


def test_page_says_when_the_layer_was_left_as_it_was(report: ModuleType) -> None:
    rows = [row(LARGE, "inductor", 1.0), row(LARGE, "comet", 1.0, path="not rewritten")]
    results = report.Results({"new.json": document("2026-01-02 10:00 UTC", rows)})
    assert report.judge(TARGETS[0], results) == (100.0, "aim met (not rewritten)")


def test_page_takes_each_case_from_one_run(report: ModuleType) -> None:
    results = report.Results({"a.json": NEW, "z.json": OLD})
    assert "eager" not in results.rows[LARGE, "forward"]
    assert list(results.sources) == ["a.json"]


def test_page_is_deterministic_and_passes_over_other_files(report: ModuleType) -> None:
    tiny = copy.deepcopy(OLD) | {"tiny": True, "date": "2027-01-01 10:00 UTC"}
    more = {"tiny.json": tiny, "compile_time.json": {"results": {}}}
    first = report.render_page(report.Results({"new.json": NEW, "old.json": OLD}), TARGETS)
    assert first == report.render_page(
        report.Results({**more, "old.json": OLD, "new.json": NEW}), TARGETS
    )


def test_targets_name_cases_that_exist(report: ModuleType) -> None:
    shapes = load("moe/shapes.py")
    assert set(report.SUITES) == set(shapes.SUITES)
    modes = {case.name: case.modes for case in shapes.CASES}
    for target in report.load_targets():
        assert target["mode"] in modes[target["case"]]
        better = target["aim"] < target["must"]
        assert better == (target["metric"] == "ms")


def test_committed_page_is_made_from_the_committed_files(report: ModuleType) -> None:
    folder = BENCHMARKS / "results"
    if not (folder / "README.md").exists():
        pytest.skip("no results are committed yet")
    assert report.main(["--check"]) == 0


def test_plot_is_deterministic(report: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the `bench` extra")
    results = report.Results({"new.json": NEW})
    texts = []
    for name in ("a.svg", "b.svg"):
        report.draw_plot("local", results, TARGETS, tmp_path / name)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    assert "comet" in texts[0]
