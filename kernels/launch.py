"""Launch a kernel again without asking Triton what it is.

Triton looks at every argument of every launch to find the compiled kernel that fits: 50 us for a
kernel with 40 arguments, more than a decode step's GEMMs take. A caller that knows two launches to
be alike (same dtypes, sizes, strides and alignments; only addresses differ) says so with an equal
`key`, and the second launch goes straight to the kernel that the first one found.

`paths` numbers such calls. Descriptors are kept by address for the same reason.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

_MAX_KEPT = 4096

# Mutable globals because the kernels that they speed up are process-wide as well.
_kernels: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}
_descriptors: collections.OrderedDict[Hashable, TensorDescriptor] = collections.OrderedDict()


def launch(
    kernel: Any, grid: tuple[int, ...], key: Hashable | None, *args: Any, **options: Any
) -> None:
    """Launch ``kernel[grid](*args, **options)``; `options` hold all its constants by name.

    With a `key` that was seen before for this kernel, `args` are taken to differ in addresses only.
    """
    place = None if key is None else (id(kernel), key)
    known = _kernels.get(place)
    if known is not None and not _is_watched():
        compiled, constants = known
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *args, *constants,
        )  # fmt: skip
        return
    compiled = kernel[grid](*args, **options)
    # Nothing is loaded in Triton's interpreter, or when kernels are compiled for another device.
    if place is not None and getattr(compiled, "module", None) is not None:
        if len(_kernels) >= _MAX_KEPT:
            _kernels.clear()
        names = kernel.arg_names[len(args) :]
        _kernels[place] = compiled, tuple(options[name] for name in names)


def _is_watched() -> bool:
    """Whether a profiler asked Triton to be told of launches."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def div_up(a: int, b: int) -> int:
    """Return a / b, rounded up. (`triton.cdiv` takes ten times as long on the host.)"""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def full_grid(*extents: int) -> tuple[int, int, int]:
    """Return a grid of three extents, which a compiled kernel asks for."""
    return (*extents, 1, 1)[:3]  # type: ignore[return-value]


def descriptor(
    base: Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> TensorDescriptor:
    """Return a descriptor of boxes over `base`, an equal one if it was made before.

    What is kept holds an address, not the tensor: equal address, sizes and strides mean an equal
    descriptor, whoever owns the memory now.
    """
    if base.device.type != "cuda":
        return TensorDescriptor(base, list(shape), list(strides), list(box))
    key = (base.data_ptr(), base.dtype, tuple(shape), tuple(strides), tuple(box))
    known = _descriptors.get(key)
    if known is None:
        known = TensorDescriptor(_Address(base), list(shape), list(strides), list(box))
        _descriptors[key] = known
        if len(_descriptors) > _MAX_KEPT:
            _descriptors.popitem(last=False)
    return known


class _Address:
    """What a descriptor asks of its base, without keeping a tensor alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.device, self._address = tensor.dtype, tensor.device, tensor.data_ptr()

    def data_ptr(self) -> int:
        """The address."""
        return self._address

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize
