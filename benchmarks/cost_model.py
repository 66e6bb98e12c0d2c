"""Hold the cost model against measured layers, and fit its numbers to them.

    python benchmarks/cost_model.py            # results/cost_model.md: predicted beside measured,
                                               # and simulated.md: machines that were not measured
    python benchmarks/cost_model.py --check    # 1 if a page is not what model and files say
    python benchmarks/cost_model.py --fit      # print numbers that fit the files best

Measured is the replay of a CUDA graph, so device time, in the newest file of `results/` with the
case. "left out" is what a fit predicts that saw no row of that layer's sizes: what to expect of a
layer that was never measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import simulated_machines
from moe_layer import load_package

from comet_compile.kernels.backward_cost import predict_backward
from comet_compile.kernels.cost_model import H100, Load, Machine, Phase, overlap, predict, total_us
from comet_compile.kernels.schedule import simulate
from comet_compile.kernels.unfused_cost import predict_unfused
from comet_compile.machine_fit import BACKWARD, FORWARD, LINKED, descend

load_package()
from moe_bench.shapes import SHAPES  # type: ignore[import-not-found]  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
FITTED = (*FORWARD, *LINKED)
DEVICE = "H100"


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured forward."""

    case: str
    shape: str
    load: Load
    us: float
    file: str
    phase: str = ""
    """The phase that was measured, all if empty."""
    model: Callable[[Load, Machine], list[Phase]] = predict

    def predicted(self, machine: Machine) -> float:
        """Return what the model says of it, in microseconds."""
        phases = self.model(self.load, machine)
        return sum(one.us for one in phases if one.name.startswith(self.phase))


# kernels of `kernel_times.py`, and the phases that they are
KERNELS = {"dispatch_gemm_act": "layer0", "gemm_combine": "layer1"}


def measured_kernels(path: Path = RESULTS / "kernels_ep_h100.json") -> list[Row]:
    """Return the longest kernels of layers between two ranks, as planned."""
    document = json.loads(path.read_text())
    return [
        Row(
            f"{row['shape']}/{row['tokens']}/{kernel}",
            row["shape"],
            _load("ep", row["shape"], row["tokens"], [], document["ranks"]),
            row["us"][kernel],
            path.name,
            phase,
        )
        for row in document["rows"]
        if not row["changed"]
        for kernel, phase in KERNELS.items()
    ]


BACKWARD_KERNELS = {
    "arrange": ("gather_rows#1", "gather_rows#2"),
    "hidden rows": ("grad_hidden",),
    "w_out": ("grad_weight#1",),
    "w_in": ("grad_weight#2",),
    "tokens": ("gemm_rows",),
    "sums": ("sum_slots",),
}


def measured_backward_kernels(path: Path = RESULTS / "kernels_backward_h100.json") -> list[Row]:
    """Return the kernels of backwards on one GPU with half of the experts, as planned."""
    rows = []
    for row in json.loads(path.read_text())["rows"]:
        sizes = SHAPES[row["shape"]]
        load = Load(
            sizes.hidden, sizes.inter, sizes.num_experts // 2, sizes.top_k, (row["tokens"],)
        )
        case = f"{row['shape']}/{row['tokens']}"
        rows += [
            Row(
                f"{case}/{phase}", row["shape"], load, sum(row["us"][one] for one in kernels),
                path.name, phase, model=predict_backward,
            )
            for phase, kernels in BACKWARD_KERNELS.items()
            if not row["changed"]
        ]  # fmt: skip
    return rows


def measured_backwards(folder: Path = RESULTS) -> list[Row]:
    """Return the backwards of layers: steps less forwards, as launched."""
    rows = []
    for name in ("ep_train_h100.json", "local_train_h100.json"):
        document = json.loads((folder / name).read_text())
        times = {
            (row["case"], row["mode"]): 1e3 * row["call_ms"]["median"]
            for row in document["rows"]
            if row["baseline"] == "comet"
        }
        for (case, mode), step in times.items():
            if mode == "train":
                suite, shape, tokens, *skew = case.split("/")
                load = _load(suite, shape, int(tokens), skew, _ranks(document))
                us = step - times[case, "forward"]
                rows.append(Row(case, shape, load, us, name, model=predict_backward))
    return sorted(rows, key=lambda row: row.case)


