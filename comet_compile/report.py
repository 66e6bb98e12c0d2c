"""The report of one compilation: the table a person reads, JSON for a program, HTML to look at.

A :class:`Report` holds the records the passes published and nothing else; it needs neither
torch nor a device, so a report can be made, stored and tested anywhere.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from comet_compile.records import GraphRecord, RegionRecord

TEXT_WIDTH = 110

_LOOKED_FOR = (
    "comet looks for grouped expert GEMMs (torch._grouped_mm, bmm over gathered weights, or one mm "
    "per expert) between a router's top-k choice and the weighted sum over the chosen experts."
)
_NOTHING_COMPILED = (
    "torch.compile made no graph at all: it may be switched off (TORCH_COMPILE_DISABLE, "
    "torch.compiler.set_stance), or the call may have no tensor work in it."
)
_SHOWN_ELSEWHERE = ("path", "form")  # the columns status and family
# `File "a/b.py", line 3, in f` and `a/b.py:3` are the two spellings of a place in this package
_PLACE = re.compile(
    r'File "(?P<quoted>[^"]+)", line (?P<quoted_line>\d+)|(?P<path>[^\s:"]+\.\w+):(?P<line>\d+)'
)


class GraphBreak(NamedTuple):
    """Why Dynamo left the graph, in its first words, and the user's source line."""

    reason: str
    where: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What comet found in the graphs of one call, and how each region ended.

    `num_graphs` counts the graphs Dynamo handed over; it can exceed `len(graphs)`, because a
    graph without a candidate need not leave a record.
    """

    graphs: tuple[GraphRecord, ...]
    graph_breaks: tuple[GraphBreak, ...] = ()
    num_graphs: int = 0

    @property
    def regions(self) -> tuple[RegionRecord, ...]:
        """Every candidate region of every graph, in the order they were compiled."""
        return tuple(region for graph in self.graphs for region in graph.regions)

    def summary(self) -> str:
        """Return the closing line: ``rewrote 3 of 4 MoE regions in 2 graphs (1 rejected: ...)``."""
        return summary_line(self.regions, max(self.num_graphs, len(self.graphs)))

    def to_text(self, width: int = TEXT_WIDTH) -> str:
        """Return the table, `width` columns wide whatever the terminal is, without ANSI codes."""
        return _render_text(self, width)

    def __str__(self) -> str:
        return self.to_text()

    def to_json(self) -> str:
        """Return regions, graphs and graph breaks as JSON; pictures and graph texts stay out."""
        from comet_compile._version import __version__

        document = {
            "comet_compile": __version__,
            "summary": self.summary(),
            "num_graphs": max(self.num_graphs, len(self.graphs)),
            "regions": [region_to_dict(region) for region in self.regions],
            "graphs": [graph_to_dict(graph) for graph in self.graphs],
            "graph_breaks": [graph_break._asdict() for graph_break in self.graph_breaks],
        }
        return json.dumps(plain(document), indent=2)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page with the before and after pictures to `path`."""
        from comet_compile.report_html import render_html

        page = render_html(self)
        with open(path, "w", encoding="utf-8") as file:
            file.write(page)


def summary_line(regions: Iterable[RegionRecord], num_graphs: int) -> str:
    """Return how many of `regions` were rewritten, and why the others were not."""
    regions = tuple(regions)
    graphs = _count(num_graphs, "graph")
    if not regions:
        return f"no MoE region found in {graphs}"
    reasons = collections.Counter(r.reason or "unknown" for r in regions if r.status == "rejected")
    num_rejected = reasons.total()
    line = (
        f"rewrote {len(regions) - num_rejected} of {_count(len(regions), 'MoE region')} in {graphs}"
    )
    if not num_rejected:
        return line
    named = ", ".join(r if n == 1 else f"{r} x{n}" for r, n in sorted(reasons.items()))
    return f"{line} ({num_rejected} rejected: {named})"


def advice_for(reason: str | None) -> str:
    """Return what to change about a refusal, "" for a reason the closed list does not have."""
    if reason is None:
        return ""
    # in the function: a report is readable where the passes (and torch) do not import
    try:
        from comet_compile.passes.reasons import RejectReason
    except ImportError:
        return ""
    return next((member.advice for member in RejectReason if member.value == reason), "")


def short_place(where: str) -> str:
    """Return ``file.py:3`` for a source place, the text itself when it names none."""
    match = _PLACE.search(where)
    if match is None:
        return where.strip()
    path, line = match["quoted"] or match["path"], match["quoted_line"] or match["line"]
    name = path.replace("\\", "/").rpartition("/")[2]
    return f"{name}:{line}"


