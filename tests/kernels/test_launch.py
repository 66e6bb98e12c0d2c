"""Launching again by key: what goes past Triton's own look-up, and what must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from comet_compile.kernels import launch as launching
from comet_compile.kernels.launch import descriptor, div_up, full_grid, launch, power_of_2

GRID = full_grid(3)


class Compiled:
    """What Triton gives back from a launch, and is launched again."""

    module: object = "loaded"
    function = "function"
    packed_metadata = "metadata"

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def run(self, *args: Any) -> None:
        self.launches.append(args)


class Kernel:
    """A kernel of two arguments and two constants that counts how often Triton is asked for it."""

    arg_names = ("a_ptr", "size", "FIRST", "SECOND")

    def __init__(self, compiled: object | None = None) -> None:
        self.compiled = Compiled() if compiled is None else compiled
        self.look_ups: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def look_up(*args: Any, **options: Any) -> object:
            self.look_ups.append((grid, args, options))
            return self.compiled

        return look_up

    def launch(self, key: Any, *args: Any, grid: tuple[int, ...] = GRID, second: int = 2) -> None:
        # options in another order than the parameters
        launch(self, grid, key, *args, SECOND=second, FIRST=1, num_warps=4)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is asked, and what is kept here is forgotten."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, raising=False
    )
    monkeypatch.setattr(launching, "_kernels", {})
    monkeypatch.setattr(launching, "_is_watched", lambda: False)


def test_an_equal_key_skips_the_look_up() -> None:
    kernel = Kernel()
    kernel.launch(("call", 1), "a", 10)
    kernel.launch(("call", 1), "b", 20, grid=full_grid(5, 6))
    assert kernel.look_ups == [(GRID, ("a", 10), {"FIRST": 1, "SECOND": 2, "num_warps": 4})]
    # grid, stream, what Triton launches with, then arguments and constants as in the signature
    assert kernel.compiled.launches == [
        (5, 6, 1, 71, "function", "metadata", None, None, None, "b", 20, 1, 2)
    ]


def test_another_key_is_looked_up() -> None:
    kernel, other = Kernel(), Kernel()
    kernel.launch(("call", 1), "a", 10)
    kernel.launch(("call", 2), "a", 10, second=3)
    other.launch(("call", 1), "a", 10)
    assert len(kernel.look_ups) == 2
    assert len(other.look_ups) == 1
    assert not kernel.compiled.launches
    kernel.launch(("call", 2), "a", 10, second=3)
    assert kernel.compiled.launches[0][-2:] == (1, 3)


def test_without_a_key_every_launch_is_looked_up() -> None:
    kernel = Kernel()
    for _ in range(3):
        kernel.launch(None, "a", 10)
    assert len(kernel.look_ups) == 3
    assert not launching._kernels


@pytest.mark.parametrize("module", [None, "absent"])
def test_what_was_not_loaded_is_not_kept(module: str | None) -> None:
    compiled = Compiled()
    compiled.module = None
    kernel = Kernel(compiled if module is None else object())
    kernel.launch("key", "a", 10)
    kernel.launch("key", "a", 10)
    assert len(kernel.look_ups) == 2


def test_a_profiler_sees_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    kernel.launch("key", "a", 10)
    monkeypatch.setattr(launching, "_is_watched", lambda: True)
    kernel.launch("key", "a", 10)
    assert len(kernel.look_ups) == 2
    monkeypatch.setattr(launching, "_is_watched", lambda: False)
    kernel.launch("key", "a", 10)
    assert len(kernel.look_ups) == 2


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_MAX_KEPT", 8)
    kernel = Kernel()
    for key in range(20):
        kernel.launch(key, "a", 10)
        assert len(launching._kernels) <= 8
    kernel.launch(19, "a", 10)
    assert len(kernel.look_ups) == 20


def test_descriptors_on_the_cpu_hold_their_tensor() -> None:
    base = torch.empty(4, 8)
    made = descriptor(base, base.shape, base.stride(), (2, 4))
    assert made.base is base
    assert (made.shape, made.strides, made.block_shape) == ([4, 8], [8, 1], [2, 4])
    assert not launching._descriptors


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
