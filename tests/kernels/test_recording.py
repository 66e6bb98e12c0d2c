"""Recorded calls: what is launched again, with which addresses.

The driver is a stand-in that runs kernels on CPU tensors (`launch_stand_ins`), so every call is
checked by its results, whoever launched it.
"""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from launch_stand_ins import Box, Driver, Kernel, Map, floats, stand_in
from recorded_calls import GRID, Call, N, add_kernel, chain, copy_kernel, random

from comet_compile.kernels import recording
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


def test_as_written_then_recorded_then_replayed(driver: Driver, add: Kernel) -> None:
    call = chain(add)
    for index in range(5):
        a, b = random(), random()
        (got,) = call(a, b)
        torch.testing.assert_close(got, a + b + b)
        assert call.num_calls == min(index + 1, 2)
        assert len(driver.launches) == 2 * max(0, index - 1)
        assert call.is_replayed == (index >= 1)
    assert add.num_calls == 4


def test_every_launch_is_as_the_first(driver: Driver, add: Kernel) -> None:
    call = chain(add)
    for stream in (70, 70, 70, 71):
        driver.stream = stream
        a, b = random(), random()
        (got,) = call(a, b)
    first, second, *last_two = driver.launches
    assert {one.grid for one in driver.launches} == {(3, 1, 1)}
    assert {one.block for one in driver.launches} == {(4 * 32, 1, 1)}
    assert {one.function for one in driver.launches} == {add.compiled.function}
    assert [one.stream for one in driver.launches] == [70, 70, 71, 71]
    # a, b, buffer, count; then buffer, b, result, count
    assert last_two[0].params == (a.data_ptr(), b.data_ptr(), last_two[1].params[0], N)
    assert last_two[1].params[1:] == (b.data_ptr(), got.data_ptr(), N)
    assert first.params[2] == second.params[0]


def test_addresses_in_the_middle(driver: Driver) -> None:
    kernel = Kernel(driver, dict.fromkeys("abcdefg", "*fp32"))
    constant = random(32)

    def body(x: Tensor, y: Tensor) -> Results:
        first, second = torch.empty(20).split([12, 8])
        other, result = torch.empty(4), torch.empty(6, 4)
        places = (x[3:], y[3:, 1:], second, first[1:], other, result[2:, 1:], constant[5:])
        launch(kernel, GRID, *places)
        return (result,)

    call = Call(body, constants=(constant,))
    for _ in range(4):
        x, y = random(), random(4, 64)[:, :2]
        (result,) = call(x, y)
    first, second = (one.params for one in driver.launches)
    for params in (first, second):
        buffer = params[3] - 4 * 1
        assert params[2] - buffer == 4 * 12
        # buffers lie apart, aligned as an allocation is
        assert abs(params[4] - buffer) >= 4 * 4
        assert (params[4] - buffer) % 256 == 0
        assert params[6] == constant.data_ptr() + 4 * 5
    ours = (
        x.data_ptr() + 4 * 3,
        y.data_ptr() + 4 * (3 * 64 + 1),
        result.data_ptr() + 4 * (2 * 4 + 1),
    )
    assert (*second[:2], second[5]) == ours


