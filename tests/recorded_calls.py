"""Calls that are replayed, and the kernels that they launch (`launch_stand_ins`)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from launch_stand_ins import Driver, Kernel, floats
from torch import Tensor

from comet_compile.kernels import recording
from comet_compile.kernels.launch import full_grid, launch
from comet_compile.kernels.recording import Results, replay

N = 8
GRID = full_grid(3)


def add_kernel(driver: Driver) -> Kernel:
    """out[i] = a[i] + b[i]; what is None counts as zeros."""

    def body(a: int, b: int, out: int, count: int) -> None:
        floats(out, count)[:] = [
            sum(floats(one, count)[i] for one in (a, b) if one) for i in range(count)
        ]

    types = {"a_ptr": "*fp32", "b_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32"}
    return Kernel(driver, types, body)


def copy_kernel(driver: Driver) -> Kernel:
    """out[i] = a[i]"""

    def body(a: int, out: int, count: int) -> None:
        floats(out, count)[:] = floats(a, count)[:]

    return Kernel(driver, {"a_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32"}, body)


def random(*shape: int) -> Tensor:
    return torch.randn(*(shape or (N,)))


@dataclasses.dataclass
class Call:
    """What is replayed, like an op below autograd; it counts how often it runs as written.

    Above, torch decomposes some functions before a recording can see them.
    """

    body: Callable[..., Results]
    key: Any = "key"
    constants: tuple[Tensor, ...] = ()
    above_autograd: bool = False
    num_calls: int = 0

    def __call__(self, *inputs: Tensor | None) -> Results:
        def as_written() -> Results:
            self.num_calls += 1
            return self.body(*inputs)

        below = torch._C._AutoDispatchBelowAutograd
        with contextlib.nullcontext() if self.above_autograd else below():
            return replay(self.key, inputs, as_written, self.constants)

    @property
    def is_replayed(self) -> bool:
        return recording._recordings.get(self.key) is not None


def chain(add: Kernel) -> Call:
    """(a + b) + b, through a buffer."""

    def body(a: Tensor, b: Tensor) -> Results:
        once, out = torch.empty_like(a), torch.empty_like(a)
        launch(add, GRID, a, b, once, N)
        launch(add, GRID, once, b, out, N)
        return (out,)

    return Call(body)
