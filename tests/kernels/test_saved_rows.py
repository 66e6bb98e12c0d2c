"""The rows that a forward keeps, as outputs of an op."""

from __future__ import annotations

import pytest
import torch

from comet_compile.kernels import saved_rows
from comet_compile.kernels.saved_rows import columns_of, may_be_freed, pack, room_between, unpack


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_come_back_as_they_were(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 6).to(dtype)
    saved = pack(rows)
    # no graph computes in it, so Inductor puts no other buffer there
    assert saved.dtype == torch.uint16
    assert saved.shape == (5, columns_of(6, dtype))
    back = unpack(saved, dtype)
    assert back is not None
    assert torch.equal(back, rows)
    assert back.data_ptr() == rows.data_ptr()


def test_rows_that_are_gone_are_none() -> None:
    saved = pack(torch.randn(5, 6))
    saved.untyped_storage().resize_(0)
    assert unpack(saved, torch.float32) is None
    assert unpack(torch.empty(0, dtype=torch.uint16), torch.float32) is None


def test_no_rows_are_not_gone() -> None:
    rows = unpack(pack(torch.empty(0, 6)), torch.float32)
    assert rows is not None
    assert rows.shape == (0, 6)


def test_only_memory_that_was_packed_may_be_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = pack(torch.randn(5, 6))
    assert may_be_freed(saved.view(torch.float32))
    # what a graph has copied may lie where it lets other things lie, too
    assert not may_be_freed(saved.clone().view(torch.float32))


def test_storages_that_are_gone_are_forgotten() -> None:
    known = saved_rows._OwnStorages()
    alive = torch.empty(4)
    known.add(alive)
    for _ in range(2000):
        known.add(torch.empty(4))
    assert len(known._known) < 600
    assert known.has(alive)


@pytest.mark.parametrize(
    ("num_ranks", "save", "room"),
    [
        (2, "pre_activation", 2048),
        (8, "pre_activation", 8192),
        (2, "balanced", 1024 + 128 + 256),
        (4, "balanced", 1024 + 256 + 256),
        (8, "balanced", 1024 + 384 + 256),
    ],
)
def test_room_between_ranks(num_ranks: int, save: str, room: int) -> None:
    assert room_between(1024, num_ranks, save) == room
