"""The rows as a table for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_COLUMNS = (
    "case",
    "mode",
    "baseline",
    "call ms (quartiles)",
    "graph ms",
    "TF",
    "bwd TF",
    "peak GiB (+)",
    "error",
    "regions or failure",
)


def show(document: dict[str, Any], console: Console) -> None:
    """Print every row, then what was not run."""
    device = document["device"]
    table = Table(*_COLUMNS, title=f"{device['name']} x {device['ranks']}, {document['date']}")
    before = None
    for row in document["rows"]:
        place = (row["case"], row["mode"])
        if before not in (None, place):
            table.add_section()
        table.add_row(*(place if place != before else ("", "")), *_cells(row))
        before = place
    console.print(table)
    if document["not_run"]:
        console.print(f"out of time, not run: {', '.join(document['not_run'])}")


def _cells(row: dict[str, Any]) -> list[str]:
    call, graph = row["call_ms"], row["graph_ms"]
    return [
        row["baseline"],
        f"{call['median']:.3f} ({call['q1']:.3f}-{call['q3']:.3f})" if call else "-",
        f"{graph['median']:.3f}" if graph else "-",
        _number(row["graph_tf"] or row["tf"], ".0f"),
        _number(row["backward_tf"], ".0f"),
        f"{row['peak_mib'] / 1024:.2f} (+{row['peak_extra_mib'] / 1024:.2f})"
        if row["peak_mib"]
        else "-",
        _number(max(row["errors"].values(), default=None), ".5f"),
        describe_outcome(row),
    ]


def describe_outcome(row: dict[str, Any]) -> str:
    """Return the failure, else how comet's regions ended and the path that ran."""
    if row["failed"]:
        return str(row["failed"])
    if not row["baseline"].startswith("comet"):
        return ""
    counts: dict[str, int] = {}
    for region in row["regions"]:
        text = region["status"] + (f" {region['reason']}" if region["reason"] else "")
        counts[text] = counts.get(text, 0) + 1
    found = ", ".join(f"{n} {text}" for text, n in counts.items())
    return "; ".join(part for part in (found, f"path {row['path']}") if part)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
