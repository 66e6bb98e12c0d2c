"""From a workload to rows of numbers, one per baseline."""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import Any

import torch
import torch.distributed as dist
from moe_bench.shapes import Case
from moe_bench.timing import Clock, Times, capture, interleave, peak_memory
from moe_bench.workload import Candidate, Workload, make_candidate, recorded

MAX_MESSAGE = 500


def measure(
    workload: Workload, baselines: list[str], clock: Clock, repeats: int, *, graphs: bool
) -> list[dict[str, Any]]:
    """Return a row per baseline; a baseline that fails has the error in its row."""
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Candidate] = {}
    for baseline in (b for b in baselines if workload.supports(b)):
        row = rows[baseline] = _empty_row(workload.case, workload.mode, baseline, workload.flops)
        candidate = _first_run(workload, baseline, ready, row, clock)
        if candidate is not None:
            ready[baseline] = candidate
        _release(clock.device)

    calls = {name: (candidate.before, candidate.run) for name, candidate in ready.items()}
    for name, times in interleave(clock, calls, repeats).items():
        rows[name]["call_ms"] = dataclasses.asdict(times)
        rows[name]["tf"] = _teraflops(workload, times)
    if graphs and clock.device.type == "cuda" and not workload.train:
        _time_graphs(workload, ready, rows, clock, repeats)
    for candidate in ready.values():
        candidate.before()
    return list(rows.values())


def add_backward(rows: list[dict[str, Any]]) -> None:
    """Give each row of a training step its backward's time and TF, from the forward's row.

    Backward: the step's time less the forward's of the same baseline, ``12*T*A*H*I`` FLOPs.
    """
    forward = {
        (r["case"], r["baseline"]): r["call_ms"]["median"]
        for r in rows
        if r["mode"] == "forward" and r["call_ms"]
    }
    for row in rows:
        start = forward.get((row["case"], row["baseline"]))
        if row["mode"] != "train" or not row["call_ms"] or start is None:
            continue
        backward = row["call_ms"]["median"] - start
        row["backward_ms"] = backward
        if row["forward_flops"] and backward > 0:
            row["backward_tf"] = 2 * row["forward_flops"] / backward / 1e9


def failed_row(case: Case, error: BaseException) -> dict[str, Any]:
    """Return the row of a case that could not even be built."""
    return {**_empty_row(case, "any", "any", 0.0), "failed": _message(error)}


def _empty_row(case: Case, mode: str, baseline: str, flops: float) -> dict[str, Any]:
    return {
        "suite": case.suite,
        "case": case.name,
        "shape": dataclasses.asdict(case.shape),
        "tokens": case.tokens,
        "layers": case.num_layers,
        "skew": case.skew or "even",
        "mode": mode,
        "baseline": baseline,
        "forward_flops": flops,
        "call_ms": None,
        "graph_ms": None,
        "tf": None,
        "graph_tf": None,
        "backward_ms": None,
        "backward_tf": None,
        "first_run_s": None,
        "peak_mib": None,
        "peak_extra_mib": None,
        "errors": {},
        "regions": [],
        "path": None,
        "failed": None,
        "graph_failed": None,
    }


def _first_run(
    workload: Workload,
    baseline: str,
    ready: dict[str, Candidate],
    row: dict[str, Any],
    clock: Clock,
) -> Candidate | None:
    """Compile and run once, and note errors and peak memory; None if that failed anywhere."""
    failure = None
    candidate = None
    start = time.perf_counter()
    try:
        candidate = make_candidate(baseline, workload, ready)
        candidate.before()
        if baseline == "comet-portable" and "comet" in ready:
            out = candidate.run()
        else:
            with recorded(candidate):
                out = candidate.run()
        clock.synchronize()
        row["first_run_s"] = time.perf_counter() - start
        row["regions"] = candidate.regions
        if workload.has_reference(baseline):
            row["errors"] = workload.errors(out)
        del out
        peaks = peak_memory(clock.device, candidate.before, candidate.run)
        if peaks is not None:
            row["peak_mib"], row["peak_extra_mib"] = peaks
        candidate.before()
        if baseline.startswith("comet"):
            row["path"] = workload.path(candidate)
    except Exception as error:  # a row that fails is a result
        failure = _message(error)
        if candidate is not None:
            candidate.before()
    failure = _anywhere(failure, clock)
    row["failed"] = failure
    return None if failure else candidate


def _time_graphs(
    workload: Workload,
    ready: dict[str, Candidate],
    rows: dict[str, dict[str, Any]],
    clock: Clock,
    repeats: int,
) -> None:
    """Capture each candidate in a CUDA graph and time the replays."""
    replays: dict[str, Any] = {}
    for name, candidate in ready.items():
        reason = workload.why_no_graph(candidate)
        if reason is not None:
            rows[name]["graph_failed"] = reason
            continue
        try:
            replays[name] = capture(candidate.before, candidate.run)
        except Exception as error:  # what cannot be captured says so in its row
            rows[name]["graph_failed"] = _message(error)
            clock.synchronize()
    calls = {name: (lambda: None, graph.replay) for name, graph in replays.items()}
    for name, times in interleave(clock, calls, repeats).items():
        rows[name]["graph_ms"] = dataclasses.asdict(times)
        rows[name]["graph_tf"] = _teraflops(workload, times)


def _teraflops(workload: Workload, times: Times) -> float | None:
    if workload.train or not workload.flops:
        return None
    return workload.flops / times.median / 1e9


def _anywhere(failure: str | None, clock: Clock) -> str | None:
    """Return this rank's failure or another's, so that all ranks go on with the same rows."""
    if clock.group is None:
        return failure
    failures: list[str | None] = [None] * dist.get_world_size(clock.group)
    dist.all_gather_object(failures, failure, group=clock.group)
    named = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]
    return named[0] if named else None


def _message(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:MAX_MESSAGE]


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
