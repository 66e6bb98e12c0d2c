"""Draw the loss curves that train_lm.py wrote and, below, how far each run is from eager.

python examples/plot_curves.py examples/results/train_lm_cpu.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

# text stays text and identifiers do not change from run to run
mpl.rcParams.update({"svg.hashsalt": "comet", "svg.fonttype": "none", "font.size": 9})


def draw(path: Path) -> None:
    """Draw the JSON of a run as an SVG beside it."""
    document = json.loads(path.read_text())
    runs = document["runs"]
    losses = {name: torch.tensor(run["losses"]) for name, run in runs.items()}
    figure = Figure(figsize=(8, 6))
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    # the curves lie upon each other: wide ones below narrow ones
    colors = ("silver", "tab:orange", "tab:blue", "tab:green", "tab:olive")
    for name, color, width in zip(runs, colors, (6, 3, 1, 0.5, 0.5), strict=True):
        if not name.startswith("nudged"):
            label = f"{name} (held out: {runs[name]['held_out'][1]:.4f})"
            top.plot(losses[name], label=label, color=color, linewidth=width)
        if name != "eager":
            # equal losses have no place on a logarithmic axis: draw the least
            apart = (losses[name] - losses["eager"]).abs().clamp(min=2.0**-23)
            bottom.plot(apart, label=name, color=color, linewidth=width)
    top.set(ylabel="loss (nats per byte)")
    bottom.set(ylabel="|loss - eager's|", xlabel="step", yscale="log")
    dtypes = f"{document['dtype']}, experts {document['experts_dtype']}".replace("torch.", "")
    where = f"{document['ranks']} x {document['device']}, {document['backend']}"
    top.set_title(f"Qwen3-MoE, {dtypes}\n{where}, torch {document['versions']['torch']}")
    top.legend()
    bottom.legend(ncols=2)
    svg = path.with_suffix(".svg")
    figure.savefig(svg, bbox_inches="tight", metadata={"Date": None})
    # matplotlib ends some lines with spaces
    svg.write_text("".join(f"{line.rstrip()}\n" for line in svg.read_text().splitlines()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path)
    draw(parser.parse_args().json)


if __name__ == "__main__":
    main()
