"""Clocks, interleaved runs, CUDA graphs and peak memory.

Every run starts on an idle device with a cold L2 cache: a buffer of twice its size is zeroed and
waited for. "call" times count the host's launches; "graph" times replay a CUDA graph, so they
count the device's work alone. Candidates take turns (A B C A B C ...): a clock that drifts hits
all alike.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Times:
    """Median and quartiles of repeated runs in milliseconds."""

    median: float
    q1: float
    q3: float
    runs: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        """Summarise `samples` (at least one)."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, len(samples))


class Clock:
    """Times calls on one device: CUDA events, or the wall clock on a CPU."""

    def __init__(self, device: torch.device, group: Any = None) -> None:
        self.device = device
        self.group = group
        self.flush: Tensor | None = None
        self.signal = torch.zeros(1, device=device)
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(max(size, 1), dtype=torch.int8, device=device)

    def time(self, call: Callable[[], Any]) -> float:
        """Return the milliseconds of one call that starts on an idle device, ranks together."""
        if self.flush is not None:
            self.flush.zero_()
        if self.group is not None:
            dist.all_reduce(self.signal, group=self.group)
        if self.flush is None:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        torch.cuda.synchronize(self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def slowest(self, samples: list[float]) -> list[float]:
        """Return, run by run, the time of the slowest rank."""
        if self.group is None:
            return samples
        times = torch.tensor(samples, dtype=torch.float64, device=self.device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX, group=self.group)
        return times.tolist()


def interleave(
    clock: Clock,
    calls: dict[str, tuple[Callable[[], None], Callable[[], Any]]],
    repeats: int,
    warm_up: int = 2,
) -> dict[str, Times]:
    """Run every (before, call) pair `repeats` times in turns, and summarise the calls."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, (before, call) in calls.items():
            before()
            elapsed = clock.time(call)
            if turn >= warm_up:
                samples[name].append(elapsed)
    return {name: Times.of(clock.slowest(times)) for name, times in samples.items()}


def capture(before: Callable[[], None], call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        before()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    before()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream()
    try:
        # other threads (NCCL's watchdog) may ask the driver something meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
    finally:
        # a capture that fails leaves its own stream current
        torch.cuda.set_stream(current)
    return graph


def peak_memory(
    device: torch.device, before: Callable[[], None], call: Callable[[], Any]
) -> tuple[float, float] | None:
    """Return the peak of allocated MiB during a call, in all and above what was there before."""
    if device.type != "cuda":
        return None
    before()
    torch.cuda.synchronize(device)
    start = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return peak / 2**20, (peak - start) / 2**20


def symmetric_memory(device: torch.device) -> float:
    """Return the MiB of symmetric workspaces, which torch's allocator does not count."""
    if device.type != "cuda":
        return 0.0
    from comet_compile.kernels import workspace

    kept = workspace._workspaces.values()
    return sum(one.num_bytes for every in kept for one in every) / 2**20
