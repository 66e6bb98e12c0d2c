"""Make results/README.md and a plot per suite from the JSON files in results/.

    python benchmarks/report.py            # page and plots (needs the `bench` extra)
    python benchmarks/report.py --no-plots
    python benchmarks/report.py --check    # exit 1 if the page is not what the files say

Each (case, mode) comes from the newest file that has it, all baselines from that one run; files of
other benchmarks and of `--tiny` tries are passed over. targets.json holds what comet must reach.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import side_tables

Row = dict[str, Any]
Key = tuple[str, str]

HERE = Path(__file__).resolve().parent
SUITES = {
    "local": "Experts of one device (top-k included, the router's GEMM not)",
    "block": "Hugging Face MoE block",
    "traps": "Hugging Face MoE blocks run in costly ways",
    "model": "Hugging Face model, 6 layers",
    "ep": "Expert parallel layer, all-to-all, per GPU",
    "ep-hf": "Hugging Face expert parallel (mask and all-reduce), 4 layers",
}
BASELINES = (
    "eager",
    "inductor",
    "inductor-max-autotune",
    "gemms",
    "comet",
    "comet-op",
    "comet-portable",
)
COLORS = {
    "eager": "lightgrey",
    "inductor": "tab:orange",
    "inductor-max-autotune": "navajowhite",
    "gemms": "darkgrey",
    "comet": "tab:blue",
    "comet-op": "lightsteelblue",
    "comet-portable": "tab:cyan",
}
INTRODUCTION = """\
# Results

Made by `python benchmarks/report.py` from the JSON files beside this page; how it is measured says
[../README.md](../README.md). Milliseconds are medians as launched, in brackets the replay of a CUDA
graph. Every launch follows a synchronisation, so the host's way to the kernels is in it; a replayed
graph shows the device's time alone. TF are `6*T*k*H*I / time` forward and
`12*T*k*H*I / (step - forward)` backward, per GPU, as launched. "x inductor" above 1 is faster,
below 1 slower. `gemms` is torch's compute alone: no routing, no permutation, no communication. must
and aim were set on H100s (`targets.json`) and are judged as launched; the
devices at the end are what was measured.
"""


class Results:
    """The rows of several files, by (case, mode) and baseline, and where they came from."""

    def __init__(self, documents: dict[str, dict[str, Any]]) -> None:
        """`documents`: file name -> content."""
        usable = {
            name: doc
            for name, doc in documents.items()
            if doc.get("schema") == 1 and not doc.get("tiny")
        }
        self.sources: dict[str, dict[str, Any]] = {}
        self.rows: dict[Key, dict[str, Row]] = {}
        self.file_of: dict[Key, str] = {}
        for name, doc in sorted(usable.items(), key=lambda item: (item[1]["date"], item[0])):
            own: dict[Key, dict[str, Row]] = {}
            for row in doc["rows"]:
                own.setdefault((row["case"], row["mode"]), {})[row["baseline"]] = row
            for key, rows in own.items():
                self.rows[key] = rows
                self.file_of[key] = name
        for name in sorted(set(self.file_of.values())):
            self.sources[name] = usable[name]

    def keys(self, suite: str) -> list[Key]:
        """Return the suite's (case, mode) pairs: by shape and size, forward before train."""
        keys = [key for key in self.rows if key[0].split("/")[0] == suite]
        return sorted(keys, key=lambda key: (_case_order(key[0]), key[1]))

    def milliseconds(self, key: Key, baseline: str) -> float | None:
        """Return the median of a row, None if there is none."""
        row = self.rows.get(key, {}).get(baseline)
        return row["call_ms"]["median"] if row and row["call_ms"] else None

    def speedup(self, key: Key, baseline: str, over: str = "inductor") -> float | None:
        """Return how many times faster `baseline` is than `over` in the same run."""
        own, other = self.milliseconds(key, baseline), self.milliseconds(key, over)
        return None if own is None or other is None else other / own


def load_results(folder: Path) -> Results:
    """Read every JSON file of a folder."""
    return Results({path.name: json.loads(path.read_text()) for path in folder.glob("*.json")})


def load_targets(path: Path = HERE / "targets.json") -> list[dict[str, Any]]:
    """Read what comet must reach."""
    targets: list[dict[str, Any]] = json.loads(path.read_text())["targets"]
    return targets


def judge(target: dict[str, Any], results: Results) -> tuple[float | None, str]:
    """Return comet's figure in the target's metric, and how it stands to the target."""
    key = (target["case"], target["mode"])
    if key not in results.rows:
        return None, "not run"
    row = results.rows[key].get("comet")
    if row is None or row["failed"]:
        return None, "failed" if row else "not run"
    metric = target["metric"]
    if metric == "ms":
        value = results.milliseconds(key, "comet")
    elif metric == "speedup":
        value = results.speedup(key, "comet")
    else:
        value = row[metric]
    if value is None:
        return None, "not run"
    # as a fraction of what is asked, above 1 is better
    must, aim = (
        target[name] / value if metric == "ms" else value / target[name] for name in ("must", "aim")
    )
    # what comet left as it was is not comet's merit
    path = "" if row["path"] == "fused" else f" ({row['path']})"
    if aim >= 1:
        return value, f"aim met{path}"
    if must >= 1:
        return value, f"must met, {aim:.2f} of aim{path}"
    return value, f"**short: {must:.2f} of must**{path}"


