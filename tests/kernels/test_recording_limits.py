"""Calls that are not replayed: what no launch repeats, failures, profilers, and full caches."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from launch_stand_ins import Driver, Kernel, stand_in
from recorded_calls import GRID, Call, N, add_kernel, chain, copy_kernel, random
from triton import knobs

from comet_compile.kernels import launch_log, recording
from comet_compile.kernels.launch import descriptor, launch
from comet_compile.kernels.recording import Results


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return stand_in(monkeypatch)


@pytest.fixture
def add(driver: Driver) -> Kernel:
    return add_kernel(driver)


@pytest.fixture
def copy(driver: Driver) -> Kernel:
    return copy_kernel(driver)


Written = Callable[[Kernel, Tensor, Tensor], Results]
OBSTACLES: dict[str, tuple[Written, str]] = {}


def obstacle(reason: str) -> Callable[[Written], None]:
    """A call that returns a's values, launches, and does what cannot be repeated for a reason."""

    def keep(function: Written) -> None:
        OBSTACLES[function.__name__] = function, reason

    return keep


@obstacle(r"calls aten\.add")
def computes(copy: Kernel, a: Tensor, b: Tensor) -> Results:
    out = torch.empty(N)
    launch(copy, GRID, a + 0, out, N)
    return (out,)


@obstacle(r"calls aten\.zero_")
def computes_in_place(copy: Kernel, a: Tensor, b: Tensor) -> Results:
    out = torch.empty(N).zero_()
    launch(copy, GRID, a, out, N)
    return (out,)


@obstacle(r"calls aten\.zero")
def allocates_zeros(copy: Kernel, a: Tensor, b: Tensor) -> Results:
    out = torch.zeros(2 * N)
    launch(copy, GRID, a, out, N)
    return (out,)


@obstacle(r"calls aten\.(reshape|clone)")
def copies_in_a_reshape(copy: Kernel, a: Tensor, b: Tensor) -> Results:
    turned, out = b.view(2, 4).t().reshape(-1), torch.empty(N)
    launch(copy, GRID, turned, out, N)
    launch(copy, GRID, a, out, N)
    return (out,)


@obstacle(r"calls aten\.(to|_to_copy)")
def converts(copy: Kernel, a: Tensor, b: Tensor) -> Results:
    wide, out = b.to(torch.float64), torch.empty(N)
    launch(copy, GRID, wide, out, N)
    launch(copy, GRID, a, out, N)
    return (out,)


FOREIGN = torch.zeros(16)


@obstacle("memory that is no input, buffer or result")
def reads_unknown_memory(copy: Kernel, a: Tensor, b: Tensor) -> Results:
    out = torch.empty(N)
    launch(copy, GRID, FOREIGN[4:], out, N)
    launch(copy, GRID, a, out, N)
    return (out,)


@obstacle("kernels are not loaded")
def is_not_loaded(copy: Kernel, a: Tensor, b: Tensor) -> Results:
    copy.compiled.module = None
    out = torch.empty(N)
    launch(copy, GRID, a, out, N)
    return (out,)


@obstacle("a result is not an allocation")
def returns_part_of_an_allocation(copy: Kernel, a: Tensor, b: Tensor) -> Results:
    out = torch.empty(2 * N)
    launch(copy, GRID, a, out, N)
    return (out[:N],)


@obstacle("a result is not an allocation")
def returns_the_end_of_an_allocation(copy: Kernel, a: Tensor, b: Tensor) -> Results:
    out = torch.empty(2 * N)
    launch(copy, GRID, a, out[N:], N)
    return (out[N:],)


@obstacle("two results share memory")
def returns_one_thing_twice(copy: Kernel, a: Tensor, b: Tensor) -> Results:
    out = torch.empty(2, 4)
    launch(copy, GRID, a, out, N)
    return out.view(-1), out.t()


@obstacle("a result is not an allocation")
def returns_an_input(copy: Kernel, a: Tensor, b: Tensor) -> Results:
    launch(copy, GRID, b, torch.empty(N), N)
    return (a,)


