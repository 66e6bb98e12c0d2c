"""What ``comet simulate`` shows: predicted timelines and sweeps, every number marked as such."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from comet_compile.kernels.backward_cost import predict_backward
from comet_compile.kernels.cost_model import (
    H100,
    Load,
    Machine,
    Phase,
    overlap,
    predict,
    total_us,
)
from comet_compile.kernels.schedule import simulate
from comet_compile.kernels.unfused_cost import predict_unfused
from comet_compile.layer_sizes import LayerSizeError, Sizes
from comet_compile.schedule_files import check_names, kind_shares, write_schedule

__all__ = ["shown", "sweep_table", "timeline"]

_BAR = 30
PREDICTED: dict[str, Callable[[Load, Machine], list[Phase]]] = {
    "forward": predict,
    "backward": predict_backward,
}


def shown(
    sizes: Sizes,
    tokens: int,
    ranks: Sequence[int],
    links: Sequence[float],
    hots: Sequence[float],
    direction: str = "forward",
    traces: Sequence[Path] = (),
) -> None:
    """Print the timeline of the first combination and a line for each.

    The first is also played through CTA by CTA, if it is a forward between ranks; `traces` are
    given that, as by `write_schedule`.
    """
    check_names(traces)
    hidden, inter, experts, top_k = sizes
    for num in ranks:
        if num > experts:
            raise LayerSizeError(f"{num} ranks for {experts} experts; allowed: one each, at least")
    if top_k > experts:
        raise LayerSizeError(f"top-{top_k} of {experts} experts; allowed: 1 to {experts}")
    cases = [
        (Load(hidden, inter, experts, top_k, (tokens,) * num, hot), _machine(link))
        for num, link, hot in itertools.product(ranks, links, hots)
    ]
    console = Console()
    layer = f"{experts} experts of {hidden} x {inter}, top-{top_k}, {tokens} tokens a rank"
    console.print(f"predicted, not measured: {layer}, {direction}, {H100.name}", soft_wrap=True)
    load, machine = cases[0]
    phases_of = PREDICTED[direction]
    console.print(timeline(load, phases_of(load, machine)))
    if direction == "forward" and load.ranks > 1:
        schedule = simulate(load, machine)
        console.print(f"played through: {schedule.total_us:.0f} us; of the CTAs' time of rank 0,")
        console.print(f"  {kind_shares(schedule, 0)}")
        for path in traces:
            write_schedule(schedule, path, f"{layer}, {_ranks(load)}", "simulated")
            console.print(f"wrote {path}", soft_wrap=True)
    elif traces:
        raise LayerSizeError("--trace shows a forward between ranks; give --ranks 2 or more first")
    console.print(sweep_table(cases, direction))
    uneven = [str(num) for num in ranks if experts % num]
    if uneven:
        console.print(f"{', '.join(uneven)} GPUs: as if experts could be shared evenly")


def _machine(link: float) -> Machine:
    return H100 if link == 1.0 else H100.with_link(link)


def timeline(load: Load, phases: Sequence[Phase]) -> Table:
    """Return a line per phase: when it runs on the busiest rank, and what bounds it.

    "links": microseconds for which they are busy meanwhile.
    """
    table = Table(title=f"timeline, {_ranks(load)}", title_justify="left")
    for name in ("phase", "us", "bound by", "links", "when"):
        table.add_column(name, justify="right" if name in ("us", "links") else "left", no_wrap=True)
    total, begin = total_us(phases), 0.0
    for phase in phases:
        first = round(_BAR * begin / total)
        length = max(1, round(_BAR * phase.us / total))
        moving = f"{phase.transfer_us:.0f}" if phase.transfer_us else ""
        table.add_row(
            phase.name,
            f"{phase.us:.0f}",
            phase.bound,
            moving,
            " " * first + "\N{FULL BLOCK}" * length,
        )
        begin += phase.us
    return table


def sweep_table(cases: Sequence[tuple[Load, Machine]], direction: str = "forward") -> Table:
    """Return a line per case: time, teraflops of a GPU, and which part of transfers is hidden.

    "unfused": microseconds of the same forward as frameworks write it, under Inductor and NCCL.
    """
    table = Table(title="sweep", title_justify="left")
    for name in ("GPUs", "GB/s", "hot", "us", "TF", "hidden", "unfused", "longest"):
        table.add_column(name, justify="left" if name == "longest" else "right", no_wrap=True)
    for load, machine in cases:
        phases = PREDICTED[direction](load, machine)
        total, moving = total_us(phases), sum(phase.transfer_us for phase in phases)
        flops = load.flops * (2 if direction == "backward" else 1)
        longest = max(phases, key=lambda phase: phase.us)
        fastest = max(rate for _, rate in machine.pull_gb)
        table.add_row(
            str(load.ranks), f"{fastest:.0f}", f"{load.hot:g}", f"{total:.0f}",
            f"{flops / load.ranks / total / 1e6:.0f}",
            f"{100 * overlap(phases):.0f} %" if moving else "-",
            "-" if direction == "backward" else f"{total_us(predict_unfused(load, machine)):.0f}",
            f"{longest.name} ({longest.bound})",
        )  # fmt: skip
    return table


def _ranks(load: Load) -> str:
    return "one GPU" if load.ranks == 1 else f"{load.ranks} GPUs"
