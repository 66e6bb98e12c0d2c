"""Launching through Triton, and the host arithmetic of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from comet_compile.kernels import launch as launching
from comet_compile.kernels import launch_log
from comet_compile.kernels.launch import (
    descriptor,
    div_up,
    full_grid,
    launch,
    launch_together,
    power_of_2,
)

GRID = full_grid(3)


class Kernel:
    """A kernel that notes what Triton is asked for."""

    compiled = object()

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> object:
            self.launches.append((grid, args, options))
            return self.compiled

        return run


class Noted:
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def note_launch(self, *launch: Any) -> None:
        self.launches.append(launch)


def test_a_launch_goes_to_triton_as_it_is() -> None:
    kernel = Kernel()
    for size in (10, 20):
        launch(kernel, GRID, "a", size, SECOND=2, FIRST=1, num_warps=4)
    options = {"FIRST": 1, "SECOND": 2, "num_warps": 4}
    assert kernel.launches == [(GRID, ("a", size), options) for size in (10, 20)]


def test_ctas_that_wait_for_each_other_are_never_more_than_can_run_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launching, "_num_multiprocessors", lambda index: 132)
    kernel = Kernel()
    launch_together(kernel, full_grid(66, 2), "a", num_warps=4)
    assert kernel.launches == [((66, 2, 1), ("a",), {"num_warps": 4})]
    with pytest.raises(RuntimeError, match="133 CTAs that wait for each other, and only 132"):
        launch_together(kernel, full_grid(133), "a", num_warps=4)
    assert len(kernel.launches) == 1


def test_a_recording_is_told_of_a_launch_once_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, noted = Kernel(), Noted()
    monkeypatch.setattr(launch_log._active, "log", noted)
    launch(kernel, GRID, "a", 10, FIRST=1)
    assert len(kernel.launches) == 1
    # constants are compiled in, so a launch has arguments only
    assert noted.launches == [(Kernel.compiled, GRID, ("a", 10))]


def test_no_recording_is_told_of_a_launch_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted()
    monkeypatch.setattr(launch_log._active, "log", noted)

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of resources")

    with pytest.raises(RuntimeError, match="out of resources"):
        launch({GRID: fail}, GRID, "a", 10)
    assert noted.launches == []


def test_descriptors_hold_their_tensor() -> None:
    base = torch.empty(4, 8)
    made = descriptor(base, base.shape, base.stride(), (2, 4))
    assert made.base is base
    assert (made.shape, made.strides, made.block_shape) == ([4, 8], [8, 1], [2, 4])


def test_host_arithmetic() -> None:
    assert [div_up(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [power_of_2(n) for n in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [
        1, 1, 2, 4, 4, 8, 1024, 2048,
    ]  # fmt: skip
    assert [full_grid(*extents) for extents in ((2,), (2, 3), (2, 3, 4))] == [
        (2, 1, 1),
        (2, 3, 1),
        (2, 3, 4),
    ]
