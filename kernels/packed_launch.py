"""One kernel launch with its parameters packed for the CUDA driver, ready to go again.

Triton looks at every argument of every launch, asks the driver about every pointer and encodes
every descriptor anew, which takes longer than many of the layer's kernels run. Here the parameters
of a launch that Triton has made once lie in memory as the driver wants them, and only what changed
is written before the next one.

The layout of the parameters is Triton's: the arguments that are no constants, in order, a
descriptor as the 128 bytes that the copy engine reads, its sizes and its strides; then two scratch
pointers. `PackedLaunch` compares it with what the driver says of the loaded kernel, and refuses a
kernel that it does not know how to launch: that one goes on through Triton.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_INTS: dict[str, Any] = {
    "i1": ctypes.c_int8,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "u1": ctypes.c_uint8,
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "f32": ctypes.c_float,
    "fp64": ctypes.c_double,
}
_MAP_BYTES = 128
_INVALID_CONTEXT = 201


class _Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class UnknownLayoutError(Exception):
    """A kernel that cannot be launched from here; the text says why."""


class PackedLaunch:
    """A kernel with its grid and parameters.

    `addresses` holds the pointer arguments, to be written by index; descriptors are put in with
    `set_map`. `pointer_args` and `map_args` say which arguments these are.
    """

    def __init__(self, compiled: Any, grid: tuple[int, ...], args: Sequence[Any]) -> None:
        types = list(compiled.src.signature.values())[: len(args)]
        maps = list(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        self.pointer_args: list[int] = []
        self.map_args: list[int] = []
        self._encodings: list[Any] = []
        self._kept: list[Any] = [compiled]
        sizes: list[int] = []
        places: list[int | None] = []  # None: filled in below, or with set_map
        for index, (arg, kind) in enumerate(zip(args, types, strict=True)):
            if kind == "constexpr":
                continue
            if not isinstance(kind, str):
                raise UnknownLayoutError(f"argument {index} has the type {kind}")
            if kind.startswith("*"):
                self.pointer_args.append(index)
                sizes.append(8)
                places.append(None)
            elif kind.startswith("tensordesc"):
                if not maps:
                    raise UnknownLayoutError("descriptors that the copy engine does not read")
                self.map_args.append(index)
                self._encodings.append(maps[len(self.map_args) - 1])
                shape = [ctypes.c_int32(size) for size in arg.shape]
                strides = [ctypes.c_int64(stride) for stride in arg.strides]
                sizes += [_MAP_BYTES, *[4] * len(shape), *[8] * len(strides)]
                places += [None, *map(self._keep, shape), *map(self._keep, strides)]
            elif kind in _INTS:
                value = _INTS[kind](arg)
                sizes.append(ctypes.sizeof(value))
                places.append(self._keep(value))
            else:
                raise UnknownLayoutError(f"argument {index} has the type {kind}")
        places += [self._keep(ctypes.c_uint64(0)) for _ in range(2)]  # scratch memory
        sizes += [8, 8]
        _check_layout(compiled, sizes)
        self._fill(places, sizes)
        self._config = _config_of(compiled, grid)
        self._config_at = ctypes.addressof(self._config)
        self._function = compiled.function
        self._launch = driver().cuLaunchKernelEx

    def _fill(self, places: Sequence[int | None], sizes: Sequence[int]) -> None:
        """Make the table of the parameters' addresses, and room for the pointers."""
        self.addresses = (ctypes.c_uint64 * max(1, len(self.pointer_args)))()
        self._table = (ctypes.c_void_p * len(places))()
        self._table_at = ctypes.addressof(self._table)
        self._map_places: list[int] = []
        first, num_pointers = ctypes.addressof(self.addresses), 0
        for index, place in enumerate(places):
            if place is not None:
                self._table[index] = place
            elif sizes[index] == _MAP_BYTES:
                self._map_places.append(index)
            else:
                self._table[index] = first + 8 * num_pointers
                num_pointers += 1

    def set_map(self, index: int, tensor_map: TensorMap) -> None:
        """Take `tensor_map` for the `index`-th descriptor; the caller keeps it alive."""
        self._table[self._map_places[index]] = tensor_map.address

    def encode(self, index: int, argument: TensorDescriptor, address: int) -> TensorMap:
        """Return the `index`-th descriptor for memory at `address`."""
        return TensorMap(argument, address, self._encodings[index])

    def run(self, stream: int) -> None:
        """Launch on `stream`."""
        self._config.stream = stream
        code = self._launch(self._config_at, self._function, self._table_at, None)
        if code == _INVALID_CONTEXT:
            # a thread that has not called CUDA yet; Triton, too, gives it a context
            _enter_context()
            code = self._launch(self._config_at, self._function, self._table_at, None)
        if code != 0:
            raise RuntimeError(f"cuLaunchKernelEx failed with CUDA error {code}")

    def _keep(self, value: Any) -> int:
        self._kept.append(value)
        return ctypes.addressof(value)


class TensorMap:
    """What the copy engine knows of a tensor: 128 bytes that the launch copies."""

    def __init__(self, argument: TensorDescriptor, address: int, encoding: Any) -> None:
        from triton.backends.nvidia import driver as backend
        from triton.runtime import driver as runtime

        utils = runtime.active.utils
        # Triton 3.7 has two kinds, of which this is the one that 3.6 had
        fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor
        self._made = fill(
            address,
            encoding["swizzle"],
            encoding["elem_size"],
            backend.TMA_DTYPE_DEVICE_TO_HOST[encoding["elem_type"]],
            encoding["block_size"],
            list(argument.shape),
            list(argument.strides),
            1 if argument.padding == "nan" else 0,
        )
        # the map is the last member of Triton's object
        self.address = id(self._made) + type(self._made).__basicsize__ - _MAP_BYTES


def address_of(argument: Tensor | TensorDescriptor | None) -> int:
    """Return where an argument of a launch begins, 0 for None."""
    if argument is None:
        return 0
    tensor = argument.base if isinstance(argument, TensorDescriptor) else argument
    return int(tensor.data_ptr())


@functools.cache
def driver() -> ctypes.CDLL:
    """Return the CUDA driver."""
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    return library


def _enter_context() -> None:
    """Give this thread the context in which torch uses its current device."""
    context = ctypes.c_void_p()
    driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), torch.cuda.current_device())
    driver().cuCtxSetCurrent(context)


def _config_of(compiled: Any, grid: tuple[int, ...]) -> _Config:
    facts = compiled.metadata
    for name, plain in (
        ("num_ctas", 1),
        ("launch_cooperative_grid", False),
        ("launch_pdl", False),
        ("global_scratch_size", 0),
        ("profile_scratch_size", 0),
    ):
        if getattr(facts, name, plain) != plain:
            raise UnknownLayoutError(f"{name} is {getattr(facts, name)}")
    threads = 32 * facts.num_warps
    return _Config(tuple(grid), (threads, 1, 1), facts.shared, None, None, 0)


def _check_layout(compiled: Any, sizes: Sequence[int]) -> None:
    """Hold the sizes of all parameters against what the driver knows of the loaded kernel."""
    ask = getattr(driver(), "cuFuncGetParamInfo", None)
    if ask is None:
        raise UnknownLayoutError("the CUDA driver is older than 12.4")
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    function = ctypes.c_void_p(compiled.function)
    known = []
    for index in range(len(sizes) + 1):
        code = ask(function, ctypes.c_size_t(index), ctypes.byref(offset), ctypes.byref(size))
        if code != 0:
            break
        known.append(size.value)
    if known != list(sizes):
        raise UnknownLayoutError(f"parameters of {known} bytes, expected {list(sizes)}")
