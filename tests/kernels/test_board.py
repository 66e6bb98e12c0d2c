"""The board of one machine's ranks, and the verdict on whether a group can have one."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from comet_compile.errors import PeerTimeoutError
from comet_compile.kernels import links
from comet_compile.kernels.board import Board

CALLS = 4000


@pytest.fixture
def path() -> Iterator[str]:
    """An empty board of three ranks."""
    made = Board.create(3)
    yield made
    os.unlink(made)


def value_of(rank: int, call: int) -> int:
    """Which of its values a rank posts: any 32 bits, zero and all ones among them."""
    return (0, 2**32 - 1, call * 2654435761 % 2**32)[(rank + call) % 3]


def run_rank(path: str, rank: int, slow: bool) -> int:
    """Exchange over and over, now and then late; return how many calls gave what they should."""
    board, delays = Board(path, rank, 3), random.Random(rank)
    good = 0
    for call in range(CALLS):
        if slow and delays.random() < 0.05:
            time.sleep(delays.random() * 0.002)
        seen = board.exchange(value_of(rank, call), 30.0)
        good += seen == [value_of(peer, call) for peer in range(3)]
    return good


@pytest.mark.parametrize("slow", [set(), {1}, {0, 1, 2}], ids=["none_late", "one_late", "all_late"])
def test_every_rank_reads_what_all_posted(path: str, slow: set[int]) -> None:
    with ThreadPoolExecutor(3) as pool:
        counts = pool.map(lambda rank: run_rank(path, rank, rank in slow), range(3))
    assert list(counts) == [CALLS] * 3


def test_a_rank_alone_waits_for_nobody() -> None:
    path = Board.create(1)
    board = Board(path, 0, 1)
    os.unlink(path)
    assert [board.exchange(value, 0.0) for value in (5, 0, 7)] == [[5], [0], [7]]


def test_the_deadline_names_the_missing_ranks(path: str) -> None:
    board = Board(path, 1, 3)
    begun = time.monotonic()
    with pytest.raises(
        PeerTimeoutError, match=r"group rank 1 waited 0\.2 s at call 1 .* group ranks \[0, 2\] did"
    ):
        board.exchange(1, 0.2)
    assert 0.2 <= time.monotonic() - begun < 10


def test_a_rank_one_call_behind_is_missing(path: str) -> None:
    boards = [Board(path, rank, 3) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda board: board.exchange(4, 30.0), boards)) == [[4] * 3] * 3
    with (
        ThreadPoolExecutor(2) as pool,
        pytest.raises(PeerTimeoutError, match=r"at call 2 .* group ranks \[2\] did not come"),
    ):
        list(pool.map(lambda board: board.exchange(5, 0.2), boards[:2]))


def test_calls_are_counted_in_31_bits(path: str) -> None:
    boards = [Board(path, rank, 3) for rank in range(3)]
    for board in boards:
        board._call = 2**31 - 3

    def run(board: Board) -> list[list[int]]:
        return [board.exchange(call, 30.0) for call in range(6)]

    with ThreadPoolExecutor(3) as pool:
        for seen in pool.map(run, boards):
            assert seen == [[call] * 3 for call in range(6)]


def offer(**changes: Any) -> dict[str, Any]:
    """What a rank says of itself, on a GPU of its own."""
    return {"machine": "a", "gpu": "0", "capability": [9, 0], "sms": 132, **changes}


@pytest.mark.parametrize(
    ("offers", "reason"),
    [
        ([offer(gpu="0"), offer(gpu="1")], None),
        ([offer(gpu=str(rank)) for rank in range(64)], None),
        ([offer(gpu=str(rank)) for rank in range(65)], "65 ranks, the kernels serve 64"),
        (
            [offer(gpu="0"), offer(gpu="1"), offer(gpu="2", machine="b")],
            "group rank 2 is on another machine than group rank 0",
        ),
        (
            [offer(gpu="0"), offer(gpu="1", sms=108)],
            "group rank 1 has another kind of GPU than group rank 0",
        ),
        (
            [offer(gpu="0"), offer(gpu="1", capability=[8, 0])],
            "group rank 1 has another kind of GPU than group rank 0",
        ),
        ([offer(), offer()], "ranks share a GPU"),
    ],
    ids=["two", "as_many_as_served", "too_many", "machine", "multiprocessors", "capability", "gpu"],
)
def test_why_not(offers: list[Any], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", raising=False)
    assert links._why_not(offers) == reason


def test_ranks_may_share_a_gpu_if_torch_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    assert links._why_not([offer(), offer()]) is None