def measured(folder: Path = RESULTS) -> list[Row]:
    """Return the rows of suites "local" and "ep" that were replayed on H100s, newest first kept."""
    rows: dict[str, Row] = {}
    for name, row, shape, load in _forwards(folder, "comet"):
        if row["graph_ms"]:
            us = 1e3 * row["graph_ms"]["median"]
            rows[row["case"]] = Row(row["case"], shape, load, us, name)
    return sorted(rows.values(), key=lambda row: row.case)


def measured_unfused(folder: Path = RESULTS) -> list[Row]:
    """Return the same layers under Inductor; between ranks, where they cannot be replayed, as
    launched."""
    rows: dict[str, Row] = {}
    for name, row, shape, load in _forwards(folder, "inductor"):
        us = 1e3 * (row["graph_ms"] or row["call_ms"])["median"]
        rows[row["case"]] = Row(row["case"], shape, load, us, name, model=predict_unfused)
    return sorted(rows.values(), key=lambda row: row.case)


def _forwards(folder: Path, baseline: str) -> Iterator[tuple[str, dict[str, Any], str, Load]]:
    """Yield (file, row, shape, load) of a baseline's forwards, the newest file last."""
    documents = [(json.loads(path.read_text()), path.name) for path in folder.glob("*.json")]
    documents = [d for d in documents if DEVICE in str(d[0].get("device"))]
    for document, name in sorted(documents, key=lambda d: str(d[0].get("date"))):
        for row in document.get("rows", []):
            if row.get("baseline") != baseline or row.get("mode") != "forward":
                continue
            suite, shape, tokens, *skew = row["case"].split("/")
            if suite in ("local", "ep"):
                yield name, row, shape, _load(suite, shape, int(tokens), skew, _ranks(document))


def _ranks(document: dict[str, Any]) -> int:
    device = document["device"]
    return int(device["ranks"] if isinstance(device, dict) else document["ranks"])


def _load(suite: str, shape: str, tokens: int, skew: list[str], ranks: int) -> Load:
    load = simulated_machines.even_load(SHAPES[shape], tokens, ranks if suite == "ep" else 1)
    each = (*load.tokens[:-1], 0) if "empty" in skew else load.tokens
    return dataclasses.replace(load, tokens=each, hot=4.0 if "hot" in skew else 1.0)


def fit(rows: Sequence[Row], start: Machine = H100) -> Machine:
    """Return the machine whose forward numbers predict `rows` and their kernels best."""
    shapes = {row.shape for row in rows}
    kernels = [one for one in measured_kernels() if one.shape in shapes]
    return descend([*rows, *kernels], FITTED, start)


def fit_backward(start: Machine = H100) -> Machine:
    """Return the machine whose backward numbers predict the kernels of backwards best."""
    return descend(measured_backward_kernels(), BACKWARD, start)


def error(machine: Machine, row: Row) -> float:
    """Return by which part of the measured time the predicted is too long."""
    return row.predicted(machine) / row.us - 1


def pages(rows: Sequence[Row]) -> dict[Path, str]:
    """Return both pages, by their files."""
    return {
        RESULTS / "cost_model.md": page(rows),
        RESULTS / "simulated.md": simulated_machines.page(),
    }


def page(rows: Sequence[Row]) -> str:
    """Return the comparison as Markdown."""
    shapes = sorted({row.shape for row in rows})
    without = {one: fit([row for row in rows if row.shape != one]) for one in shapes}
    lines, own, others = [], [], []
    for row in rows:
        phases = predict(row.load, H100)
        own.append(error(H100, row))
        others.append(error(without[row.shape], row))
        longest = max(phases, key=lambda phase: phase.us)
        hidden = f"{100 * overlap(phases):.0f} %" if row.load.ranks > 1 else ""
        lines.append(
            f"| {row.case} | {row.us:.0f} | {total_us(phases):.0f} | {100 * own[-1]:+.1f} % "
            f"| {100 * others[-1]:+.1f} % | {_played(row)} | {_bound(longest)} | {hidden} |"
        )
    worst = max(range(len(rows)), key=lambda i: abs(own[i]))
    return "\n".join(
        (
            "# Predicted and measured",
            "",
            "Made by `python benchmarks/cost_model.py` from the replayed forwards of the files",
            f"{', '.join(f'[{f}]({f})' for f in sorted({row.file for row in rows}))}.",
            'Microseconds. "left out": by numbers fitted without that layer\'s rows; "played": the',
            "error of the schedule that is played through CTA by CTA.",
            "",
            f"Median error {_median(own)}, {_median(others)} where the layer was left out; "
            f"the worst is {rows[worst].case}, {100 * own[worst]:+.1f} %.",
            "",
            "| case | measured | predicted | error | left out | played | longest phase | hidden |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
            "## The longest kernels of forwards between two ranks",
            "",
            *_plain_table(measured_kernels()),
            "## Backwards, steps less forwards as launched",
            "",
            *_plain_table(measured_backwards()),
            "## Kernels of backwards, one GPU with half of the experts",
            "",
            *_plain_table(measured_backward_kernels()),
            "## Layers that are not fused, under Inductor",
            "",
            "One GPU's replayed, those between ranks as launched. By these numbers an H100 fuses "
            "every layer.",
            "",
            *_plain_table(measured_unfused()),
            "## The split, beside every other one",
            "",
            *_splits(),
        )
    )