@pytest.mark.parametrize("name", OBSTACLES)
@pytest.mark.parametrize("above_autograd", [False, True])
def test_what_cannot_be_repeated_runs_as_written(
    name: str,
    above_autograd: bool,
    driver: Driver,
    copy: Kernel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    body, reason = OBSTACLES[name]
    call = Call(lambda a, b: body(copy, a, b), above_autograd=above_autograd)
    caplog.set_level(logging.DEBUG, recording.__name__)
    for _ in range(4):
        a, b = random(), random()
        got = call(a, b)[0]
        assert got is not None
        assert torch.equal(got[:N], a)
    assert call.num_calls == 4
    assert driver.launches == []
    assert list(recording._recordings.values()) == [None]
    (record,) = caplog.records
    assert re.search(reason, record.getMessage())


def test_a_descriptor_of_a_constant_runs_as_written(driver: Driver) -> None:
    constant = random(2, 4)
    kernel = Kernel(driver, {"x_desc": "tensordesc<fp32[2, 4]>"})

    def body(x: Tensor) -> Results:
        launch(kernel, GRID, descriptor(constant, (2, 4), (4, 1), (2, 4)))
        return (torch.empty(2),)

    call = Call(body, constants=(constant,))
    for _ in range(3):
        call(random())
    assert call.num_calls == 3


@pytest.mark.parametrize("sizes", [[8, 8, 8, 4, 8], [8, 8, 8, 8, 8, 8], [8, 8, 4, 8, 8, 8], []])
def test_a_layout_that_the_driver_contradicts_runs_as_written(
    sizes: list[int], driver: Driver, add: Kernel
) -> None:
    add.sizes = sizes
    call = chain(add)
    for _ in range(4):
        a, b = random(), random()
        torch.testing.assert_close(call(a, b)[0], a + b + b)
    assert call.num_calls == 4
    assert driver.launches == []


def test_a_launch_that_fails_raises_and_the_next_works(driver: Driver, add: Kernel) -> None:
    call = chain(add)
    for _ in range(2):
        call(random(), random())
    driver.code = 719
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx failed with CUDA error 719"):
        call(random(), random())
    driver.code = 0
    a, b = random(), random()
    torch.testing.assert_close(call(a, b)[0], a + b + b)
    assert call.num_calls == 2


def test_a_call_that_raises_is_recorded_when_it_does_not(driver: Driver, add: Kernel) -> None:
    call = chain(add)
    body = call.body
    call(random(), random())

    def fail(a: Tensor, b: Tensor) -> Results:
        launch(add, GRID, a, b, a, N)
        raise ValueError("as written")

    call.body = fail
    with pytest.raises(ValueError, match="as written"):
        call(random(), random())
    assert launch_log._active.log is None
    assert not call.is_replayed
    call.body = body
    for _ in range(2):
        a, b = random(), random()
        torch.testing.assert_close(call(a, b)[0], a + b + b)
    assert len(driver.launches) == 2


def test_a_profiler_sees_every_launch(driver: Driver, add: Kernel) -> None:
    hooks = knobs.runtime.launch_enter_hook
    call = chain(add)
    # (whether a profiler asks, calls as written so far, launches through the driver so far)
    steps = [
        (False, 1, 0),
        (True, 2, 0),
        (True, 3, 0),
        (False, 4, 0),  # recorded only now
        (False, 4, 2),
        (True, 5, 2),
        (True, 6, 2),
        (False, 6, 4),
    ]
    for is_watched, num_calls, num_launches in steps:
        if is_watched:
            hooks.add(print)
        try:
            a, b = random(), random()
            torch.testing.assert_close(call(a, b)[0], a + b + b)
        finally:
            hooks.remove(print)
        assert (call.num_calls, len(driver.launches)) == (num_calls, num_launches)


def test_what_is_kept_is_bounded(
    driver: Driver, add: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_MAX_KEPT", 4)
    for key in range(10):
        call = chain(add)
        call.key = key
        for _ in range(3):
            a, b = random(), random()
            torch.testing.assert_close(call(a, b)[0], a + b + b)
        assert call.num_calls == 2
        assert len(recording._recordings) <= 4
        assert len(recording._seen) <= 4