def test_what_has_not_moved_is_not_written_again(
    driver: Driver, add: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = chain(add)
    a, b = random(), random()
    for _ in range(3):
        call(a, b)
    move, moved = recording.Recording._move, []

    def note(self: recording.Recording, root: int, base: int) -> None:
        moved.append((root, base))
        move(self, root, base)

    monkeypatch.setattr(recording.Recording, "_move", note)
    call(a, b)
    call(a, a)
    # beside the two inputs, the buffer and the result may have moved
    assert [one for one in moved if one[0] < 2] == [(1, a.data_ptr())]


def test_numbers_stay_as_they_were(driver: Driver) -> None:
    kernel = Kernel(
        driver,
        {"x_ptr": "*fp32", "one": "constexpr", "i": "i32", "j": "i64", "f": "fp32", "n": "i32"},
    )

    def body(x: Tensor) -> Results:
        out = torch.empty_like(x)
        launch(kernel, GRID, x, 1, -7, 2**40 + 1, 0.25, 3, BLOCK=4, num_warps=8)
        return (out,)

    call = Call(body)
    for _ in range(3):
        x = random()
        call(x)
    assert [one.params for one in driver.launches] == [(x.data_ptr(), -7, 2**40 + 1, 0.25, 3)]


def test_results_are_new_and_as_they_were(driver: Driver, copy: Kernel) -> None:
    def body(x: Tensor) -> Results:
        plain = torch.empty(N)
        turned = torch.empty(2, 5, dtype=torch.float64).t()
        spread = torch.empty_strided((3, 2), (4, 1), dtype=torch.int32)
        folded = torch.empty(2 * N).view(2, N)
        launch(copy, GRID, x, plain, N)
        launch(copy, GRID, x, folded[1], N)
        return plain, None, turned, spread, x.new_empty(0, dtype=torch.float16), folded

    call = Call(body)
    kept = []
    for _ in range(4):
        x = random()
        results = call(x)
        torch.testing.assert_close(results[0], x)
        torch.testing.assert_close(results[5][1], x)
        kept.append(results)
    recorded, *replayed = kept[1:]
    for results in replayed:
        for got, like in zip(results, recorded, strict=True):
            assert (got is None) == (like is None)
            if got is not None:
                assert (got.shape, got.stride(), got.dtype) == (
                    like.shape, like.stride(), like.dtype,
                )  # fmt: skip
                assert got.storage_offset() == 0
    alive = [one.data_ptr() for results in kept for one in results if one is not None]
    alive = [address for address in alive if address]
    assert len(set(alive)) == len(alive) == 4 * 4


def test_inputs_that_are_none(driver: Driver, add: Kernel) -> None:
    def body(a: Tensor | None, b: Tensor, c: Tensor | None) -> Results:
        out = torch.empty_like(b)
        launch(add, GRID, a, b, out, N)
        launch(add, GRID, out, c, out, N)
        return (out,)

    call = Call(body)
    for _ in range(4):
        b = random()
        (got,) = call(None, b, None)
        torch.testing.assert_close(got, b)
    assert driver.launches[-2].params[0] == 0
    assert driver.launches[-1].params[1] == 0


def test_inputs_that_overlap(driver: Driver, add: Kernel) -> None:
    call = chain(add)
    for distance in (4, 4, 4, N):
        both = random(2 * N)
        # the second begins where the first still goes on: the halves of a fused tensor
        a, b = both[:N], both[distance : distance + N]
        torch.testing.assert_close(call(a, b)[0], a + b + b)
    a, b = random(), random()
    torch.testing.assert_close(call(a, b)[0], a + b + b)
    assert len(driver.launches) == 2 * 3


def test_inputs_that_are_one_are_recorded_when_they_are_two(driver: Driver, add: Kernel) -> None:
    call = chain(add)
    for _ in range(3):
        a = random()
        torch.testing.assert_close(call(a, a[:])[0], 3 * a)
    assert call.num_calls == 3
    for _ in range(2):
        a, b = random(), random()
        torch.testing.assert_close(call(a, b)[0], a + b + b)
    torch.testing.assert_close(call(a, a)[0], 3 * a)
    assert call.num_calls == 4
    assert len(driver.launches) == 4


@pytest.mark.parametrize("above_autograd", [False, True])
def test_views_and_what_need_not_copy(above_autograd: bool, driver: Driver, add: Kernel) -> None:
    def body(a: Tensor, b: Tensor) -> Results:
        x = a.view(2, 4).t().transpose(0, 1).reshape(-1).to(torch.float32).contiguous()
        first, _ = b.expand(2, 2 * N)[1].unsqueeze(0)[:, :][0].split([N, N])
        out = a.new_empty(N)
        launch(add, GRID, x, first.detach(), out, N)
        return (out.view(2, 4),)

    call = Call(body, above_autograd=above_autograd)
    for _ in range(4):
        a, b = random(), random(2 * N)
        torch.testing.assert_close(call(a, b)[0], (a + b[:N]).view(2, 4))
    assert call.num_calls == 2


def test_an_empty_input_has_no_memory(driver: Driver, add: Kernel) -> None:
    call = Call(lambda a, b: chain(add).body(b, b[:N]))
    for _ in range(3):
        b = random()
        torch.testing.assert_close(call(torch.empty(0), b)[0], 3 * b)
    assert len(driver.launches) == 2


def test_descriptors_move_with_their_memory(driver: Driver, copy: Kernel) -> None:
    def body_of_both(x: Box, out: Box) -> None:
        floats(out.address, N)[:] = floats(x.address, N)[:]

    kind = "tensordesc<fp32[2, 4]>"
    through = Kernel(driver, {"x_desc": kind, "out_desc": kind}, body_of_both)

    def body(x: Tensor) -> Results:
        # descriptors of an input, a buffer, and a part of a result
        buffer, out = torch.empty(4, 4), torch.empty(6, 4)
        boxes = [descriptor(t, (2, 4), (4, 1), (2, 4)) for t in (x[2:], buffer, out[3:])]
        launch(through, GRID, boxes[0], boxes[1])
        launch(through, GRID, boxes[1], boxes[2])
        return (out,)

    call = Call(body)
    for _ in range(5):
        x = random(4, 4)
        (out,) = call(x)
        torch.testing.assert_close(out[3:5], x[2:])
        if driver.launches:
            first, second = driver.launches[-2:]
            assert first.params[0] == Box(x[2:].data_ptr(), (2, 4), (4, 1))
            assert second.params == (first.params[1], Box(out[3:].data_ptr(), (2, 4), (4, 1)))
    assert len(driver.launches) == 6


@pytest.fixture
def move(driver: Driver) -> Call:
    """A call whose only descriptor is of its input."""
    kernel = Kernel(driver, {"x_desc": "tensordesc<fp32[2, 4]>"})

    def body(x: Tensor) -> Results:
        launch(kernel, GRID, descriptor(x, (2, 4), (4, 1), (2, 4)))
        return (torch.empty(2),)

    call = Call(body)
    for _ in range(2):
        call(random(2, 4))
    return call


def test_descriptors_are_encoded_once_for_an_address(move: Call) -> None:
    tensors = [random(2, 4) for _ in range(3)]
    for x in (*tensors, *tensors, tensors[2]):
        move(x)
    assert Map.made == [(x.data_ptr(), "encoding 0") for x in tensors]


def test_few_encoded_descriptors_are_kept(
    move: Call, monkeypatch: pytest.MonkeyPatch, driver: Driver
) -> None:
    monkeypatch.setattr(recording, "_MAX_MAPS", 2)
    first, second, third = (random(2, 4) for _ in range(3))
    for x in (first, second, first, third, first, second):
        move(x)
        assert driver.launches[-1].params[0].address == x.data_ptr()
        (one,) = recording._recordings["key"]._maps[0]  # type: ignore[union-attr]
        assert len(one._encoded) <= 2
    # the one used last stays, so the first is not encoded again
    made = [address for address, _ in Map.made]
    assert made == [x.data_ptr() for x in (first, second, third, second)]


def test_keys_are_told_apart(driver: Driver, add: Kernel, copy: Kernel) -> None:
    two = chain(add)

    def one_launch(a: Tensor, b: Tensor) -> Results:
        out = torch.empty_like(a)
        launch(copy, GRID, b, out, N)
        return (out,)

    one = Call(one_launch, key="other")
    for _ in range(4):
        a, b = random(), random()
        torch.testing.assert_close(two(a, b)[0], a + b + b)
        torch.testing.assert_close(one(a, b)[0], b)
    assert (two.num_calls, one.num_calls) == (2, 2)


def test_threads_do_not_mix_their_addresses(driver: Driver, add: Kernel) -> None:
    call = chain(add)
    for _ in range(2):
        call(random(), random())
    inputs = [(random(), random()) for _ in range(2)]
    results: list[Tensor | None] = [None, None]
    is_second_launching = threading.Event()

    def work(index: int) -> None:
        (results[index],) = call(*inputs[index])

    second = threading.Thread(target=work, args=(1,))
    body, first_thread = add.body, threading.get_ident()

    def wait_in_the_first_launch(*params: int) -> None:
        body(*params)
        if threading.get_ident() != first_thread:
            is_second_launching.set()
        elif second.ident is None:
            second.start()
            # without a lock it would come, and take the addresses of the launch to follow
            assert not is_second_launching.wait(0.3)

    add.body = wait_in_the_first_launch
    work(0)
    second.join(10)
    assert is_second_launching.is_set()
    for (a, b), got in zip(inputs, results, strict=True):
        assert got is not None
        torch.testing.assert_close(got, a + b + b)


def test_other_constants_have_their_own_recording(driver: Driver, add: Kernel) -> None:
    for _ in range(3):
        constant = random()

        def body(a: Tensor, constant: Tensor = constant) -> Results:
            out = torch.empty_like(a)
            launch(add, GRID, a, constant, out, N)
            return (out,)

        call = Call(body, constants=(constant,))
        for _ in range(4):
            a = random()
            torch.testing.assert_close(call(a)[0], a + constant)
        # with the last one gone, the next could have its address, and its id
        del constant, body, call
    assert len(driver.launches) == 3 * 2


def test_a_recording_notes_its_own_thread_only(driver: Driver, add: Kernel, copy: Kernel) -> None:
    a, b = random(), random()
    call = chain(add)
    call(a, b)
    body = call.body

    def body_beside_another(*inputs: Tensor) -> Results:
        x = torch.empty(N)
        other = threading.Thread(target=lambda: launch(copy, GRID, x + 1, torch.empty(N), N))
        other.start()
        other.join()
        return body(*inputs)

    call.body = body_beside_another
    call(a, b)
    call(a, b)
    assert [one.function for one in driver.launches] == [add.compiled.function] * 2


def test_a_recording_keeps_no_memory_of_a_call(driver: Driver) -> None:
    kernel = Kernel(driver, {"x_desc": "tensordesc<fp32[2, 4]>", "out_ptr": "*fp32"})
    gone = []

    def body(x: Tensor) -> Results:
        out, buffer = torch.empty(N), torch.empty(N)
        launch(kernel, GRID, descriptor(x, (2, 4), (4, 1), (2, 4)), buffer)
        gone.extend(map(weakref.ref, (x, out, buffer)))
        return (out,)

    call = Call(body)
    for _ in range(2):
        call(random(2, 4))
    assert call.is_replayed
    assert [one() for one in gone] == [None] * 6
