"""What the kernel tests run under: poisoned memory, and Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import poison
import pytest
import torch


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty is NaN."""
    with poison.poisoned_memory():
        yield


@pytest.fixture
def interpreted(poisoned_memory: None) -> Iterator[None]:
    """Kernels run in Triton's interpreter on the CPU, on poisoned memory."""
    pytest.importorskip("triton", reason="triton is not installed")
    import triton_interpreter

    reason = triton_interpreter.why_not()
    if reason is not None:
        pytest.skip(reason)
    torch.set_num_threads(1)
    with triton_interpreter.interpreting():
        yield
