"""The schedule that is played through: a CTA does one thing at a time, nothing before it can be."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import defaultdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from comet_compile.cli import main
from comet_compile.kernels import schedule
from comet_compile.kernels.cost_model import H100, Load, predict, total_us
from comet_compile.kernels.schedule import FETCH, MULTIPLY, SEND, WAIT, Schedule, Span

QWEN3 = Load(2048, 768, 128, 8, (8192, 8192))
LOADS = {
    "even": QWEN3,
    "hot": dataclasses.replace(QWEN3, hot=4.0),
    "empty": dataclasses.replace(QWEN3, tokens=(8192, 0)),
    "few": dataclasses.replace(QWEN3, tokens=(64, 64)),
    "four ranks": dataclasses.replace(QWEN3, tokens=(4096,) * 4),
    "odd": Load(1000, 200, 12, 3, (777, 13, 0)),
}
EPSILON = 1e-6


def of(played: Schedule, rank: int, kind: str, name: str = "") -> list[Span]:
    return [
        span
        for span in played.spans
        if span.rank == rank and span.kind == kind and name in span.name
    ]


@pytest.fixture(params=LOADS)
def load(request: pytest.FixtureRequest) -> Load:
    return LOADS[request.param]


def test_a_cta_does_one_thing_at_a_time(load: Load) -> None:
    played = schedule.simulate(load, H100)
    lanes: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for span in played.spans:
        assert span.end >= span.begin >= 0
        if span.cta is not None:
            assert 0 <= span.cta < H100.device.num_sms
            lanes[span.rank, span.cta].append(span)
    for spans in lanes.values():
        for one, following in itertools.pairwise(sorted(spans, key=lambda span: span.begin)):
            assert following.begin >= one.end - EPSILON


def test_nothing_begins_before_it_can(load: Load) -> None:
    played = schedule.simulate(load, H100)
    for rank in range(load.ranks):
        fetched = max((s.end for s in of(played, rank, FETCH)), default=0.0)
        layer0, layer1 = of(played, rank, MULTIPLY, "layer0"), of(played, rank, MULTIPLY, "layer1")
        # the last turn's tokens are needed by the last tiles
        assert max(s.begin for s in layer0) >= fetched - layer0[0].end + layer0[0].begin - EPSILON
        assert min(s.begin for s in layer1) >= max(s.end for s in layer0) - EPSILON
    sent = max(s.end for s in played.spans if s.kind in (SEND, MULTIPLY))
    for rank in range(load.ranks):
        (sums,) = of(played, rank, "other", "sums")
        assert sums.begin >= sent - EPSILON


def test_without_leading_tiles_all_wait_for_the_tokens() -> None:
    played = schedule.simulate(QWEN3, H100, lead0=0.0)
    fetched = max(span.end for span in of(played, 0, FETCH))
    assert min(span.begin for span in of(played, 0, MULTIPLY)) >= fetched - EPSILON
    assert of(played, 0, WAIT, "tokens")
    assert played.total_us > schedule.simulate(QWEN3, H100).total_us


def test_too_few_fetchers_starve_the_others() -> None:
    starved = schedule.simulate(QWEN3, H100, num_fetchers=2)
    usual = schedule.simulate(QWEN3, H100)
    assert starved.shares(0)[WAIT] > 0.05 > usual.shares(0)[WAIT]
    assert starved.total_us > 1.1 * usual.total_us


def test_a_rank_without_tokens_has_to_fetch_before_it_can_begin() -> None:
    played = schedule.simulate(LOADS["empty"], H100)
    assert not of(played, 0, FETCH)
    fetched = max(span.end for span in of(played, 1, FETCH))
    assert min(span.begin for span in of(played, 1, MULTIPLY)) >= fetched - EPSILON


def test_shares_of_the_time_are_parts_of_a_whole(load: Load) -> None:
    played = schedule.simulate(load, H100)
    for rank in range(load.ranks):
        shares = played.shares(rank)
        assert all(part >= 0 for part in shares.values())
        assert sum(shares.values()) <= 1 + EPSILON


@pytest.mark.parametrize("name", ["even", "hot", "empty", "four ranks"])
def test_it_agrees_with_the_sum_of_phases(name: str) -> None:
    added = total_us(predict(LOADS[name], H100))
    assert schedule.simulate(LOADS[name], H100).total_us == pytest.approx(added, rel=0.1)


def test_the_command_writes_a_trace_that_perfetto_reads(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    arguments = ["simulate", "--shapes", "512x256x16x2", "--tokens", "256", "--ranks", "2"]
    result = CliRunner().invoke(main, [*arguments, "--trace", str(path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "played through:" in result.output
    document = json.loads(path.read_text())
    events = document["traceEvents"]
    names = [e["args"]["name"] for e in events if e["ph"] == "M"]
    assert names == ["rank 0 (simulated)", "rank 1 (simulated)"]
    shown = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in shown} == {0, 1}
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in shown)
    assert {e["cat"] for e in shown} >= {FETCH, MULTIPLY, SEND}


def test_a_trace_of_one_gpu_is_refused(tmp_path: Path) -> None:
    arguments = ["simulate", "--shapes", "512x256x16x2", "--ranks", "1", "--trace"]
    result = CliRunner().invoke(main, [*arguments, str(tmp_path / "t.json")])
    assert result.exit_code == 1
    assert "--trace shows a forward between ranks" in result.output
