"""The memory that a launch is made of, as a driver reads it (`launch_stand_ins`)."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from launch_stand_ins import FORMATS, Box, Driver, Kernel, Map, stand_in
from triton.runtime import driver as runtime

from comet_compile.kernels import packed_launch
from comet_compile.kernels.launch import descriptor
from comet_compile.kernels.packed_launch import (
    PackedLaunch,
    TensorMap,
    UnknownLayoutError,
    address_of,
)

GRID = (5, 2, 1)
BOX = "tensordesc<fp16[16, 32]>"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return stand_in(monkeypatch)


def test_parameters_in_order_without_constants(driver: Driver) -> None:
    signature = {
        "n": "i32",
        "a_ptr": "*fp16",
        "one": "constexpr",
        "alpha": "fp32",
        "w_desc": BOX,
        "b_ptr": "*i32",
        "none": "constexpr",
        "offset": "i64",
        "h_desc": "tensordesc<fp16[1, 8, 8]>",
        "BLOCK": "constexpr",
    }
    kernel = Kernel(driver, signature)
    tensor = torch.empty(64, 64, dtype=torch.float16)
    first = descriptor(tensor, (48, 32), (64, 1), (16, 32))
    second = descriptor(tensor, (2, 7, 8), (2**33, 64, 1), (1, 8, 8))
    args = (2**31 - 1, tensor, 1, -0.5, first, tensor, None, -(2**40), second)
    packed = PackedLaunch(kernel.compiled, GRID, args)
    assert (packed.pointer_args, packed.map_args) == ([1, 5], [4, 8])
    packed.addresses[0], packed.addresses[1] = 0xA000, 2**63 + 16
    maps = [packed.encode(index, args[at], 0x1000 * index) for index, at in enumerate((4, 8))]
    for index, made in enumerate(maps):
        packed.set_map(index, made)
    assert Map.made == [(0, "encoding 0"), (0x1000, "encoding 1")]
    packed.run(9)
    (made,) = driver.launches
    assert made.params == (
        2**31 - 1,
        0xA000,
        -0.5,
        Box(0, (48, 32), (64, 1)),
        2**63 + 16,
        -(2**40),
        Box(0x1000, (2, 7, 8), (2**33, 64, 1)),
    )
    assert made.scratch == (0, 0)


def test_what_is_written_anew_is_launched_with(driver: Driver) -> None:
    kernel = Kernel(driver, {"a_ptr": "*fp32", "x_desc": BOX, "b_ptr": "*fp32"})
    tensor = torch.empty(64, 64, dtype=torch.float16)
    args = (tensor, descriptor(tensor, (48, 32), (64, 1), (16, 32)), tensor)
    packed = PackedLaunch(kernel.compiled, GRID, args)
    expected = []
    for step in range(3):
        packed.addresses[step % 2] = 16 * step + 16
        tensor_map = packed.encode(0, args[1], 0x100 + step)
        packed.set_map(0, tensor_map)
        packed.run(70 + step)
        box = Box(0x100 + step, (48, 32), (64, 1))
        expected.append((packed.addresses[0], box, packed.addresses[1]))
    assert [one.params for one in driver.launches] == expected
    assert expected[2][0] == 48
    assert [one.stream for one in driver.launches] == [70, 71, 72]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_type_of_number(kind: str, driver: Driver) -> None:
    kernel = Kernel(driver, {"x_ptr": "*fp32", "value": kind, "y_ptr": "*fp32"})
    value = 1.5 if kind[0] == "f" else 1 if kind[0] == "u" else -1
    packed = PackedLaunch(kernel.compiled, GRID, (None, value, None))
    packed.addresses[1] = 2**64 - 1
    packed.run(0)
    assert driver.launches[0].params == (0, value, 2**64 - 1)


def test_grid_threads_and_shared_memory(driver: Driver) -> None:
    kernel = Kernel(driver, {}, num_warps=8, shared=98304)
    PackedLaunch(kernel.compiled, GRID, ()).run(2**40)
    (made,) = driver.launches
    assert (made.grid, made.block, made.shared_bytes) == (GRID, (256, 1, 1), 98304)
    assert (made.stream, made.num_attributes) == (2**40, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_ctas", 2),
        ("launch_cooperative_grid", True),
        ("launch_pdl", True),
        ("global_scratch_size", 64),
        ("profile_scratch_size", 64),
    ],
)
def test_a_launch_that_needs_more_is_refused(name: str, value: Any, driver: Driver) -> None:
    plain = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False}
    kernel = Kernel(driver, {}, **plain, global_scratch_size=0, profile_scratch_size=0)
    PackedLaunch(kernel.compiled, GRID, ())
    setattr(kernel.compiled.metadata, name, value)
    with pytest.raises(UnknownLayoutError, match=f"{name} is {value}"):
        PackedLaunch(kernel.compiled, GRID, ())


@pytest.mark.parametrize("kind", ["fp16", "nvTmaDesc", ("i32", "i32")])
def test_unknown_types_are_refused(kind: Any, driver: Driver) -> None:
    kernel = Kernel(driver, {"x": "i32", "y": "i32"})
    kernel.compiled.src.signature["y"] = kind
    with pytest.raises(UnknownLayoutError, match="argument 1 has the type"):
        PackedLaunch(kernel.compiled, GRID, (1, 2))


@pytest.mark.parametrize("maps", [None, []])
def test_descriptors_in_parts_are_refused(maps: Any, driver: Driver) -> None:
    # before sm_90, where a kernel reads sizes and strides itself
    kernel = Kernel(driver, {"x_desc": BOX}, tensordesc_meta=maps)
    tensor = torch.empty(64, 64, dtype=torch.float16)
    box = descriptor(tensor, (48, 32), (64, 1), (16, 32))
    with pytest.raises(UnknownLayoutError, match="that the copy engine does not read"):
        PackedLaunch(kernel.compiled, GRID, (box,))


@pytest.mark.parametrize(
    "sizes",
    [
        [8, 4, 8],  # one less
        [8, 4, 8, 8, 8],  # one more
        [8, 8, 8, 8],
        [],
    ],
)
def test_other_sizes_than_the_drivers_are_refused(sizes: list[int], driver: Driver) -> None:
    kernel = Kernel(driver, {"x_ptr": "*fp32", "n": "i32"})
    PackedLaunch(kernel.compiled, GRID, (None, 3))
    kernel.sizes = sizes
    with pytest.raises(UnknownLayoutError, match=r"expected \[8, 4, 8, 8\]"):
        PackedLaunch(kernel.compiled, GRID, (None, 3))


def test_a_driver_that_cannot_be_asked_is_refused(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(driver, {})
    old = SimpleNamespace(cuLaunchKernelEx=driver.cuLaunchKernelEx)
    monkeypatch.setattr(packed_launch, "driver", lambda: old)
    with pytest.raises(UnknownLayoutError, match=r"older than 12\.4"):
        PackedLaunch(kernel.compiled, GRID, ())


def test_a_launch_that_fails_raises(driver: Driver) -> None:
    packed = PackedLaunch(Kernel(driver, {}).compiled, GRID, ())
    driver.code = 1
    with pytest.raises(RuntimeError, match=r"cuLaunchKernelEx failed with CUDA error 1$"):
        packed.run(0)


def test_a_thread_without_a_context_is_given_torchs(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    packed = PackedLaunch(Kernel(driver, {"n": "i32"}).compiled, GRID, (7,))
    driver.context = 0
    for _ in range(2):
        packed.run(0)
    assert driver.context == 503
    assert [one.params for one in driver.launches] == [(7,), (7,)]
    # what is wrong beside that is told
    driver.code = 201
    with pytest.raises(RuntimeError, match="CUDA error 201"):
        packed.run(0)


class Made:
    """Stands in for what Triton returns: an object whose last 128 bytes are the descriptor."""

    __slots__ = tuple(f"word_{index:02}" for index in range(16))


@pytest.mark.parametrize("name", ["fill_tma_descriptor_tiled", "fill_tma_descriptor"])
@pytest.mark.parametrize("padding", ["zero", "nan"])
def test_descriptors_are_made_by_triton(
    name: str, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fill(*args: Any) -> Made:
        calls.append(args)
        made = Made()
        for word in Made.__slots__:
            setattr(made, word, word)
        return made

    active = SimpleNamespace(utils=SimpleNamespace(**{name: fill}))
    monkeypatch.setattr(runtime, "_active", active)
    argument = descriptor(torch.empty(4, 64, dtype=torch.float16), (4, 40), (64, 1), (2, 32))
    argument.padding = padding
    encoding = {"swizzle": 2, "elem_size": 2, "elem_type": 6, "block_size": [2, 32]}
    tensor_map = TensorMap(argument, 4096, encoding)
    assert calls == [(4096, 2, 2, 6, [2, 32], [4, 40], [64, 1], int(padding == "nan"))]
    words = (ctypes.c_uint64 * 16).from_address(tensor_map.address)
    assert list(words) == [id(word) for word in Made.__slots__]


def test_the_type_of_an_element_is_numbered_as_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fill(*args: Any) -> Made:
        seen.append(args[3])
        return Made()

    active = SimpleNamespace(utils=SimpleNamespace(fill_tma_descriptor_tiled=fill))
    monkeypatch.setattr(runtime, "_active", active)
    argument = descriptor(torch.empty(4, 64, dtype=torch.bfloat16), (4, 40), (64, 1), (2, 32))
    for kind in (6, 7, 8, 9, 10):
        encoding = {"swizzle": 2, "elem_size": 2, "elem_type": kind, "block_size": [2, 32]}
        TensorMap(argument, 4096, encoding)
    # Triton's compiler numbers bfloat16 10 and float64 9; the driver has them at 9 and 8
    assert seen == [6, 7, 10, 8, 9]


def test_where_an_argument_begins() -> None:
    tensor = torch.empty(4, 8)
    assert address_of(None) == 0
    assert address_of(tensor[1:]) == tensor.data_ptr() + 32
    assert address_of(descriptor(tensor[2:], (2, 8), (8, 1), (2, 8))) == tensor.data_ptr() + 64
    assert address_of(tensor[:0]) == 0
