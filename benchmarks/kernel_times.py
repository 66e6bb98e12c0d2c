"""Time every kernel of a fused layer, as planned and with fields of the plan changed.

    python benchmarks/kernel_times.py --shapes deepseek-v3 --vary layer0.paced=False
    torchrun --nproc-per-node 2 benchmarks/kernel_times.py --vary num_senders=16 lead=0.2,0.4
    python benchmarks/kernel_times.py --backward --vary gathers=True

On one GPU the layer has a half of the shape's experts, which is what a rank of two has; under
torchrun the experts are shared out and tokens travel. Each `--vary` is a variant; its fields change
together. Times are medians of what the profiler says of each kernel, in microseconds; waiting for
a peer is in them. `total` is the median time of a call, of the slowest rank.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import datetime
import json
import os
import shlex
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_layer import load_package

from comet_compile.tuning_layer import LayerSize, TunedLayer, make_layer, slowest, time_us

load_package()
from moe_bench.runner import git_commit, versions  # type: ignore[import-not-found]  # noqa: E402
from moe_bench.shapes import SHAPES, Shape  # type: ignore[import-not-found]  # noqa: E402


def layer_of(shape: Shape, tokens: int, group: Any, *, backward: bool) -> TunedLayer:
    """Return a rank's part of a layer; one GPU alone has half of the experts, as one of two."""
    num_ranks = 1 if group is None else group.size()
    experts = shape.num_experts // max(2, num_ranks)
    size = LayerSize(shape.hidden, shape.inter, experts, shape.top_k, tokens)
    return make_layer(size, group, backward=backward)


def change(plan: Any, fields: list[str]) -> Any:
    """Return `plan` with ``name=value`` or ``layer0.name=value`` fields changed."""
    for field in fields:
        path, _, text = field.partition("=")
        plan = _replace(plan, path.split("."), ast.literal_eval(text))
    return plan


def _replace(plan: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    if rest:
        value = _replace(getattr(plan, name), rest, value)
    return dataclasses.replace(plan, **{name: value})


def kernel_times(layer: TunedLayer, plan: Any, repeats: int) -> dict[str, float]:
    """Return the median microseconds of each kernel, and of a call."""
    for _ in range(3):
        layer.run(plan)
    calls = []
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            calls.append(time_us(layer, plan))
    times = defaultdict(list)
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        if event.name.endswith("_kernel"):
            times[event.name.removesuffix("_kernel")].append(event.device_time)
    # of a kernel that a call launches more than once, each launch by its place in the call
    found = {}
    for name, values in times.items():
        launches = max(1, len(values) // repeats)
        for place in range(launches):
            suffix = f"#{place + 1}" if launches > 1 else ""
            found[name + suffix] = round(statistics.median(values[place::launches]), 1)
    return {**found, "total": round(slowest(statistics.median(calls)), 1)}


def main() -> int:
    """Time the variants and print them; with --out, write them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3-30b-a3b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192], help="per rank")
    parser.add_argument("--vary", nargs="+", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--backward", action="store_true", help="all gradients of one layer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="the commit measured, where there is no git to ask")
    args = parser.parse_args()

    group, rank = None, int(os.environ.get("RANK", "0"))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
        group = dist.group.WORLD
    rows = []
    for name in args.shapes:
        for tokens in args.tokens:
            layer = layer_of(SHAPES[name], tokens, group, backward=args.backward)
            for fields in [[], *args.vary]:
                times = kernel_times(layer, change(layer.plan, fields), args.repeats)
                rows.append({"shape": name, "tokens": tokens, "changed": fields, "us": times})
                if rank == 0:
                    print(name, tokens, *(fields or ["as planned"]), json.dumps(times), flush=True)
            del layer
            torch.cuda.empty_cache()
    if args.out is not None and rank == 0:
        document = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "command": shlex.join(["python", *sys.argv]),
            "commit": args.commit or git_commit(),
            "device": torch.cuda.get_device_name(),
            "ranks": 1 if group is None else group.size(),
            "versions": versions(True),
            "rows": rows,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    if group is not None:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
