"""Fixtures and the `slow` marker of the pass tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import joint_graphs
import pytest
import torch

SLOW = "COMET_SLOW_TESTS"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"slow: minutes of CPU time; runs where {SLOW} is set")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(SLOW):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason=f"takes minutes; set {SLOW}=1"))


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