def short_plan(plan: Mapping[str, Any], max_chars: int = 60) -> str:
    """Return the first entries of `plan` that fit: names as they are, numbers with their key."""
    entries = []
    for key, value in plan.items():
        if key in _SHOWN_ELSEWHERE:
            continue
        if isinstance(value, (bool, int, float)):
            entries.append(f"{key}={value}")
        elif isinstance(value, str) and value:
            entries.append(value.removeprefix("torch."))
    line = ", ".join(entries)
    while len(line) > max_chars and len(entries) > 1:
        entries.pop()
        line = ", ".join(entries) + ", ..."
    return line


def region_to_dict(region: RegionRecord) -> dict[str, Any]:
    """Return one region as plain JSON values, with its advice and without its pictures."""
    fields = {
        field.name: getattr(region, field.name)
        for field in dataclasses.fields(region)
        if field.name not in ("before", "after")
    }
    return plain({**fields, "advice": advice_for(region.reason)})


def graph_to_dict(graph: GraphRecord) -> dict[str, Any]:
    """Return the numbers of one graph; its regions and texts are written elsewhere."""
    skipped = ("regions", "before_text", "after_text")
    fields = {
        field.name: getattr(graph, field.name)
        for field in dataclasses.fields(graph)
        if field.name not in skipped
    }
    return plain({**fields, "num_regions": len(graph.regions)})


def plain(value: Any) -> Any:
    """Return `value` built of JSON's own types; anything else (a dtype, a SymInt) as its text."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(item) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # NaN and Infinity are no JSON
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _render_text(report: Report, width: int) -> str:
    from rich.console import Console

    # no terminal, no colour, no environment (COLUMNS, FORCE_COLOR): the same text everywhere
    console = Console(
        file=io.StringIO(), width=width, force_terminal=False, color_system=None, _environ={}
    )
    with console.capture() as capture:
        if report.regions:
            for part in _table_parts(report.regions, width):
                console.print(part, markup=False, highlight=False)
            console.print()
        for line in _closing_lines(report):
            console.print(line, markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _table_parts(regions: tuple[RegionRecord, ...], width: int) -> Iterable[Any]:
    """Yield the header, then each region's row and, for a refusal, the lines under it."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    header = ("region", "status", "family", "where", "backward", "plan")
    rows = [(r.name, r.status, r.family, short_place(r.where), r.backward) for r in regions]
    caps = (28, 9, 14, 30, 9)
    widths = [
        min(cap, max(len(row[i]) for row in (header[:5], *rows))) for i, cap in enumerate(caps)
    ]
    widths.append(max(20, width - sum(widths) - 2 * len(widths)))
    plans = [short_plan(region.plan, widths[-1]) or "-" for region in regions]

    def grid(cells: tuple[str, ...]) -> Table:
        # one small table per row, all of the same widths: a row may then be followed by lines
        # over the whole width, which one big table cannot hold
        table = Table.grid(padding=(0, 2, 0, 0))
        for column_width in widths:
            table.add_column(width=column_width, overflow="fold")
        table.add_row(*(Text(cell) for cell in cells))
        return table

    yield grid(header)
    yield "-" * width
    for region, row, plan in zip(regions, rows, plans, strict=True):
        yield grid((*row, plan))
        if region.status == "rejected":
            yield Padding(Text(f"{region.reason}: {region.detail}"), (0, 0, 0, 4))
            if advice := advice_for(region.reason):
                yield Padding(Text(f"to change: {advice}"), (0, 0, 0, 4))
        elif region.detail:
            yield Padding(Text(region.detail + _kept(region)), (0, 0, 0, 4))


def _kept(region: RegionRecord) -> str:
    """What a layer that is trained keeps for its backward, beside its own inputs."""
    from rich import filesize

    if region.backward == "none":
        return ""
    num_bytes = region.estimate.get("bytes_saved", 0)
    if num_bytes == 0:
        return "; its backward computes its rows again"
    return f"; keeps {filesize.decimal(num_bytes)} for its backward"


def _closing_lines(report: Report) -> Iterable[str]:
    yield report.summary()
    if not report.regions:
        compiled = max(report.num_graphs, len(report.graphs))
        yield _LOOKED_FOR if compiled else _NOTHING_COMPILED
    if report.graph_breaks:
        number = _count(len(report.graph_breaks), "graph break")
        yield f"{number} (one inside an MoE layer leaves half a region, which is not rewritten):"
        for graph_break in report.graph_breaks:
            yield f"    {short_place(graph_break.where)}  {graph_break.reason}"
