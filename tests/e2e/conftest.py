"""Processes that the tests share.

They last a session, since imports and the first compilation take a rank five seconds. No test
leaves behind in them what another could see: each compiles freshly, and none destroys a group.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distributed.gloo import RankPool

TIMEOUT = 240.0  # seconds, for machines whose cores are shared


@pytest.fixture(scope="session")
def pair() -> Iterator[RankPool]:
    """Two ranks that take longer to start than most of what they are given takes to run."""
    with RankPool(2, timeout=TIMEOUT) as pool:
        yield pool


@pytest.fixture(scope="module")
def gpu_pair() -> Iterator[RankPool]:
    """Two ranks with a GPU each."""
    with RankPool(2, timeout=TIMEOUT, backend="nccl") as pool:
        yield pool


@pytest.fixture(scope="session")
def alone() -> Iterator[RankPool]:
    """One rank, which is a group too."""
    with RankPool(1, timeout=TIMEOUT) as pool:
        yield pool
