"""The HTML form of a report: one file, no script, no network, light and dark.

The template escapes every value (source lines and node names are the user's text). Pictures are
inline SVG; jinja2 and networkx are only needed here, hence the optional ``report`` extra.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from comet_compile.pages import load_template
from comet_compile.records import GraphPicture, RegionRecord
from comet_compile.report import advice_for, plain, short_place

if TYPE_CHECKING:
    from comet_compile.report import Report

_ROLES = (
    ("comet", "comet op"),
    ("comm", "communication"),
    ("compute", "compute"),
    ("index", "index arithmetic"),
    ("input", "input"),
    ("output", "output"),
)
_STATUS_WORDS = {
    "fused": "rewritten, fused kernels",
    "portable": "rewritten, portable path",
    "rejected": "left as it was",
}
_NUM_OPEN = 4  # of forty layers alike, the pictures of the first few are enough to see at once
_UNITS = ("", "K", "M", "G", "T", "P")


def render_html(report: Report) -> str:
    """Return `report` as one self-contained HTML page."""
    template = load_template("report.html.j2", "Report.to_html", "networkx")
    from comet_compile._version import __version__

    regions = [_region_view(i, region) for i, region in enumerate(report.regions)]
    return str(
        template.render(
            version=__version__,
            summary=report.summary(),
            tiles=_tiles(report),
            roles=_ROLES,
            regions=regions,
            graphs=report.graphs,
            graph_breaks=report.graph_breaks,
            explanation=report.to_text().splitlines()[1:] if not regions else [],
        )
    )


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Return the (value, label, tone) of the numbers at the top of the page."""
    regions = report.regions
    rejected = sum(region.status == "rejected" for region in regions)
    seconds = sum(graph.seconds for graph in report.graphs)
    num_graphs, num_breaks = max(report.num_graphs, len(report.graphs)), len(report.graph_breaks)
    tones = ("none", "bad")
    return [
        (str(len(regions) - rejected), "rewritten", "good" if len(regions) > rejected else "none"),
        (str(rejected), "rejected", tones[rejected > 0]),
        (str(num_graphs), "graph" + "s" * (num_graphs != 1), "none"),
        (str(num_breaks), "graph break" + "s" * (num_breaks != 1), tones[num_breaks > 0]),
        (f"{seconds:.2f} s", "in comet's passes", "none"),
    ]


def _region_view(index: int, region: RegionRecord) -> dict[str, Any]:
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", region.name).strip("-")
    return {
        "anchor": f"region-{index}-{slug}",
        "record": region,
        "place": short_place(region.where),
        "open": index < _NUM_OPEN or region.status == "rejected",
        "words": _STATUS_WORDS[region.status],
        "advice": advice_for(region.reason),
        "plan": _entries(region.plan),
        "estimate": _entries(region.estimate),
        "pictures": [
            _picture_view(title, picture)
            for title, picture in (("before", region.before), ("after", region.after))
            if picture is not None
        ],
    }


def _picture_view(title: str, picture: GraphPicture) -> dict[str, Any]:
    from comet_compile.report_picture import layout_picture

    return {"title": title, "layout": layout_picture(picture), "num_nodes": len(picture.nodes)}


def _entries(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _readable(key, value)) for key, value in values.items()]


def _readable(key: str, value: Any) -> str:
    """Return `value` as a person writes it: bytes and FLOPs with a unit, a list with commas."""
    value = plain(value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, (int, float)):
        if "bytes" in key:
            return _scaled(value, 1024.0, "iB", "B")
        if "flop" in key:
            return _scaled(value, 1000.0, "FLOP", "FLOP")
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_readable("", item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{k}={_readable(k, v)}" for k, v in value.items())
    return str(value)


def _scaled(value: float, base: float, suffix: str, plain_suffix: str) -> str:
    power = 0
    while abs(value) >= base and power < len(_UNITS) - 1:
        value /= base
        power += 1
    return f"{value:.3g} {_UNITS[power]}{suffix if power else plain_suffix}"
