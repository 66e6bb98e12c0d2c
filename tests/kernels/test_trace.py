"""Traces of calls between ranks: what CTAs note, and what is made of it."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from exchange_ranks import Ranks
from torch import Tensor

from comet_compile.kernels import schedule, stamps, trace
from comet_compile.kernels.schedule import FETCH, MULTIPLY, OTHER, SEND, WAIT, Span

LANES = 3


def run_traced(capacity: int) -> tuple[list[Tensor], list[Tensor]]:
    """(traces, results) of a layer between two ranks in the interpreter."""
    ranks = Ranks(2, capacity=64, block_tokens=8)
    for workspace in ranks.workspaces:
        workspace.trace = trace.new_trace(LANES, capacity, "cpu")
    results = ranks.run(ranks.tokens((40, 33)))
    return [ws.trace for ws in ranks.workspaces if ws.trace is not None], results


@pytest.mark.usefixtures("interpreted")
def test_every_cta_notes_what_it_does() -> None:
    traces, results = run_traced(500)
    untraced = Ranks(2, capacity=64, block_tokens=8)
    for y, expected in zip(results, untraced.run(untraced.tokens((40, 33))), strict=True):
        assert torch.equal(y, expected), "stamps change no result"
    for rank, noted in enumerate(traces):
        spans, lost = trace.spans_of(noted, rank)
        assert lost == 0
        assert {span.cta for span in spans} == set(range(LANES))
        assert {span.rank for span in spans} == {rank}
        for lane in range(LANES):
            own = [span for span in spans if span.cta == lane]
            assert all(one.end <= two.begin for one, two in itertools.pairwise(own))
        # the first CTA is the one that fetches, as planned; both help to multiply
        fetches = [span.cta for span in spans if span.kind == FETCH]
        assert fetches == [0]
        names = [span.name for span in spans]
        assert "fetch the tokens of turn 1" in names
        assert "publish" in names
        assert f"wait for the sums of rank {1 - rank}" in names
        assert "add up own tokens" in names
        assert any(span.kind == SEND for span in spans)
        for layer in ("layer0", "layer1"):
            tiles = [name for name in names if name.startswith(f"{layer}, tile")]
            assert len(tiles) == len(set(tiles)) > 2, "each tile is multiplied once"


@pytest.mark.usefixtures("interpreted")
def test_stamps_without_room_are_counted_and_leave_other_lanes_alone() -> None:
    traces, _ = run_traced(3)
    for rank, noted in enumerate(traces):
        spans, lost = trace.spans_of(noted, rank)
        assert lost > 0
        assert noted[0] == LANES
        assert 0 < len(spans) <= 2 * LANES


def test_a_lane_as_documented() -> None:
    def code(stage: int, action: int, value: int) -> int:
        return (stage * 8 + action << 32) + value

    noted = trace.new_trace(1, 3, "cpu")
    pairs = [
        code(stamps.LAYER0, stamps.MULTIPLY, 7), 1000, code(stamps.LAYER0, stamps.WAIT, 1), 1450,
        code(stamps.LAYER0, stamps.IDLE, 9), 2000,
    ]  # fmt: skip
    noted[2], noted[3:] = 3, torch.tensor(pairs)
    spans, lost = trace.spans_of(noted, 5, offset_ns=500)
    assert lost == 0
    assert spans == [
        Span(5, 0, MULTIPLY, "layer0, tile 7", 0.5, 0.95),
        Span(5, 0, WAIT, "wait for the tokens of turn 1", 0.95, 1.5),
    ]


def test_ranks_are_laid_side_by_side_by_their_clocks() -> None:
    traces = []
    for start in (10_000, 910_000):
        noted = trace.new_trace(1, 2, "cpu")
        noted[2] = 2
        noted[3:] = torch.tensor(
            [stamps.OTHER + 8 * stamps.SUMS << 32, start, stamps.IDLE << 32, start + 1000]
        )
        traces.append(noted)
    found, lost = trace.schedule_of(traces, [0, 899_000])
    assert (found.num_ctas, lost) == (1, 0)
    assert found.spans == [
        Span(0, 0, OTHER, "add up own tokens", 0.0, 1.0),
        Span(1, 0, OTHER, "add up own tokens", 1.0, 2.0),
    ]


def test_the_fastest_round_tells_the_offset() -> None:
    # the peer's timer is 500 ahead; a slow answer, a fast one, a slow call
    calls = [(0, 1000), (2000, 2100), (3000, 3900)]
    seen = [550, 2550, 4300]
    assert trace.offset_of(calls, seen) == 500


def test_hidden_is_what_others_multiply_meanwhile() -> None:
    spans = [
        Span(0, 0, FETCH, "fetch", 0.0, 4.0),
        Span(0, 1, MULTIPLY, "tile", 0.0, 3.0),
        Span(0, 2, WAIT, "wait", 0.0, 1.0),
        Span(0, 2, MULTIPLY, "tile", 1.0, 4.0),
        # nobody multiplies while all send
        *(Span(0, cta, SEND, "send", 4.0, 5.0) for cta in range(3)),
    ]
    found = schedule.overlap_of(spans, 0, num_ctas=3)
    # of 5 us in which the links are busy: 1 with one of two, 2 with both, 1 with one, 1 with none
    assert found == pytest.approx((0.5 + 2 + 0.5) / 5)
    assert schedule.overlap_of([Span(0, 0, MULTIPLY, "tile", 0.0, 1.0)], 0, num_ctas=1) == 1.0
