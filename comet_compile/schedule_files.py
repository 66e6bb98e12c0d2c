"""Files of a schedule, played through or traced: for Perfetto, or a page with a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from comet_compile.errors import CometError
from comet_compile.kernels.schedule import KINDS, Schedule, Span, overlap_of
from comet_compile.pages import load_template

__all__ = [
    "ScheduleFileError",
    "check_names",
    "chrome_trace",
    "kind_shares",
    "render_page",
    "write_schedule",
]

_LANE, _GAP, _WIDTH = 3.0, 14.0, 1200.0
# spans nearer to each other than this part of the picture, and alike, are drawn as one
_BLUR = 1 / 2000


class ScheduleFileError(CometError, ValueError):
    """The name of a file does not say what to write."""


def write_schedule(schedule: Schedule, path: Path, title: str, origin: str) -> None:
    """Write `schedule` to `path`: ``.json`` for Perfetto, ``.html`` as a picture.

    `origin` says what the times are: "measured" or "simulated". Raises ScheduleFileError for other
    names, and ImportError for a picture without jinja2.
    """
    check_names([path])
    if path.suffix == ".json":
        path.write_text(json.dumps(chrome_trace(schedule, origin)))
    else:
        path.write_text(render_page(schedule, title, origin))


def check_names(paths: Iterable[Path]) -> None:
    """Raise ScheduleFileError if the end of a name does not say what to write."""
    for path in paths:
        if path.suffix not in (".json", ".html"):
            raise ScheduleFileError(
                f"{path} ends in {path.suffix!r}; allowed: .json (for Perfetto), .html (a picture)"
            )


def chrome_trace(schedule: Schedule, origin: str) -> dict[str, Any]:
    """Return a schedule as Perfetto reads it: a process per rank, a lane per CTA."""
    events: list[dict[str, Any]] = []
    for rank in _ranks(schedule):
        name = {"name": f"rank {rank} ({origin})"}
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": name})
    for span in schedule.spans:
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "cat": span.kind,
                "pid": span.rank,
                "tid": schedule.num_ctas if span.cta is None else span.cta,
                "ts": round(span.begin, 3),
                "dur": round(span.end - span.begin, 3),
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def kind_shares(schedule: Schedule, rank: int) -> str:
    """Return which parts of its CTAs' time a rank spends on what, as text."""
    shares = schedule.shares(rank).items()
    return ", ".join(f"{kind} {100 * part:.1f} %" for kind, part in shares)


def render_page(schedule: Schedule, title: str, origin: str) -> str:
    """Return a page that needs no other file: a lane per CTA of every rank, coloured by kind."""
    template = load_template("schedule.html.j2", "a picture of a schedule")
    total = schedule.total_us
    pictures = [
        {
            "rank": rank,
            "hidden": f"{100 * overlap_of(schedule.spans, rank, schedule.num_ctas):.0f} %",
            "shares": kind_shares(schedule, rank),
            "rects": list(_rects(schedule, rank)),
        }
        for rank in _ranks(schedule)
    ]
    return str(
        template.render(
            title=title,
            origin=origin,
            kinds=KINDS,
            total=f"{total:.0f}",
            num_ctas=schedule.num_ctas,
            width=_WIDTH,
            height=_LANE * schedule.num_ctas + _GAP,
            ticks=[
                (f"{_WIDTH * part / 8:.1f}", f"{total * part / 8:.0f} us") for part in range(1, 8)
            ],
            pictures=pictures,
        )
    )


def _rects(schedule: Schedule, rank: int) -> Iterator[dict[str, Any]]:
    scale = _WIDTH / schedule.total_us
    own = [span for span in schedule.spans if span.rank == rank]
    for span, count in _joined(own, _BLUR * schedule.total_us):
        lanes, first = (schedule.num_ctas, 0) if span.cta is None else (1, span.cta)
        who = "all CTAs" if span.cta is None else f"CTA {span.cta}"
        more = f" and {count - 1} more" if count > 1 else ""
        yield {
            "kind": span.kind,
            "x": f"{span.begin * scale:.2f}",
            "y": f"{first * _LANE:.1f}",
            "width": f"{max(0.1, (span.end - span.begin) * scale):.2f}",
            "height": f"{lanes * _LANE - (0 if lanes > 1 else 0.5):.1f}",
            "tooltip": f"{who}: {span.name}{more}, {span.begin:.1f} to {span.end:.1f} us",
        }


def _joined(spans: Iterable[Span], blur: float) -> Iterator[tuple[Span, int]]:
    """Yield spans and how many were joined to each: those of a lane that are alike and follow."""
    lane = None
    count = 0
    for span in sorted(spans, key=lambda one: (-1 if one.cta is None else one.cta, one.begin)):
        alike = lane is not None and (lane.cta, lane.kind) == (span.cta, span.kind)
        if lane is not None and alike and span.begin - lane.end < blur:
            lane = Span(lane.rank, lane.cta, lane.kind, lane.name, lane.begin, span.end)
            count += 1
            continue
        if lane is not None:
            yield lane, count
        lane, count = span, 1
    if lane is not None:
        yield lane, count


def _ranks(schedule: Schedule) -> list[int]:
    return sorted({span.rank for span in schedule.spans})
