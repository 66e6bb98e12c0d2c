"""Run Triton kernels on the CPU, in Triton's own interpreter, in this process.

Triton chooses between compiler and interpreter where a function is decorated, so by the time a test
runs, its kernels and Triton's library are made for the compiler. `interpreting` puts interpreted
twins in their places and takes them out again: no environment variable, no process of its own, and
no other test sees them.

bfloat16 goes wrong there; float16 and float32 are right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import pkgutil
import sys
import time
import types
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


def _reduce(self: interpreter.ReduceOps, inputs: tuple[tl.tensor, ...]) -> Any:
    """Reduce as Triton's `generic_reduce`, by whole slices instead of one number after the other.

    Which is how the sort of a routing table took nine tenths of the time of its tests.
    """
    if self.axis is None:
        return _reduce_numbers(self, inputs)
    slices = [np.moveaxis(one.handle.data, self.axis, 0) for one in inputs]

    def tensors_at(place: int) -> tuple[tl.tensor, ...]:
        rows = (data[place].copy() for data in slices)
        return tuple(self.to_tensor(row, one.dtype) for row, one in zip(rows, inputs, strict=True))

    total = tensors_at(0)
    for place in range(1, len(slices[0])):
        combined = self.combine_fn.fn(*total, *tensors_at(place))
        total = combined if isinstance(combined, tuple) else (combined,)
    if not self.keep_dims:
        return total
    shape = list(inputs[0].handle.data.shape)
    shape[self.axis] = 1
    return [self.to_tensor(one.handle.data.reshape(shape), one.dtype) for one in total]


_reduce_numbers = interpreter.ReduceOps.generic_reduce
_look_up_dtype = interpreter._get_np_dtype


def _np_dtype(dtype: tl.dtype, _known: dict[str, Any] = {}) -> Any:  # noqa: B006, a cache
    """Look up a dtype as Triton does, but without making its table anew every time."""
    if dtype.name not in _known:
        _known[dtype.name] = _look_up_dtype(dtype)
    return _known[dtype.name]


@functools.cache
def _shape(sizes: tuple[int, ...]) -> tuple[tl.constexpr, Any]:
    """The number of elements and the shape of a tensor, as Triton's objects."""
    return tl.constexpr(math.prod(sizes)), tl.core.tuple([tl.constexpr(size) for size in sizes])


def _init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    """Make a tensor as Triton does, but without making its shape anew every time."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _shape(tuple(type.shape) if type.is_block() else ())


@functools.cache
def _checked_block(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
    """The shape of a block, its number of elements, and the shape as text."""
    block = tl.block_type.__new__(tl.block_type)
    _init_block_as_triton(block, tl.float32, list(sizes))
    return block.shape, block.numel, str(block.shape)


def _init_block(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    """Make the type of a block as Triton does, but without checking its shape every time."""
    sizes = tuple(one.value if isinstance(one, tl.constexpr) else one for one in shape)
    self.shape, self.numel, text = _checked_block(sizes)
    self.element_ty, self.name = element_ty, f"<{text}, {element_ty}>"


_init_block_as_triton = tl.block_type.__init__


def hasten() -> None:
    """Make Triton's interpreter quicker in this process, for good; it computes what it did."""
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter._get_np_dtype = _np_dtype
    tl.tensor.__init__, tl.block_type.__init__ = _init_tensor, _init_block
    # of integers that overflow, nobody is told without `debug`: a quarter of the time for nothing
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


@contextlib.contextmanager
def _language_for_numbers() -> Iterator[None]:
    """Let Triton's language compute inside, where it describes what to compile otherwise.

    Triton changes it anew for each launch and each call of a device function, in a third of the
    time of a test, and changes back only some of it: nothing could be compiled afterwards.
    """
    change = interpreter._patch_lang
    changes = change(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    try:
        yield
    finally:
        interpreter._patch_lang = change
        changes.restore()


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Interpret every kernel of the package that is launched inside."""
    hasten()
    twins: dict[int, InterpretedFunction] = {}  # by id: the hash of a kernel is that of its source
    changed: list[tuple[ModuleType, str, JITFunction]] = []
    try:
        for name, module in list(sys.modules.items()):
            if not name.startswith(("triton.language", "comet_compile.kernels", __name__)):
                continue
            for attribute, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    twin = twins.setdefault(id(value), InterpretedFunction(value.fn))
                    changed.append((module, attribute, value))
                    setattr(module, attribute, twin)
        with triton.knobs.runtime.scope(), _language_for_numbers():
            triton.knobs.runtime.interpret = True
            yield
    finally:
        for module, attribute, value in changed:
            setattr(module, attribute, value)


def interpret_for_good() -> None:
    """Interpret all kernels of the package in this process, a rank that others wait for."""
    from comet_compile import kernels

    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    interpreter.InterpreterBuilder.create_atomic_rmw = _patient_atomic_rmw
    _for_good.enter_context(interpreting())


_for_good = contextlib.ExitStack()
_atomic_rmw = interpreter.InterpreterBuilder.create_atomic_rmw


def _patient_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, *rest: Any) -> Any:
    """Leave the core to others when a flag is looked at, which is what an addition of 0 does."""
    if not val.data.any():
        time.sleep(0.0005)
    return _atomic_rmw(self, op, ptr, val, *rest)


@functools.cache
def why_not() -> str | None:
    """Return why kernels cannot be interpreted here, None if they can."""
    out = torch.full((4,), -1)
    try:
        with interpreting():
            _range_kernel[(2,)](out, BLOCK=2)
    except Exception as error:  # what it raises differs from version to version
        return f"the interpreter of triton {triton.__version__} does not work here ({error})"
    assert out.tolist() == [0, 1, 2, 3]
    return None


@triton.jit
def _range_kernel(out_ptr, BLOCK: tl.constexpr):
    # a scalar in a loop bound is what triton 3.6 fails at with numpy 2.4
    for i in range(tl.program_id(0) * BLOCK, (tl.program_id(0) + 1) * BLOCK):
        tl.store(out_ptr + i, i)
