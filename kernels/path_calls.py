"""What the paths of a layer share: replaying, devices, decisions kept, gradients added to others.

The modules that load Triton are imported when first asked for; an `import` in a function would look
them up at every call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from comet_compile.kernels.experts import ExpertParams, Matrices
from comet_compile.kernels.portable import Routed

_MAX_KNOWN = 4096


def remember(kept: dict[Any, Any], key: Any, value: Any) -> Any:
    """Keep a decision by all that it depends on, and return it.

    Taking one again would cost more than a small GEMM.
    """
    if len(kept) >= _MAX_KNOWN:
        kept.clear()
    kept[key] = value
    return value


def tensors_of(record: Routed | ExpertParams) -> tuple[Tensor | None, ...]:
    """Return the tensors of a record, in order."""
    return tuple(record.__dict__.values())


def replay(*args: Any) -> Any:
    """`recording.replay`."""
    return _recording().replay(*args)


def runs_kernels(device: torch.device) -> bool:
    """Whether the kernels run on such devices."""
    return device.type == "cuda"


def read_later(values: Tensor) -> Callable[[], list[int]]:
    """Begin to bring values to the host; what is returned waits for them.

    It does not wait for what is launched after this.
    """
    if values.device.type != "cuda":
        found: list[int] = values.tolist()
        return lambda: found
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[int]:
        arrived.synchronize()
        return list(map(int, host))

    return wait


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being made of what runs here."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` the current one: Triton launches there, wherever the tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"comet_compile.kernels.{name}")


fused = functools.partial(_module, "fused")
fused_backward = functools.partial(_module, "fused_backward")
fused_exchange = functools.partial(_module, "fused_exchange")
fused_replicated = functools.partial(_module, "fused_replicated")
links = functools.partial(_module, "links")
workspaces = functools.partial(_module, "workspace")
_recording = functools.partial(_module, "recording")


def matrices_of(into: Matrices | None) -> tuple[Tensor | None, ...]:
    """Return (w_in, w_up, w_out) of `into`."""
    return (None, None, None) if into is None else (into.w_in, into.w_up, into.w_out)


def with_matrices(
    grads: tuple[Tensor | None, ...], matrices: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Return a backward's gradients with these for those of (w_in, w_up, w_out)."""
    return (*grads[:2], *matrices, *grads[5:])


def add_up(grads: tuple[Tensor | None, ...], into: Matrices | None) -> tuple[Tensor | None, ...]:
    """Return the gradients, those of matrices added to `into` if given."""
    if into is None:
        return grads
    for total, grad in zip(matrices_of(into), grads[2:5], strict=True):
        if total is not None and grad is not None:
            total.add_(grad)
    return with_matrices(grads, matrices_of(into))
