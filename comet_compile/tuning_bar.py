"""What ``comet tune`` shows: a bar with the time left, then a table of what was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from comet_compile.kernels import tuned
from comet_compile.tuner import Job, Progress, this_device, tune
from comet_compile.tuning_search import Search

__all__ = ["found_table", "shown"]


def shown(jobs: Sequence[Job], group: Any, out: Path | None, *, again: bool) -> None:
    """Tune `jobs`, showing on rank 0 how it goes on, and print what was found."""
    device = this_device()
    path = out or tuned.cached_file(device)
    console = Console(quiet=group is not None and group.rank() != 0)
    with _bar(console) as progress:
        searches = tune(jobs, group, path, device, again=again, progress=progress)
    passed = len(jobs) - len(searches)
    if passed:
        console.print(f"{passed} of {len(jobs)} were there already (--again tunes them anew)")
    if searches:
        console.print(found_table(searches))
    console.print(f"table: {path}", soft_wrap=True)


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        whole = bar.add_task("layers", total=None)
        one = bar.add_task("candidates", total=None)

        def start(number: int, of: int, job: Job) -> None:
            bar.update(whole, completed=number - 1, total=of)
            bar.reset(one, description=f"{job.shape}, {job.direction}")

        def step(done: int, of: int) -> None:
            bar.update(one, completed=done, total=of)

        yield Progress(start, step, lambda text: console.print(text, soft_wrap=True))
        bar.update(whole, completed=bar.tasks[whole].total or 0)


def found_table(searches: Sequence[Search]) -> Table:
    """Return a line per search: microseconds of the rule's plan and the best, and its changes."""
    table = Table(title="comet tune", title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("rule us", "best us", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for search in searches:
        rule, best = search.measured_rule, search.measured_best
        gain = f"{100 * (rule / best - 1):.1f} %" if best else "-"
        changes = "".join(f"\n  {name} = {value}" for name, value in search.best.items())
        what = f"{search.shape}, {search.direction}{changes}"
        table.add_row(what, f"{rule:.1f}", f"{best:.1f}", gain)
    return table
