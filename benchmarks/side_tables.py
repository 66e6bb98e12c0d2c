"""Sections of the results' page whose numbers other benchmarks and `comet tune` have measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHIPPED = HERE.parent / "comet_compile" / "tuned"

Table = Callable[[Iterable[str], Iterable[Iterable[str]]], str]


def all_reduce_section(table: Table) -> str:
    """Return what layer1's own all-reduce takes, beside NCCL's after it."""
    name = "all_reduce_h100.json"
    document = json.loads((HERE / "results" / name).read_text())
    lines = [
        (
            f"{row['shape']}/{row['tokens']}",
            f"{row['layer1_us']:.0f}",
            f"{row['nccl_us']:.0f}",
            f"{row['nccl_us'] / row['layer1_us']:.2f}",
        )
        for row in document["rows"]
    ]
    return (
        "## The all-reduce of replicated layers\n\n"
        "Replayed, the whole layer. Results of 16 MiB and more are added up in layer1, others by "
        f"NCCL. {_origin(name, document)}\n\n"
        + table(("case", "in layer1, us", "NCCL after it, us", "gain"), lines)
    )


def tuned_section(table: Table) -> str:
    """Return what `comet tune` found for the tables that the package ships."""
    text = "## Tuned plans that are shipped\n\n"
    for path in sorted(SHIPPED.glob("*.json")):
        document = json.loads(path.read_text())
        lines = [_tuned_line(entry) for entry in document["entries"]]
        versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        head = ("layer of a rank", "direction", "rule, us", "tuned, us", "gain", "tried", "changes")
        text += (
            f"{document['device']['name']}, {versions}; every entry of "
            f"[{path.name}](../../comet_compile/tuned/{path.name}) has its command and date. Where "
            "nothing gained 1 %, the rule's plan stands.\n\n" + table(head, lines)
        )
    return text


def _tuned_line(entry: dict[str, Any]) -> tuple[str, ...]:
    shape, us = entry["shape"], entry["us"]
    ranks = f", {shape['ranks']} ranks" if shape["ranks"] > 1 else ""
    sizes = (
        f"{shape['hidden']} x {shape['inter']}, {shape['experts']} experts, top-{shape['top_k']}"
    )
    return (
        f"{sizes}, {shape['tokens']} tokens{ranks}",
        entry["direction"],
        f"{us['rule']:.0f}",
        f"{us['tuned']:.0f}",
        f"{100 * (1 - us['tuned'] / us['rule']):.1f} %",
        str(entry["tried"]),
        ", ".join(f"{name}={value}" for name, value in entry["changes"].items()) or "none",
    )


def _origin(name: str, document: dict[str, Any]) -> str:
    return (
        f"[{name}]({name}), {document['date']}, {document['device']}, commit "
        f"`{document['commit']}`: `{document['command']}`."
    )
