"""The page of machines that nobody measured: what the cost model says of them."""

from __future__ import annotations

from typing import Any

from moe_layer import load_package

from comet_compile.kernels.cost_model import H100, Load, Machine, overlap, predict, total_us
from comet_compile.kernels.unfused_cost import predict_unfused

load_package()
from moe_bench.shapes import SHAPES  # type: ignore[import-not-found]  # noqa: E402

# An H800 is an H100 whose links are 400 GB/s instead of 900.
H800_LINK = 400 / 900
H800 = H100.with_link(H800_LINK)
MACHINES = (
    ("2 H100", H100, 2),
    ("8 H100", H100, 8),
    ("8 H800", H800, 8),
    ("72 GPUs like H100s in one NVLink domain", H100, 72),
)

HEAD = """\
# Simulated, not measured

Made by `python benchmarks/cost_model.py`; `comet simulate` gives the same for other sizes. Every
number on this page is predicted by the cost model, which was held against one and two H100s only
([how far off it is there](cost_model.md)): microseconds of a forward with all-to-all and even
routing, in brackets teraflops of one GPU and the part of the transfers' time that is hidden. An
H800 is taken for an H100 with links of 400 GB/s instead of 900, the larger domains for a switch
that gives each GPU its full links. A layer with fewer experts than GPUs has none.
"""

PAPER = """\
## The paper's machine

COMET ([arXiv 2502.19811](https://arxiv.org/abs/2502.19811)) was measured on 8 H800s with layers of
these three models. Here 8 GPUs share M tokens and the experts, as if these could always be shared
evenly; "unfused" is the same layer as frameworks write it, as launched: over NCCL, with the host's
reading of the splits, which counts most where M is small. The paper reports single layers 1.28 to
2.37 times as fast as its baselines across M, and 86.5 % of the communication hidden in one setting;
its baselines are other code, so the two ratios are not the same thing.
"""
PAPER_SHAPES = ("mixtral-8x7b", "qwen2-moe-a2.7b", "phi-3.5-moe")
PAPER_TOKENS = (4096, 8192, 16384, 32768)


def even_load(sizes: Any, tokens: int, ranks: int) -> Load:
    """Return a layer of these sizes with as many tokens on every rank."""
    return Load(sizes.hidden, sizes.inter, sizes.num_experts, sizes.top_k, (tokens,) * ranks)


def page() -> str:
    """Return the page as Markdown."""
    heads = " | ".join(name for name, _, _ in MACHINES)
    return "\n".join(
        (
            HEAD,
            f"| layer | tokens a rank | {heads} |",
            f"| --- | --- |{' --- |' * len(MACHINES)}",
            *(
                f"| {name} | {tokens} | {' | '.join(_cells(sizes, tokens))} |"
                for name, sizes in SHAPES.items()
                for tokens in (1024, 8192)
            ),
            "",
            PAPER,
            "| layer | M | us | unfused us | times as fast | hidden | longest phase |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(_paper_line(name, tokens) for name in PAPER_SHAPES for tokens in PAPER_TOKENS),
            "",
        )
    )


def _cells(sizes: Any, tokens: int) -> list[str]:
    return [
        _cell(even_load(sizes, tokens, ranks), machine) if ranks <= sizes.num_experts else "-"
        for _, machine, ranks in MACHINES
    ]


def _cell(load: Load, machine: Machine) -> str:
    phases = predict(load, machine)
    us = total_us(phases)
    teraflops = load.flops / load.ranks / us / 1e6
    return f"{us:.0f} ({teraflops:.0f}, {100 * overlap(phases):.0f} %)"


def _paper_line(name: str, tokens: int) -> str:
    load = even_load(SHAPES[name], tokens // 8, 8)
    phases = predict(load, H800)
    us, unfused_us = total_us(phases), total_us(predict_unfused(load, H800))
    longest = max(phases, key=lambda phase: phase.us)
    return (
        f"| {name} | {tokens} | {us:.0f} | {unfused_us:.0f} | {unfused_us / us:.2f} "
        f"| {100 * overlap(phases):.0f} % | {longest.name}: {longest.bound} |"
    )