def render_page(results: Results, targets: list[dict[str, Any]]) -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION, _targets_section(results, targets), _why_short_section()]
    for suite, title in SUITES.items():
        if keys := results.keys(suite):
            parts.append(_suite_section(suite, title, keys, results))
    parts += [side_tables.all_reduce_section(_table), side_tables.tuned_section(_table)]
    parts.append(_sources_section(results))
    return "\n".join(parts)


def _targets_section(results: Results, targets: list[dict[str, Any]]) -> str:
    units = {"tf": "TF", "backward_tf": "TF backward", "ms": "ms", "speedup": "x inductor"}
    lines = []
    for target in targets:
        value, verdict = judge(target, results)
        key = (target["case"], target["mode"])
        lines.append(
            (
                target["case"],
                target["mode"],
                units[target["metric"]],
                _number(target.get("inductor_then")),
                _number(_in_metric(results, key, "inductor", target["metric"])),
                _number(value),
                _number(_replayed(results, key, "inductor", target["metric"])),
                _number(_replayed(results, key, "comet", target["metric"])),
                _number(target["must"]),
                _number(target["aim"]),
                verdict,
            )
        )
    head = ("case", "mode", "unit", "inductor then", "inductor", "comet")
    head += ("inductor, graph", "comet, graph", "must", "aim", "")
    return "## Against the targets\n\n" + _table(head, lines)


def _why_short_section() -> str:
    why = json.loads((HERE / "targets.json").read_text())["why_short"]
    lines = [f"- {line}" for line in why]
    return "\n".join(("What the profiles say of the rows that are short:", "", *lines, ""))


def _in_metric(results: Results, key: Key, baseline: str, metric: str) -> float | None:
    if metric == "ms":
        return results.milliseconds(key, baseline)
    if metric == "speedup":
        return results.speedup(key, baseline)
    row = results.rows.get(key, {}).get(baseline)
    return row[metric] if row else None


def _replayed(results: Results, key: Key, baseline: str, metric: str) -> float | None:
    """Return the figure of a replayed CUDA graph, where there is one."""
    row = results.rows.get(key, {}).get(baseline)
    if row is None or row["graph_ms"] is None:
        return None
    return {"ms": row["graph_ms"]["median"], "tf": row["graph_tf"]}.get(metric)


def _suite_section(suite: str, title: str, keys: list[Key], results: Results) -> str:
    present = [b for b in BASELINES if any(b in results.rows[key] for key in keys)]
    times = [
        (*key, *(_time_cell(results.rows[key].get(b)) for b in present), *_ratios(results, key))
        for key in keys
    ]
    head = ("case", "mode", *present, "x inductor", "x gemms")
    text = f"## {title}\n\n![{suite}]({suite}.svg)\n\n" + _table(head, times)
    details = [
        (
            *key,
            _pair(results, key, _tf),
            _pair(results, key, _error),
            _pair(results, key, _peak),
            _regions(results.rows[key].get("comet")),
        )
        for key in keys
    ]
    head = ("case", "mode", "TF", "error", "peak GiB above inputs and weights", "comet's regions")
    text += "\ncomet / inductor / eager:\n\n" + _table(head, details)
    if failures := _failures(keys, results):
        text += "\nDid not run:\n\n" + "\n".join(f"- {line}" for line in failures) + "\n"
    return text


def _time_cell(row: Row | None) -> str:
    if row is None:
        return ""
    if not row["call_ms"]:
        return "failed"
    graph = f" ({row['graph_ms']['median']:.3f})" if row["graph_ms"] else ""
    return f"{row['call_ms']['median']:.3f}{graph}"


def _ratios(results: Results, key: Key) -> tuple[str, str]:
    return (
        _number(results.speedup(key, "comet")),
        _number(results.speedup(key, "comet", over="gemms")),
    )


def _pair(results: Results, key: Key, read: Any) -> str:
    rows = (results.rows[key].get(name) for name in ("comet", "inductor", "eager"))
    return " / ".join("-" if row is None or row["failed"] else read(row) for row in rows)


def _tf(row: Row) -> str:
    return _number(row["backward_tf"] if row["mode"] == "train" else row["tf"], "-")


def _error(row: Row) -> str:
    return f"{max(row['errors'].values()):.5f}" if row["errors"] else "-"


def _peak(row: Row) -> str:
    if row["peak_extra_mib"] is None:
        return "-"
    symmetric = row["symmetric_mib"] or 0.0
    more = f" + {symmetric / 1024:.2f} symmetric" if symmetric else ""
    return f"{row['peak_extra_mib'] / 1024:.2f}{more}"


def _regions(row: Row | None) -> str:
    """Return how the regions ended and which path ran: a row not rewritten is not comet's."""
    if row is None:
        return ""
    counts: dict[str, int] = {}
    for region in row["regions"]:
        text = region["status"] + (f" {region['reason']}" if region["reason"] else "")
        counts[text] = counts.get(text, 0) + 1
    found = ", ".join(f"{n} {text}" for text, n in sorted(counts.items())) or "none found"
    return f"{found}; ran {row['path']}" if row["path"] else found


