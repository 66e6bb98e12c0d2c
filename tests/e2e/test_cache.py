"""A new process finds the compiled graph in the cache: same bits, and no pass has run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]

SCRIPT = """
import hashlib, json, sys
import torch
from torch._dynamo.utils import counters
from zoo import ep, near_misses

torch.set_num_threads(1)
for options in json.loads(sys.argv[1]):
    torch._dynamo.reset()
    counters.clear()
    # no C++ is generated, see harness.fresh_compilation; the caches work the same
    options["fallback_by_default"] = True
    layer = near_misses.LocalMoE()
    x = ep.tokens(12).requires_grad_()
    y = torch.compile(layer, backend="comet", fullgraph=True, options=options)(x)
    y.float().square().sum().backward()
    digest = hashlib.sha256()
    for value in (y, x.grad, *(p.grad for p in layer.parameters())):
        digest.update(value.detach().float().numpy().tobytes())
    print(json.dumps({
        "digest": digest.hexdigest(),
        "comet": dict(counters["comet"]),
        "aot": dict(counters["aot_autograd"]),
        "inductor": dict(counters["inductor"]),
    }))
"""


def run(cache: Path, *options: dict[str, object]) -> list[dict[str, Any]]:
    """Train one step with each of the options in a process of their own, caches under `cache`."""
    environment = dict(
        os.environ,
        TORCHINDUCTOR_CACHE_DIR=str(cache),
        TORCHINDUCTOR_FX_GRAPH_CACHE="1",
        TORCHINDUCTOR_AUTOGRAD_CACHE="1",
        TORCHINDUCTOR_COMPILE_THREADS="1",
        PYTHONPATH=str(TESTS),
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(options)],
        env=environment,
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(options) :]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cold(cache: Path) -> dict[str, Any]:
    """The first run, which fills the cache."""
    [found] = run(cache, {})
    return found


@pytest.fixture(scope="module")
def later(cache: Path, cold: dict[str, Any]) -> list[dict[str, Any]]:
    """What a second process finds: with an option that no graph depends on, then with others.

    That the first hits says that the others would, were their options not part of the key.
    """
    options = {"comet.agreement_timeout": 60.0}, {"comet.save": "nothing"}, {"comet.enabled": False}
    return run(cache, *options)


def test_cold_start_runs_the_pass_and_saves(cold: dict[str, Any]) -> None:
    assert cold["comet"]["regions_found"] == 1
    assert cold["aot"]["autograd_cache_miss"] == 1
    assert cold["aot"]["autograd_cache_saved"] == 1


def test_warm_start_runs_no_pass(later: list[dict[str, Any]], cold: dict[str, Any]) -> None:
    # an option that no graph depends on does not change the identity of the graph
    warm = later[0]
    assert warm["digest"] == cold["digest"]
    assert "regions_found" not in warm["comet"], "the pass ran although the graph was cached"
    assert warm["aot"]["autograd_cache_hit"] == 1


@pytest.mark.parametrize(("place", "found"), [(1, 1), (2, None)], ids=["save", "enabled"])
def test_an_option_that_changes_the_graph_misses(
    later: list[dict[str, Any]], place: int, found: int | None
) -> None:
    other = later[place]
    assert other["aot"]["autograd_cache_miss"] == 1
    assert "autograd_cache_hit" not in other["aot"]
    assert other["comet"].get("regions_found") == found
