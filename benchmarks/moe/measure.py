"""From a workload to rows of numbers, one per baseline."""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import Any

import torch
import torch.distributed as dist

from moe_bench.shapes import Case
from moe_bench.timing import Clock, Times, capture, interleave, peak_memory, symmetric_memory
from moe_bench.workload import Candidate, Workload, make_candidate, recorded

MAX_MESSAGE = 500
_PEAKS = ("peak_mib", "peak_extra_mib", "symmetric_mib")


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
        "symmetric_mib": None,
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
            row["symmetric_mib"] = symmetric_memory(clock.device)
    except Exception as error:  # a row that fails is a result
        failure = _message(error)
        if candidate is not None:
            candidate.before()
    _merge_ranks(row, failure, clock)
    return None if row["failed"] else candidate


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
        failure = None
        try:
            graph = capture(candidate.before, candidate.run)
        except Exception as error:  # what cannot be captured says so in its row
            failure = _message(error)
        failures = [text for text in _gather(failure, clock) if text]
        if failures:
            rows[name]["graph_failed"] = failures[0]
        else:
            replays[name] = graph
    calls = {name: (lambda: None, graph.replay) for name, graph in replays.items()}
    for name, times in interleave(clock, calls, repeats).items():
        rows[name]["graph_ms"] = dataclasses.asdict(times)
        rows[name]["graph_tf"] = _teraflops(workload, times)


def _teraflops(workload: Workload, times: Times) -> float | None:
    if workload.train or not workload.flops:
        return None
    return workload.flops / times.median / 1e9


def _merge_ranks(row: dict[str, Any], failure: str | None, clock: Clock) -> None:
    """Put the worst of all ranks into the row: any failure, the largest errors and peaks."""
    own = {"failed": failure, **{name: row[name] for name in ("errors", "regions", *_PEAKS)}}
    every = _gather(own, clock)
    failures = [f"rank {rank}: {one['failed']}" for rank, one in enumerate(every) if one["failed"]]
    row["failed"] = (failures[0] if clock.group is not None else failure) if failures else None
    for one in every:
        for name, value in one["errors"].items():
            row["errors"][name] = max(value, row["errors"].get(name, 0.0))
        for name in _PEAKS:
            if one[name] is not None:
                row[name] = max(one[name], row[name] or 0.0)
        if [r["status"] for r in one["regions"]] != [r["status"] for r in row["regions"]]:
            row["failed"] = row["failed"] or "the ranks disagree on how regions ended"


def _gather(value: Any, clock: Clock) -> list[Any]:
    """Return what every rank has."""
    if clock.group is None:
        return [value]
    every: list[Any] = [None] * dist.get_world_size(clock.group)
    dist.all_gather_object(every, value, group=clock.group)
    return every


def _message(error: BaseException) -> str:
    text = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:MAX_MESSAGE]


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