def _failures(keys: Iterable[Key], results: Results) -> list[str]:
    return [
        f"{case} {mode}, {baseline}: {row['failed']}"
        for case, mode in keys
        for baseline, row in sorted(results.rows[case, mode].items())
        if row["failed"]
    ]


def _sources_section(results: Results) -> str:
    lines = []
    for name, doc in results.sources.items():
        device, versions = doc["device"], doc["versions"]
        lines.append(
            (
                f"[{name}]({name})",
                doc["date"],
                f"{device['ranks']} x {device['name']}",
                ", ".join(f"{package} {version}" for package, version in sorted(versions.items())),
                f"`{doc['commit']}`",
                f"`{doc['command']}`",
            )
        )
    head = ("file", "date", "device", "versions", "commit", "command")
    text = "## Where the numbers come from\n\n" + _table(head, lines)
    not_run = [
        f"{name}: {', '.join(d['not_run'])}" for name, d in results.sources.items() if d["not_run"]
    ]
    if not_run:
        text += "\nOut of time, not run: " + "; ".join(not_run) + ".\n"
    return text


def _table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    rows = [head, ["---"] * len(head), *(list(line) for line in lines)]
    return "".join(
        "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |\n" for row in rows
    )


def _number(value: float | None, none: str = "") -> str:
    if value is None:
        return none
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _case_order(case: str) -> tuple[Any, ...]:
    """Sort by shape, then by size as a number, then by skew or way."""
    suite, shape, size, *rest = case.split("/")
    return suite, shape, *(int(part) for part in reversed(size.split("x"))), rest


def draw_plot(suite: str, results: Results, targets: list[dict[str, Any]], path: Path) -> None:
    """Write bars of speed relative to inductor; ticks mark must and aim where they convert."""
    import matplotlib as mpl

    mpl.use("svg")
    # text stays text and identifiers do not change from run to run
    mpl.rcParams.update({"svg.hashsalt": "comet", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    keys = [key for key in results.keys(suite) if results.milliseconds(key, "inductor")]
    # inductor is the line at 1
    others = [b for b in BASELINES if b != "inductor"]
    present = [b for b in others if any(results.speedup(key, b) for key in keys)]
    wanted = {(target["case"], target["mode"]): target for target in targets}
    height = 0.8 / max(1, len(present))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.22 * len(keys) * (len(present) + 1)))
    for number, baseline in enumerate(present):
        places = [row + (number - len(present) / 2 + 0.5) * height for row in range(len(keys))]
        speeds = [results.speedup(key, baseline) or 0.0 for key in keys]
        bars = axes.barh(places, speeds, height, label=baseline, color=COLORS[baseline])
        axes.bar_label(bars, [f"{speed:.2f}" if speed else "" for speed in speeds], padding=3)
    for row, key in enumerate(keys):
        for name, style in (("must", "-"), ("aim", ":")):
            if (speed := _target_speed(wanted.get(key), name, key, results)) is not None:
                axes.vlines(speed, row - 0.45, row + 0.45, colors="black", linestyles=style)
    axes.axvline(1.0, color="tab:orange", linewidth=1.0)
    axes.margins(x=0.08, y=0.02)
    axes.set_yticks(range(len(keys)), [f"{case.partition('/')[2]} {mode}" for case, mode in keys])
    axes.invert_yaxis()
    devices = sorted(
        {
            f"{d['ranks']} x {d['name']}"
            for d in (results.sources[results.file_of[key]]["device"] for key in keys)
        }
    )
    axes.set_xlabel(
        "speed over inductor (the line at 1) in the same run; black: must (solid), aim (dotted)"
    )
    axes.set_title(f"{SUITES[suite]}: {', '.join(devices)}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    # matplotlib ends some lines with spaces
    text = "\n".join(line.rstrip() for line in path.read_text().splitlines())
    path.write_text(text + "\n")


def _target_speed(
    target: dict[str, Any] | None, name: str, key: Key, results: Results
) -> float | None:
    """Return a target as a speed relative to the inductor row of this run."""
    if target is None or target["metric"] == "backward_tf":
        return None  # a step's speed does not tell its backward's
    if target["metric"] == "speedup":
        return float(target[name])
    inductor = _in_metric(results, key, "inductor", target["metric"])
    if inductor is None:
        return None
    wanted = float(target[name])
    return inductor / wanted if target["metric"] == "ms" else wanted / inductor


def main(argv: list[str] | None = None) -> int:
    """Write (or check) the page and the plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    results, targets = load_results(args.results), load_targets()
    page, path = render_page(results, targets), args.results / "README.md"
    if args.check:
        current = path.read_text() if path.exists() else ""
        if current != page:
            print(f"{path} is not made from the files beside it: run benchmarks/report.py")
        return int(current != page)
    path.write_text(page)
    for suite in SUITES:
        if results.keys(suite) and not args.no_plots:
            draw_plot(suite, results, targets, args.results / f"{suite}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
