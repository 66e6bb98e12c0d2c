"""Processes that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distributed.gloo import RankPool

TIMEOUT = 240.0  # seconds, for machines whose cores are shared


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    """Two ranks that take longer to start than most of what they are given takes to run."""
    with RankPool(2, timeout=TIMEOUT) as pool:
        yield pool


@pytest.fixture(scope="module")
def gpu_pair() -> Iterator[RankPool]:
    """Two ranks with a GPU each."""
    with RankPool(2, timeout=TIMEOUT, backend="nccl") as pool:
        yield pool


@pytest.fixture(scope="module")
def alone() -> Iterator[RankPool]:
    """One rank, which is a group too."""
    with RankPool(1, timeout=TIMEOUT) as pool:
        yield pool
