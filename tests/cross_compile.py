"""Compile the kernels that a launcher launches for a GPU that is not there, and run none of them.

Triton asks its active driver for the target and launches on its device. Here the driver is a
stand-in that names a target, and every launch is turned into Triton's own "warm-up", which compiles
for the very arguments of the launch (their dtypes, divisibilities and constants) and stops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel's use of a multiprocessor, as the assembler reports it."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int


class _Driver:
    """What `JITFunction.run` asks of a driver before it launches."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # kernels are kept by device: one target must not be given those of another
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(
    capability: int, only: Collection[str] = (), but: Collection[str] = ()
) -> Iterator[list[Compiled]]:
    """Collect what is launched inside, compiled for compute capability 80, 90, 100 ...

    With `only`, no other kernels are compiled than those of these names; those in `but` never.
    """
    seen: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        name = self.fn.__name__
        if name in but or (only and name not in only):
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen.append(_resources(kernel))
        return kernel

    active = driver._active  # reset_active() would look for a GPU
    driver.set_active(_Driver(GPUTarget("cuda", capability, 32)))
    JITFunction.run = compile_only
    try:
        with tempfile.TemporaryDirectory() as cache, _environment("TRITON_CACHE_DIR", cache):
            yield seen
    finally:
        JITFunction.run = run
        driver._active = active


def _resources(kernel: Any) -> Compiled:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout

    def number(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", text)
        assert found is not None, text
        return int(found.group(1))

    return Compiled(
        name=kernel.metadata.name,
        registers=number("REG"),
        spilled_bytes=number("STACK") + number("LOCAL"),
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
    )


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
