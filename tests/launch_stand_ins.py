"""A CUDA driver and compiled kernels that are not there: launches that run on the CPU.

A kernel's body is a Python function of what a GPU would be given, addresses and numbers. Launched
through Triton (`Kernel.__getitem__`) it gets them from the tensors; launched through the driver, it
gets what the driver reads at the addresses that it was passed, as `cuLaunchKernelEx` does. So wrong
parameters give wrong results, or are seen in `Driver.launches`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import struct
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from comet_compile.kernels import packed_launch, recording

MAP_BYTES = 128
# How a parameter is read, by its type in Triton's signature; pointers and descriptors aside.
FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Box:
    """A descriptor as a body gets it."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the driver was asked for; `params` as the kernel's body gets them."""

    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    num_attributes: int
    params: tuple[Any, ...]
    scratch: tuple[int, int]


class Config(ctypes.Structure):
    """CUlaunchConfig, written down from cuda.h once more."""

    _fields_ = (
        ("gridDimX", ctypes.c_uint),
        ("gridDimY", ctypes.c_uint),
        ("gridDimZ", ctypes.c_uint),
        ("blockDimX", ctypes.c_uint),
        ("blockDimY", ctypes.c_uint),
        ("blockDimZ", ctypes.c_uint),
        ("sharedMemBytes", ctypes.c_uint),
        ("hStream", ctypes.c_void_p),
        ("attrs", ctypes.c_void_p),
        ("numAttrs", ctypes.c_uint),
    )


class Driver:
    """The part of libcuda that is used.

    `code` is what launches return, `stream` the one that is current, `context` this thread's.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.kernels: dict[int, Kernel] = {}
        self.code, self.stream, self.context = 0, 70, 500

    def cuFuncGetParamInfo(self, function: Any, index: Any, offset: Any, size: Any) -> int:
        """Write the size of a parameter through `size`, made by `ctypes.byref`."""
        sizes = self.kernels[function.value].sizes
        if index.value >= len(sizes):
            return 1
        offset._obj.value, size._obj.value = sum(sizes[: index.value]), sizes[index.value]
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        """Write a device's context through `context`."""
        context._obj.value = 500 + device
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        """Make a context this thread's."""
        self.context = context.value
        return 0

    def cuLaunchKernelEx(self, config: int, function: int, table: int, extra: None) -> int:
        """Read what lies at the addresses, then run the kernel's body."""
        if self.code != 0 or self.context == 0:
            return self.code or 201
        made, kernel = Config.from_address(config), self.kernels[function]
        sizes = kernel.sizes
        places = (ctypes.c_void_p * len(sizes)).from_address(table)
        raw = [ctypes.string_at(at, size) for at, size in zip(places, sizes, strict=True)]
        launch = Launch(
            function,
            (made.gridDimX, made.gridDimY, made.gridDimZ),
            (made.blockDimX, made.blockDimY, made.blockDimZ),
            made.sharedMemBytes,
            made.hStream or 0,
            made.numAttrs,
            kernel.read(raw[:-2]),
            (_read("Q", raw[-2]), _read("Q", raw[-1])),
        )
        self.launches.append(launch)
        kernel.body(*launch.params)
        return 0


class Kernel:
    """A kernel as Triton has it, and all that Triton knows of it once it is compiled.

    `signature` has its parameters, constants as "constexpr" at the end or where they are passed.
    """

    _functions = itertools.count(1000)

    def __init__(
        self,
        driver: Driver,
        signature: dict[str, str],
        body: Callable[..., None] = lambda *params: None,
        **metadata: Any,
    ) -> None:
        self.body = body
        self.num_calls = 0  # through Triton
        maps = [f"encoding {n}" for n in range(_count_maps(signature))]
        facts = {"num_warps": 4, "shared": 1024, "tensordesc_meta": maps, **metadata}
        self.compiled = SimpleNamespace(
            src=SimpleNamespace(signature=signature),
            metadata=SimpleNamespace(**facts),
            function=next(self._functions),
            module="loaded",
        )
        self.kinds = [kind for kind in signature.values() if kind != "constexpr"]
        self.sizes = [size for kind in self.kinds for size in _sizes_of(kind)] + [8, 8]
        driver.kernels[self.compiled.function] = self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Launch through Triton."""

        def run(*args: Any, **options: Any) -> Any:
            self.num_calls += 1
            kinds = self.compiled.src.signature.values()
            given = zip(args, kinds, strict=False)  # constants follow by name
            self.body(*[_given(arg, kind) for arg, kind in given if kind != "constexpr"])
            return self.compiled

        return run

    def read(self, raw: Sequence[bytes]) -> tuple[Any, ...]:
        """Return parameters as the body gets them."""
        values, rest = [], list(raw)
        for kind in self.kinds:
            taken = [rest.pop(0) for _ in _sizes_of(kind)]
            if kind.startswith("tensordesc"):
                rank = len(taken) // 2
                shape = tuple(_read("i", size) for size in taken[1 : 1 + rank])
                strides = tuple(_read("q", stride) for stride in taken[1 + rank :])
                values.append(Box(_read("Q", taken[0][:8]), shape, strides))
            else:
                values.append(_read("Q" if kind.startswith("*") else FORMATS[kind], taken[0]))
        return tuple(values)


class Map:
    """A descriptor that says no more than where it begins."""

    made: list[tuple[int, Any]]  # (address, encoding) of all

    def __init__(self, argument: TensorDescriptor, address: int, encoding: Any) -> None:
        self.made.append((address, encoding))
        self._bytes = ctypes.create_string_buffer(address.to_bytes(8, "little"), MAP_BYTES)
        self.address = ctypes.addressof(self._bytes)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Put a driver in place of CUDA's, and forget what was recorded and which maps were made."""
    driver = Driver()
    monkeypatch.setattr(packed_launch, "driver", lambda: driver)
    monkeypatch.setattr(packed_launch, "TensorMap", Map)
    monkeypatch.setattr(Map, "made", [], raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: driver.stream, raising=False
    )
    monkeypatch.setattr(recording, "_recordings", {})
    monkeypatch.setattr(recording, "_seen", {})
    return driver


def floats(address: int, count: int) -> Any:
    """Return `count` float32 in memory, to be read and written."""
    return (ctypes.c_float * count).from_address(address)


def _sizes_of(kind: str) -> list[int]:
    if kind.startswith("*"):
        return [8]
    if kind.startswith("tensordesc"):
        rank = kind.count(",") + 1
        return [MAP_BYTES, *[4] * rank, *[8] * rank]
    return [struct.calcsize(FORMATS[kind])]


def _count_maps(signature: dict[str, str]) -> int:
    return sum(kind.startswith("tensordesc") for kind in signature.values())


def _given(arg: Any, kind: str) -> Any:
    if isinstance(arg, TensorDescriptor):
        return Box(arg.base.data_ptr(), tuple(arg.shape), tuple(arg.strides))
    return arg.data_ptr() if isinstance(arg, Tensor) else 0 if arg is None else arg


def _read(form: str, raw: bytes) -> Any:
    return struct.unpack("<" + form, raw)[0]
