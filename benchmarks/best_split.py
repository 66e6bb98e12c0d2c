"""Hold the split that a plan has against every other one: the exhaustive search between ranks.

    torchrun --nproc-per-node 2 benchmarks/best_split.py --out benchmarks/results/best_split.json

A split is how many CTAs of layer0 fetch, how many of layer1 send beside the tiles, and how many own
tiles lead while tokens come. All combinations of a grid take turns on the same layer; microseconds
are medians of the device's time, of the slowest rank (`comet_compile.tuning_layer.time_us`). The
planned split and the best of the grid are then timed again, in turns and more often: the fastest of
a hundred noisy medians is fast by luck as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_layer import load_package

from comet_compile.tuning_layer import LayerSize, make_layer, measure

load_package()
from moe_bench.runner import git_commit, versions  # type: ignore[import-not-found]  # noqa: E402
from moe_bench.shapes import SHAPES  # type: ignore[import-not-found]  # noqa: E402

FETCHERS = (4, 8, 12, 16, 20, 24, 32, 48, 64)
SENDERS = (0, 4, 8, 16)
LEADS = (0.0, 0.15, 0.3, 0.5)
CASES = (
    ("qwen3-30b-a3b", 8192),
    ("olmoe", 8192),
    ("mixtral-8x7b", 8192),
    ("deepseek-v3", 8192),
    ("phi-3.5-moe", 8192),
    ("qwen2-moe-a2.7b", 8192),
    ("qwen3-30b-a3b", 4096),
    ("qwen3-30b-a3b", 1024),
    ("olmoe", 1024),
    ("mixtral-8x7b", 1024),
)


def splits(plan: Any) -> Iterator[Any]:
    """Yield the plan with every split of the grid, the planned one's lead among the leads."""
    leads = sorted({*LEADS, plan.lead[0]})
    for fetchers, senders, lead in itertools.product(FETCHERS, SENDERS, leads):
        yield dataclasses.replace(
            plan, num_fetchers=fetchers, num_senders=senders, lead=(lead, plan.lead[1])
        )


def search(name: str, tokens: int, group: Any, repeats: int) -> dict[str, Any]:
    """Return the row of one layer."""
    shape = SHAPES[name]
    size = LayerSize(
        shape.hidden, shape.inter, shape.num_experts // group.size(), shape.top_k, tokens
    )
    layer = make_layer(size, group, backward=False)
    plans = [one for one in splits(layer.plan) if one != layer.plan]
    times = measure(layer, plans, repeats)
    best = plans[min(range(len(plans)), key=times.__getitem__)]
    planned_us, best_us = measure(layer, [layer.plan, best], 5 * repeats)
    return {
        "shape": name,
        "tokens": tokens,
        "source": layer.plan.gemms.source,
        "planned": split_of(layer.plan),
        "planned_us": round(planned_us, 1),
        "best": split_of(best),
        "best_us": round(best_us, 1),
        "tried": len(plans),
        "grid": [
            [*split_of(one).values(), round(us, 1)] for one, us in zip(plans, times, strict=True)
        ],
    }


def split_of(plan: Any) -> dict[str, Any]:
    """Return the fields of a plan that are its split."""
    return {
        "num_fetchers": plan.num_fetchers,
        "num_senders": plan.num_senders,
        "lead": round(plan.lead[0], 3),
    }


def main() -> int:
    """Search every layer and print what was found; with --out, write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[], metavar="SHAPE/TOKENS")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="the commit measured, where there is no git to ask")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    document: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["torchrun", "--nproc-per-node", "2", *sys.argv]),
        "commit": args.commit or git_commit(),
        "device": f"{torch.cuda.get_device_name()} x {dist.get_world_size()}",
        "versions": versions(cuda=True),
        "rows": [],
    }
    for name, tokens in CASES:
        if args.only and f"{name}/{tokens}" not in args.only:
            continue
        row = search(name, tokens, dist.group.WORLD, args.repeats)
        document["rows"].append(row)
        if dist.get_rank() == 0:
            shown = {key: value for key, value in row.items() if key != "grid"}
            print(json.dumps(shown), flush=True)
            if args.out is not None:  # after every layer: a run that is cut keeps what it has
                args.out.write_text(json.dumps(document) + "\n")
        torch.cuda.empty_cache()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
