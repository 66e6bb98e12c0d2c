"""The memory of recorded calls: what is large lives from its first use to its last."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")

from launch_stand_ins import Driver, Kernel, stand_in
from recorded_calls import GRID, Call, N, add_kernel, chain, random

from comet_compile.kernels import recording
from comet_compile.kernels.launch import launch
from comet_compile.kernels.launch_log import LaunchLog, release
from comet_compile.kernels.packed_launch import UnknownLayoutError
from comet_compile.kernels.recording import Results


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(recording, "_LARGE", 4 * N)
    return stand_in(monkeypatch)


@pytest.fixture
def add(driver: Driver) -> Iterator[Kernel]:
    kernel = add_kernel(driver)
    yield kernel
    kernel.body = lambda *params: None


class Allocations(TorchDispatchMode):
    """Notes the storages that are allocated, and says which are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[StorageWeakRef] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):
            self.sizes.append(out.untyped_storage().nbytes())
            self.made.append(StorageWeakRef(out.untyped_storage()))
        return out

    def sizes_alive(self) -> list[int]:
        """Return the bytes of the storages that are there, in the order of their allocation."""
        pairs = zip(self.made, self.sizes, strict=True)
        return [size for made, size in pairs if not made.expired()]


def three_sums(add: Kernel) -> Call:
    """((a + b) + b) + b through two buffers, of which the second is twice as large."""

    def body(a: Tensor, b: Tensor) -> Results:
        first = torch.empty(N)
        launch(add, GRID, a, b, first, N)
        second = torch.empty(2 * N)
        launch(add, GRID, first, b, second[N:], N)
        del first
        out = torch.empty(N)
        launch(add, GRID, second[N:], b, out, N)
        return (out,)

    return Call(body)


def test_large_buffers_live_from_first_use_to_last(driver: Driver, add: Kernel) -> None:
    call, plain, seen = three_sums(add), add.body, []
    for _ in range(2):
        call(random(), random())
    a, b, there = random(), random(), Allocations()

    def look(*params: int) -> None:
        seen.append([size for size in there.sizes_alive() if size])
        plain(*params)

    add.body = look
    with there:
        (got,) = call(a, b)
    torch.testing.assert_close(got, a + 3 * b)
    first, second, out = 4 * N, 4 * 2 * N, 4 * N
    assert call.num_calls == 2
    assert seen == [[first], [first, second], [second, out]]
    assert [size for size in there.sizes_alive() if size] == [out]


def test_small_ones_share_one_allocation(
    driver: Driver, add: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_LARGE", 2**20)
    call = three_sums(add)
    for _ in range(2):
        call(random(), random())
    with Allocations() as there:
        a, b = random(), random()
        torch.testing.assert_close(call(a, b)[0], a + 3 * b)
    # two buffers at multiples of 256 bytes, and the result
    assert there.sizes == [512, 4 * N]


def test_memory_that_is_taken_again_is_another_buffer() -> None:
    # where an allocator finds memory is its own affair, so addresses are made up here
    def allocate(begin: int, size: int) -> None:
        log._note_buffer(SimpleNamespace(data_ptr=lambda: begin, nbytes=lambda: size))  # type: ignore[arg-type]

    log = LaunchLog()
    allocate(1000, 64)
    allocate(2000, 64)
    assert log._find(1010) == ("buffer", 0, 10)
    allocate(980, 40)  # the first has been freed, and is taken in part
    assert log._find(1010) == ("buffer", 2, 30)
    assert log._find(2063) == ("buffer", 1, 63)
    with pytest.raises(UnknownLayoutError, match="no input, buffer or result"):
        log._find(1030)
    assert log.buffer_bytes == [64, 64, 40]


def test_a_recorded_call_frees_what_it_frees_as_written(driver: Driver, add: Kernel) -> None:
    alive = []

    def body(a: Tensor, b: Tensor) -> Results:
        buffer, out = torch.empty(N), torch.empty(N)
        reference = weakref.ref(buffer)
        launch(add, GRID, a, b, buffer, N)
        launch(add, GRID, buffer, b, out, N)
        del buffer
        alive.append(reference() is not None)
        return (out,)

    call = Call(body)
    for _ in range(2):
        call(random(), random())
    assert alive == [False, False]


def releasing(add: Kernel) -> Call:
    """(a + b) + b; b's memory is given back, and what lies there next is a buffer."""

    def body(a: Tensor, b: Tensor) -> Results:
        once = torch.empty(N)
        launch(add, GRID, a, b, once, N)
        twice = torch.empty(N)
        launch(add, GRID, once, b, twice, N)
        release(b)
        out = torch.empty(N)
        launch(add, GRID, twice, None, out, N)
        return (out,)

    return Call(body)


def test_an_input_is_released_when_it_has_been_read(driver: Driver, add: Kernel) -> None:
    call = releasing(add)
    for _ in range(5):
        a, b = random(), random()
        expected = a + 2 * b
        (got,) = call(a, b)
        torch.testing.assert_close(got, expected)
        assert b.untyped_storage().nbytes() == 0
        assert b.shape == (N,)
        assert a.untyped_storage().nbytes() == 4 * N
    assert call.num_calls == 2


@pytest.mark.parametrize("after_launches", [False, True])
def test_what_cannot_be_released_again_is_not_replayed(
    after_launches: bool, driver: Driver, add: Kernel
) -> None:
    def body(a: Tensor, b: Tensor) -> Results:
        other = torch.empty(N) if after_launches else b
        if not after_launches:
            release(other)
        (out,) = chain(add).body(a, a)
        if after_launches:
            release(other)
        return (out,)

    call = Call(body)
    for _ in range(4):
        a, b = random(), random()
        torch.testing.assert_close(call(a, b)[0], 3 * a)
    assert call.num_calls == 4
