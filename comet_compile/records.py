"""What a compiled graph leaves behind for the report: plain data, no torch objects.

The passes append one :class:`GraphRecord` per compiled graph; `explain`, the dumps and the
counters read them. Everything here is frozen and JSON-able.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

Status = Literal["fused", "portable", "rejected"]
Role = Literal["input", "compute", "comm", "index", "comet", "output"]


@dataclasses.dataclass(frozen=True)
class PictureNode:
    """One box of a graph picture; `shape` reads like ``bf16[16, 32]``."""

    name: str
    op: str
    shape: str
    role: Role


@dataclasses.dataclass(frozen=True)
class GraphPicture:
    """The nodes around one region and the (from, to) pairs of indices into `nodes`."""

    nodes: tuple[PictureNode, ...]
    edges: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class RegionRecord:
    """How one candidate region ended.

    `family` names the form ("local", "all_to_all", "replicated", or "unknown" before it is
    known), `reason` is a member of the closed list of refusals (None unless rejected), `where`
    the user's source line, `plan` what runs, `estimate` what it moves and computes.
    """

    name: str
    graph_id: int
    status: Status
    family: str
    reason: str | None
    detail: str
    where: str
    plan: dict[str, Any]
    estimate: dict[str, Any]
    backward: Literal["fused", "portable", "none"]
    before: GraphPicture | None = None
    after: GraphPicture | None = None


@dataclasses.dataclass(frozen=True)
class GraphRecord:
    """One graph that the pass saw, with its regions and its text before and after."""

    graph_id: int
    kind: Literal["inference", "training"]
    num_nodes_before: int
    num_nodes_after: int
    seconds: float
    regions: tuple[RegionRecord, ...]
    before_text: str
    after_text: str


_collectors: list[list[GraphRecord]] = []


@contextlib.contextmanager
def collect() -> Iterator[list[GraphRecord]]:
    """Yield a list to which every graph compiled inside the block is appended."""
    records: list[GraphRecord] = []
    _collectors.append(records)
    try:
        yield records
    finally:
        # by identity: two nested collectors may hold equal lists
        _collectors[:] = [c for c in _collectors if c is not records]


def is_collecting() -> bool:
    """Whether somebody will read a record made now (texts and pictures are only built then)."""
    return bool(_collectors)


def publish(record: GraphRecord) -> None:
    """Hand `record` to every open collector."""
    for records in _collectors:
        records.append(record)
