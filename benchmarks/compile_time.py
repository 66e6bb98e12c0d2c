"""What backend="comet" adds to compile time, next to backend="inductor".

    python benchmarks/compile_time.py --out compile_time.json

Two models are compiled for training (forward and backward) with empty caches, the two backends in
turn: a dense transformer, in which there is nothing to find, and a small Qwen3-MoE. Printed per
model: the median seconds of each backend, the median of the pairs' ratios, the same in processor
seconds (compilers started by Inductor included), which other load on the machine disturbs less,
with the least and the largest of them, and the seconds that comet's pass itself took. The first
pair is a warm-up and is not counted. No report is open: its texts and pictures are made for a
reader, and cost more than the pass does where there is nothing to find.

Seconds of a compilation scatter by more than the pass takes. So one more compilation each counts
the calls of Python functions, which other load on the machine does not disturb at all.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import dataclasses
import datetime
import json
import os
import platform
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

import comet_compile
from comet_compile.passes import MoePass

VOCABULARY, HIDDEN, NUM_TOKENS = 128, 64, 64


class DenseBlock(nn.Module):
    """A pre-norm transformer block without routing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 8 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).view(*x.shape[:2], 3, 4, -1).transpose(1, 3).unbind(2)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        gate, up = self.up(self.norm_2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def dense_model(num_layers: int) -> nn.Module:
    """Return a language model in which comet finds nothing."""
    blocks = [DenseBlock() for _ in range(num_layers)]
    head = nn.Linear(HIDDEN, VOCABULARY)
    return nn.Sequential(nn.Embedding(VOCABULARY, HIDDEN), *blocks, head).bfloat16()


def moe_model(num_layers: int) -> nn.Module:
    """Return a Qwen3-MoE of the same width and depth."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        moe_intermediate_size=HIDDEN // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        use_cache=False,
        eos_token_id=None,
    )
    return Qwen3MoeForCausalLM(config).bfloat16()


MODELS: dict[str, Callable[[int], nn.Module]] = {"dense": dense_model, "qwen3_moe": moe_model}


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What one cold training step cost."""

    seconds: float
    cpu_seconds: float
    pass_seconds: float
    regions: int


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


@contextlib.contextmanager
def timed_pass() -> Iterator[list[float]]:
    """Yield a list to which every run of comet's pass adds its seconds."""
    seconds: list[float] = []
    original = MoePass.__call__

    def timed(self: MoePass, graph: fx.Graph) -> None:
        start = time.perf_counter()
        original(self, graph)
        seconds.append(time.perf_counter() - start)

    MoePass.__call__ = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        MoePass.__call__ = original  # type: ignore[method-assign]


def compile_once(model: nn.Module, backend: str) -> Compilation:
    """Compile forward and backward with empty caches, and run them once."""
    torch._dynamo.reset()
    counters.clear()
    tokens = torch.arange(NUM_TOKENS).view(2, -1) % VOCABULARY
    with fresh_cache(), timed_pass() as in_pass:
        start, cpu_start = time.perf_counter(), cpu_seconds()
        result = torch.compile(model, backend=backend)(tokens)
        getattr(result, "logits", result).float().square().mean().backward()
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    return Compilation(seconds, cpu, sum(in_pass), counters["comet"]["regions_found"])


def count_calls(model: nn.Module, backend: str) -> int:
    """Return how many Python functions this process calls in one compilation."""
    profile = cProfile.Profile()
    profile.runcall(compile_once, model, backend)
    return pstats.Stats(profile).total_calls


def measure(model: nn.Module, repeats: int, *, once: bool) -> dict[str, Any]:
    """Compile with both backends in turn, `repeats` times, and summarise.

    `once`: neither a warm-up nor a count of calls, for models that take minutes.
    """
    pairs = []
    for pair in range(repeats + (not once)):
        # the order alternates, so that a machine that slows down favours neither
        order = ("inductor", "comet") if pair % 2 else ("comet", "inductor")
        pairs.append({backend: compile_once(model, backend) for backend in order})
    pairs = pairs[not once :]
    rows: dict[str, Any] = {"regions": pairs[0]["comet"].regions}
    for field in ("seconds", "cpu_seconds"):
        for backend in ("inductor", "comet"):
            rows[f"{backend}_{field}"] = [getattr(pair[backend], field) for pair in pairs]
        ratios = [getattr(p["comet"], field) / getattr(p["inductor"], field) for p in pairs]
        rows[f"ratios_of_{field}"] = ratios
        rows[f"median_ratio_of_{field}"] = statistics.median(ratios)
    for backend in ("inductor", "comet") if not once else ():
        rows[f"{backend}_python_calls"] = count_calls(model, backend)
    rows["pass_seconds"] = statistics.median(pair["comet"].pass_seconds for pair in pairs)
    return rows


def provenance() -> dict[str, str]:
    """Return what a reader needs to judge or repeat the numbers."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": "python benchmarks/compile_time.py " + " ".join(sys.argv[1:]),
        "commit": commit or "unknown",
        "comet_compile": comet_compile.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="pairs counted per model")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=int, default=4, help="of each model")
    parser.add_argument("--once", action="store_true", help="no warm-up, and count no calls")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    args = parser.parse_args()

    results = {}
    for name in args.models:
        torch.manual_seed(0)
        results[name] = measure(MODELS[name](args.layers), args.repeats, once=args.once)
    columns = (
        "model",
        "regions",
        "inductor",
        "comet",
        "ratio",
        "cpu ratio",
        "calls ratio",
        "in pass",
    )
    table = Table(*columns)
    for name, row in results.items():
        inductor, cpu = statistics.median(row["inductor_seconds"]), row["ratios_of_cpu_seconds"]
        table.add_row(
            name,
            str(row["regions"]),
            f"{inductor:.2f} s",
            f"{statistics.median(row['comet_seconds']):.2f} s",
            f"{row['median_ratio_of_seconds']:.3f}",
            f"{row['median_ratio_of_cpu_seconds']:.3f} ({min(cpu):.3f} to {max(cpu):.3f})",
            "-" if args.once else f"{row['comet_python_calls'] / row['inductor_python_calls']:.4f}",
            f"{row['pass_seconds']:.3f} s ({row['pass_seconds'] / inductor:.2%})",
        )
    Console(width=120).print(table)
    if args.out:
        args.out.write_text(json.dumps({**provenance(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
