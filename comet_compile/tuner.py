"""``comet tune``: measure plans for the layers of a model on this machine, and keep what is faster.

Each shape and direction is one search (`tuning_search`); what it found is written as soon as it
ends, or is interrupted. A later run goes on with what an earlier one has not finished. Under
torchrun all ranks search together: every decision is made from the slowest rank's time, and rank 0
writes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from comet_compile import tuning_file
from comet_compile.errors import CometError
from comet_compile.kernels import tuned
from comet_compile.kernels.plan import Device, read_device
from comet_compile.kernels.tuned import Shape
from comet_compile.tuning_layer import LayerSize, make_layer, measure
from comet_compile.tuning_search import Search

__all__ = [
    "DIRECTIONS",
    "Job",
    "Progress",
    "TuningError",
    "jobs_for",
    "join_ranks",
    "this_device",
    "tune",
]

DIRECTIONS = ("forward", "backward")


class TuningError(CometError, RuntimeError):
    """Nothing can be tuned: no GPU, sizes that make no layer, or other ranks than asked for."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One layer in one direction."""

    size: LayerSize
    ranks: int
    direction: str

    @property
    def shape(self) -> Shape:
        """What the table calls it."""
        size = self.size
        return Shape(
            ranks=self.ranks,
            tokens=tuned.bucket(size.tokens),
            top_k=size.top_k,
            experts=size.experts,
            hidden=size.hidden,
            inter=size.inter,
            gated=size.gated,
            interleaved=False,
            itemsize=2,
        )


def jobs_for(
    sizes: Sequence[tuple[int, int, int, int]],
    tokens: Sequence[int],
    ranks: int,
    directions: Sequence[str],
    *,
    gated: bool,
) -> list[Job]:
    """Return a job per layer, number of tokens a rank, and direction, each once."""
    jobs: dict[tuple[Shape, str], Job] = {}
    for hidden, inter, experts, top_k in sizes:
        if hidden % 8 or inter % 8 or min(hidden, inter) < 8:
            raise TuningError(f"sizes {hidden} and {inter}; allowed: multiples of 8")
        if experts % ranks or experts < ranks:
            raise TuningError(f"{ranks} ranks cannot share {experts} experts evenly")
        if not 1 <= top_k <= experts:
            raise TuningError(f"top-{top_k} of {experts} experts; allowed: 1 to {experts}")
        for num in tokens:
            size = LayerSize(hidden, inter, experts // ranks, top_k, num, gated)
            for direction in directions:
                job = Job(size, ranks, direction)
                jobs.setdefault((job.shape, direction), job)
    return list(jobs.values())


def join_ranks(ranks: int, command: str = "tune") -> Any:
    """Return the group of `ranks` processes that torchrun started, None for one."""
    if not torch.cuda.is_available():
        raise TuningError(f"comet {command} measures on an NVIDIA GPU, and this machine shows none")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != ranks:
        raise TuningError(
            f"--ep {ranks} needs as many processes, and there is {started}; start them by\n"
            f"  torchrun --nproc-per-node {ranks} --no-python comet {command} --ep {ranks} ..."
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ranks == 1:
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", device_id=device)
    return dist.group.WORLD


@dataclasses.dataclass
class Progress:
    """What `tune` tells while it goes on; the command line shows it as a bar."""

    start: Callable[[int, int, Job], None] = lambda number, of, job: None
    step: Callable[[int, int], None] = lambda done, of: None
    say: Callable[[str], None] = print


def tune(
    jobs: Sequence[Job],
    group: Any,
    path: Path,
    device: Device,
    *,
    again: bool = False,
    progress: Progress | None = None,
    make_search: Callable[[Job, Any, Device], Search] | None = None,
) -> list[Search]:
    """Search every job and write what was found to `path`; return the searches.

    `make_search`: how to measure; by default a layer of random weights is run on `device`.

    Jobs that the file has finished are passed over, unless `again`; those it has begun go on from
    what they had. KeyboardInterrupt is raised again, once what was found so far is written.
    """
    progress = progress or Progress()
    make = make_search or _make_search
    is_writer = group is None or group.rank() == 0
    known = _known(path, device, group)
    done = []
    for number, job in enumerate(jobs, 1):
        before = None if again else known.get((job.direction, job.shape))
        if before is not None and before["complete"]:
            continue
        progress.start(number, len(jobs), job)
        search = make(job, group, device)
        if before is not None:
            search.best = tuned.changes_of(before)
        complete = False
        try:
            search.run(progress.step)
            complete = True
        finally:
            if is_writer and (complete or search.num_tried):
                entry = tuning_file.entry_of(search, complete=complete)
                tuning_file.add_entry(path, device, entry, progress.say)
        done.append(search)
    return done


def _make_search(job: Job, group: Any, device: Device) -> Search:
    torch.cuda.empty_cache()
    layer = make_layer(job.size, group, backward=job.direction == "backward")
    return Search(job.shape, job.direction, layer.plan, device, lambda plans: measure(layer, plans))


def this_device() -> Device:
    """The current CUDA device."""
    return read_device(torch.cuda.current_device())


def _known(path: Path, device: Device, group: Any) -> dict[tuple[str, Shape], dict[str, Any]]:
    """Return the entries of the file; of several ranks, what rank 0 reads there."""
    read = [tuning_file.entries_in(path, device)]
    if group is not None:
        dist.broadcast_object_list(read, src=0, group=group)
    return {(entry["direction"], Shape(**entry["shape"])): entry for entry in read[0]}
