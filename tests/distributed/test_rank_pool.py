"""Processes that tests share: kept while all goes well, and replaced after a failure."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist
from distributed.gloo import RankPool


def process_id(rank: int, num_ranks: int) -> int:
    return os.getpid()


def fail_on_rank_1(rank: int, num_ranks: int) -> None:
    if rank == 1:
        raise ValueError("as written")
    dist.barrier()  # which nobody else reaches


def test_a_failure_ends_the_processes_and_the_next_function_gets_others() -> None:
    with RankPool(2, timeout=120, forks=True) as pool:
        first = pool.run(process_id)
        assert pool.run(process_id) == first
        with pytest.raises(RuntimeError, match=r"fail_on_rank_1: rank 1 failed[\s\S]*as written"):
            pool.run(fail_on_rank_1)
        assert not set(pool.run(process_id)) & set(first)
