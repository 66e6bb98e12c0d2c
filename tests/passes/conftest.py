"""Fixtures of the pass tests."""

from __future__ import annotations

from collections.abc import Iterator

import joint_graphs
import pytest
import torch


@pytest.fixture(scope="module")
def fake_group() -> Iterator[None]:
    """A world of two ranks that is never communicated with."""
    with joint_graphs.fake_group():
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
