"""``comet trace``: run a layer between ranks with stamping kernels, and show what every CTA did."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from comet_compile.errors import CometError
from comet_compile.kernels import trace
from comet_compile.kernels.schedule import Schedule, overlap_of
from comet_compile.kernels.workspace import workspace_for
from comet_compile.schedule_files import check_names, kind_shares, write_schedule
from comet_compile.tuning_layer import (
    DEADLINE,
    HEAD_START,
    LayerSize,
    TunedLayer,
    make_layer,
    median_us,
    time_us,
)

__all__ = ["TraceError", "Traced", "show", "trace_layer"]

CAPACITY = 4096
"""Stamps of a CTA that are kept."""


class TraceError(CometError, RuntimeError):
    """Nothing can be traced: one rank exchanges nothing."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """One call of all ranks."""

    schedule: Schedule
    num_lost: int
    """Stamps that found no room."""
    us: float
    """Median of calls with stamps; of several ranks the slowest counts."""
    us_without: float
    """The same of the kernels as they are otherwise."""


def trace_layer(size: LayerSize, group: Any) -> Traced:
    """Run the forward of a layer of random weights with and without stamps; all ranks call it."""
    if group is None or group.size() == 1:
        raise TraceError("comet trace shows how ranks exchange tokens: it needs two or more")
    layer = make_layer(size, group, backward=False)
    device = torch.device("cuda", torch.cuda.current_device())
    workspace = workspace_for(0, group, device)
    without = median_us(layer)
    num_ctas = layer.plan.gemms.layer0.num_programs
    workspace.trace = trace.new_trace(num_ctas, CAPACITY, device)
    try:
        us = median_us(layer)
        offsets = trace.clock_offsets(workspace, group, DEADLINE)
        _run_aligned(layer, workspace.trace, trace.new_trace(num_ctas, CAPACITY, device))
        traces = [torch.empty_like(workspace.trace) for _ in range(group.size())]
        dist.all_gather(traces, workspace.trace, group=group)
    finally:
        workspace.trace = None
    schedule, num_lost = trace.schedule_of([one.cpu() for one in traces], offsets)
    return Traced(schedule, num_lost, us, without)


def _run_aligned(layer: TunedLayer, stamps: Tensor, empty: Tensor) -> None:
    """Run a call that all ranks begin together, and keep only its stamps.

    Hosts are some hundred microseconds apart when they launch; so the call follows another one,
    which no rank leaves before all have sent.
    """

    def run_twice(plan: Any) -> tuple[Tensor | None, ...]:
        # the host shall have launched both before the first begins: its pace is none of the trace
        torch.cuda._sleep(4 * HEAD_START)
        layer.run(plan)
        stamps.copy_(empty)
        return layer.run(plan)

    time_us(dataclasses.replace(layer, run=run_twice), layer.plan)


def show(size: LayerSize, group: Any, paths: Sequence[Path]) -> None:
    """Trace a layer; rank 0 prints what was found and writes it to `paths`."""
    check_names(paths)
    traced = trace_layer(size, group)
    if group.rank() != 0:
        return
    schedule, console = traced.schedule, Console()
    experts = size.experts * group.size()
    title = (
        f"{experts} experts of {size.hidden} x {size.inter}, top-{size.top_k}, "
        f"{size.tokens} tokens a rank, {group.size()} x {torch.cuda.get_device_name()}"
    )
    console.print(f"measured: {title}", soft_wrap=True)
    console.print(
        f"{schedule.total_us:.0f} us from the first stamp to the last; a call takes "
        f"{traced.us_without:.0f} us, with stamps {traced.us:.0f}",
        soft_wrap=True,
    )
    for rank in range(group.size()):
        hidden = overlap_of(schedule.spans, rank, schedule.num_ctas)
        console.print(
            f"rank {rank}: {100 * hidden:.0f} % of the communication is hidden; of its CTAs' time, "
            f"{kind_shares(schedule, rank)}",
            soft_wrap=True,
        )
    if traced.num_lost:
        console.print(f"{traced.num_lost} stamps found no room: lanes end early")
    for path in paths:
        write_schedule(schedule, path, title, "measured")
        console.print(f"wrote {path}", soft_wrap=True)
