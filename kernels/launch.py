"""Launch a kernel through Triton, and the small arithmetic of doing so."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from comet_compile.kernels.launch_log import note_launch

__all__ = [
    "OutOfResources",
    "descriptor",
    "div_up",
    "full_grid",
    "launch",
    "launch_together",
    "power_of_2",
]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch ``kernel[grid](*args, **options)``; `options` hold all its constants by name."""
    compiled = kernel[grid](*args, **options)
    note_launch(compiled, grid, args)


def launch_together(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel whose CTAs wait for each other, which all must be on the device at once.

    A CTA of it fits on a multiprocessor, else the driver refuses the launch. So as many CTAs as
    there are multiprocessors find room, once what ran before has ended; RuntimeError for more.
    """
    room = _num_multiprocessors(torch.cuda.current_device()) if torch.cuda.is_available() else None
    if room is not None and math.prod(grid) > room:
        raise RuntimeError(
            f"{kernel} has {math.prod(grid)} CTAs that wait for each other, "
            f"and only {room} are sure to run at once"
        )
    launch(kernel, grid, *args, **options)


@functools.cache
def _num_multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


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
    """Return a descriptor of boxes over the memory that begins where `base` does."""
    return TensorDescriptor(base, list(shape), list(strides), list(box))