def _splits(path: Path = RESULTS / "best_split_h100.json") -> list[str]:
    """Return what planned splits lose to the best that an exhaustive search has found."""
    document = json.loads(path.read_text())
    rows = document["rows"]
    losses = [row["planned_us"] / row["best_us"] - 1 for row in rows]
    worst = max(range(len(rows)), key=losses.__getitem__)
    name = f"{rows[worst]['shape']}/{rows[worst]['tokens']}"
    return [
        f"[{path.name}]({path.name}), {document['device']}, {document['date']}, commit "
        f"`{document['commit']}`: `{document['command']}`. CTAs that fetch / CTAs that send beside "
        "the tiles / part of the own tiles that lead; microseconds, both timed again in turns. The "
        f"planned split takes {100 * statistics.median(losses):.1f} % longer than the best of the "
        f"grid in the median, {100 * losses[worst]:.1f} % at worst ({name}).",
        "",
        "| layer | planned | us | best of the grid | us | longer | tried |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['shape']}/{row['tokens']} | {_split(row['planned'])} "
            f"| {row['planned_us']:.0f} "
            f"| {_split(row['best'])} | {row['best_us']:.0f} | {100 * loss:+.1f} % "
            f"| {row['tried']} |"
            for row, loss in zip(rows, losses, strict=True)
        ),
        "",
    ]


def _split(fields: dict[str, Any]) -> str:
    return f"{fields['num_fetchers']} / {fields['num_senders']} / {fields['lead']:.2f}"


def _plain_table(rows: Sequence[Row]) -> list[str]:
    errors = [error(H100, row) for row in rows]
    files = ", ".join(f"[{file}]({file})" for file in sorted({row.file for row in rows}))
    return [
        f"From {files}; median error {_median(errors)}, worst {100 * max(errors, key=abs):+.1f} %.",
        "",
        "| what | measured | predicted | error |",
        "| --- | --- | --- | --- |",
        *(
            f"| {row.case} | {row.us:.0f} | {row.predicted(H100):.0f} | {100 * one:+.1f} % |"
            for row, one in zip(rows, errors, strict=True)
        ),
        "",
    ]


def _played(row: Row) -> str:
    return f"{100 * played_error(row):+.1f} %" if row.load.ranks > 1 else ""


def played_error(row: Row) -> float:
    """Return by which part of the measured time the schedule played through is too long."""
    return simulate(row.load, H100).total_us / row.us - 1


def _bound(phase: Phase) -> str:
    return f"{phase.name}: {phase.bound}"


def _median(errors: Sequence[float]) -> str:
    return f"{100 * statistics.median(map(abs, errors)):.1f} %"


def main(argv: list[str] | None = None) -> int:
    """Write or check the page, or fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="print the numbers that fit best")
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    args = parser.parse_args(argv)
    rows = measured()
    if args.fit:
        best = fit_backward(fit(rows))
        for field in (*FITTED, *BACKWARD):
            print(f"{field}={getattr(best, field):.4g}")
        print(f"median error {_median([error(best, row) for row in rows])}")
        return 0
    current = True
    for path, text in pages(rows).items():
        if args.check:
            current = current and path.exists() and path.read_text() == text
        else:
            path.write_text(text)
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
