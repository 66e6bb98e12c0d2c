"""Run the cases in this process, which may be one rank of several; print and store the rows."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.distributed as dist
from rich.console import Console

import comet_compile
from moe_bench import measure, tables
from moe_bench.shapes import BASELINES, Case
from moe_bench.timing import Clock
from moe_bench.workload import Workload

SCHEMA = 1
GROUP_TIMEOUT = datetime.timedelta(minutes=2)


def work(args: argparse.Namespace, cases: list[Case], argv: list[str], distributed: bool) -> int:
    """Run the cases in this process (one rank of several if `distributed`)."""
    start = time.monotonic()
    device, group = set_up(args, distributed)
    rank = dist.get_rank(group) if distributed else 0
    document = provenance(args, device, argv, group)
    rows: list[dict[str, Any]] = document["rows"]
    clock = Clock(device, group)
    for number, case in enumerate(cases):
        if out_of_time(args.time_limit, start, clock):
            document["not_run"] = [skipped.name for skipped in cases[number:]]
            break
        began = time.monotonic()
        rows += run_case(args, case, device, clock)
        if rank == 0:
            seconds = time.monotonic() - began
            print(f"{case.name}: {seconds:.1f} s", file=sys.stderr, flush=True)
            document["seconds"] = round(time.monotonic() - start, 1)
            store(document, args.out)
    if rank == 0:
        store(document, args.out)
        width = 150 if not sys.stdout.isatty() else None
        tables.show(document, Console(width=width))
    if distributed:
        dist.destroy_process_group()
    return 0


def run_case(
    args: argparse.Namespace, case: Case, device: torch.device, clock: Clock
) -> list[dict[str, Any]]:
    """Return the rows of one case, all its modes; what cannot be built is a row that failed."""
    rows: list[dict[str, Any]] = []
    try:
        for workload in build(case, device, clock.group):
            if workload.mode in args.modes:
                torch._dynamo.reset()
                graphs = not args.no_graphs
                found = measure.measure(
                    workload, args.baselines, clock, args.repeats, graphs=graphs
                )
                rows += found
    except Exception as error:  # the other cases still run
        if clock.group is not None:
            raise
        traceback.print_exc()
        rows.append(measure.failed_row(case, error))
    measure.add_backward(rows)
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def build(case: Case, device: torch.device, group: Any) -> Iterable[Workload]:
    """Return the workloads of a case, one per mode."""
    # each suite imports what it needs: "local" runs without transformers
    builder: Callable[..., Iterable[Workload]]
    if case.suite == "local":
        from moe_bench.local import workloads as builder
    elif case.suite == "block":
        from moe_bench.hf import block_workloads as builder
    elif case.suite == "traps":
        from moe_bench.traps import workloads as builder
    elif case.suite == "model":
        from moe_bench.hf import model_workloads as builder
    elif case.suite == "ep":
        from moe_bench.ep import workloads

        return workloads(case, device, group)
    else:
        from moe_bench.hf import expert_parallel_workloads

        return expert_parallel_workloads(case, device, group)
    return builder(case, device)


def set_up(args: argparse.Namespace, distributed: bool) -> tuple[torch.device, Any]:
    """Return this process's device and, for several ranks, the group of all."""
    rank = int(os.environ.get("LOCAL_RANK", "0")) if distributed else 0
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    if args.tiny and device.type == "cpu":
        # nobody waits for a C++ compiler to try a script: Inductor's code then calls ATen
        torch._inductor.config.fallback_by_default = True
        torch._inductor.config.compile_threads = 1
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("no GPU found; --device cpu --tiny tries the script without one")
        torch.cuda.set_device(device)
    if not distributed:
        return device, None
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(backend, timeout=GROUP_TIMEOUT, **bound)
    return device, dist.group.WORLD


def out_of_time(limit: float | None, start: float, clock: Clock) -> bool:
    """Whether no further case may start; all ranks answer alike."""
    if limit is None:
        return False
    return clock.slowest([time.monotonic() - start])[0] > limit


def provenance(
    args: argparse.Namespace, device: torch.device, argv: list[str], group: Any
) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the numbers, and room for the rows."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.machine()
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", *argv]),
        "commit": args.commit or git_commit(),
        "suites": args.suite,
        "tiny": args.tiny,
        "device": {
            "type": device.type,
            "name": name,
            "ranks": 1 if group is None else dist.get_world_size(group),
            "visible": torch.cuda.device_count() if cuda else 0,
        },
        "versions": versions(cuda),
        "repeats": args.repeats,
        "baselines": {name: BASELINES[name] for name in args.baselines},
        "seconds": 0.0,
        "not_run": [],
        "rows": [],
    }


def versions(cuda: bool) -> dict[str, str]:
    """Return the versions of what took part."""
    found = {
        "comet_compile": comet_compile.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    if cuda:
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def git_commit() -> str:
    """Return the commit of this checkout, with "-dirty" for local changes, or "unknown"."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(git, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def store(document: dict[str, Any], path: Path | None) -> None:
    """Write the document, if it has a place."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
