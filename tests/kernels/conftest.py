"""What the kernel tests run under: poisoned memory, and Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty is NaN (integers: the largest), so what nobody wrote shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def interpreted(poisoned_memory: None) -> Iterator[None]:
    """Kernels run in Triton's interpreter on the CPU, on poisoned memory."""
    pytest.importorskip("triton", reason="triton is not installed")
    import triton_interpreter

    reason = triton_interpreter.why_not()
    if reason is not None:
        pytest.skip(reason)
    with triton_interpreter.interpreting():
        yield
