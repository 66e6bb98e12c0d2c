"""Time replicated layers whose all-reduce layer1 makes, beside the same with NCCL's after it.

    torchrun --nproc-per-node 2 benchmarks/all_reduce.py --out benchmarks/results/all_reduce.json

Every rank has all tokens and a share of the experts. Both run as CUDA graphs, so what a launch
costs on the host is not in the times: medians of a replay, of the slowest rank.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_layer import load_package

load_package()
from comet_compile.kernels import fused_replicated, ops  # noqa: E402, F401, registers the ops
from moe_bench.runner import git_commit, versions  # type: ignore[import-not-found]  # noqa: E402
from moe_bench.shapes import SHAPES, Shape  # type: ignore[import-not-found]  # noqa: E402


def layer_of(shape: Shape, num_tokens: int) -> Any:
    """Return a call of this rank's part of the layer."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    experts = shape.num_experts // num_ranks
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device="cuda", generator=generator)

    def matrix(k: int, n: int) -> torch.Tensor:
        return (normal(experts, n, k) * k**-0.5).bfloat16().transpose(1, 2)

    w_in, w_out = matrix(shape.hidden, 2 * shape.inter), matrix(shape.inter, shape.hidden)
    x = normal(num_tokens, shape.hidden).bfloat16()
    weights, ids = normal(num_tokens, shape.num_experts).softmax(-1).topk(shape.top_k, -1)
    ids -= rank * experts

    def call() -> torch.Tensor:
        y, _, _ = torch.ops.comet.moe_layer(
            x,
            ids,
            weights,
            w_in,
            None,
            w_out,
            *[None] * 4,
            activation="silu_glu",
            weight_place="after",
            product_dtype=torch.float32,
            out_dtype=torch.bfloat16,
            form="replicated",
            group_name=dist.group.WORLD.group_name,
            save="nothing",
        )
        return y

    return call


def replay_us(call: Any, repeats: int) -> float:
    """Return the median microseconds of a replay."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        for _ in range(20):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 20 * 1e3)
    slowest = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return round(slowest.item(), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b-a3b", "mixtral-8x7b"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 16384])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--commit", default=git_commit())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    rows = []
    for name in args.shapes:
        for tokens in args.tokens:
            call, row = layer_of(SHAPES[name], tokens), {"shape": name, "tokens": tokens}
            for column, threshold in (("layer1_us", 0), ("nccl_us", 1 << 60)):
                fused_replicated._MIN_BYTES = threshold
                row[column] = replay_us(call, args.repeats)
            rows.append(row)
            if dist.get_rank() == 0:
                print(row, flush=True)
    if args.out is not None and dist.get_rank() == 0:
        document = {
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
            "command": "torchrun benchmarks/all_reduce.py " + shlex.join(sys.argv[1:]),
            "commit": args.commit,
            "device": f"{torch.cuda.get_device_name()} x {dist.get_world_size()}",
            "versions": versions(cuda=True),
            "rows": rows,
        }
        args.out.write_text(json.dumps(document, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
