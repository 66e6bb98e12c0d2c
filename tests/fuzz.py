"""Random layers, correct and not: whatever is rewritten must compute what it did before.

    make fuzz FUZZ=10000        # so many correct ones and so many near-misses
    make fuzz FUZZ_WORKERS=4    # in so many processes; by default one for each core

The judge is independent of the prover: a graph and what the pass made of it are run node by node
on dense random numbers (`lockstep`), for all ranks of layers that exchange rows.
`zoo.composed_layouts` composes the layers. A few of one layout share a graph, since most of the
time goes into capturing them: each has tokens and outputs of its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import joint_graphs
import lockstep
import torch
from torch import Tensor, nn
from zoo import composed_layouts, recipes
from zoo.recipes import Recipe

NUM_TOKENS, HIDDEN = 6, 32
_TOGETHER = 6  # layers of one graph
_TRAINING = 20  # every so many-th graph of a layout, the first included, has its backward

Seeds = Sequence[int]


@dataclasses.dataclass
class Tally:
    """What became of layers, by layout; `bugs` is empty, or comet is wrong."""

    outcomes: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    bugs: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for layout in ("", *recipes.WAYS):
            own = self.of(layout)
            shares = (f"{n / own.total():.2%} {what}" for what, n in own.most_common())
            if own:
                lines.append(f"{layout or 'all':>10} {own.total():6}: {', '.join(shares)}")
        return "\n".join([*lines, *self.bugs])

    def of(self, layout: str = "") -> Counter[str]:
        """Return what became of the layers of one layout, or of all."""
        found: Counter[str] = Counter()
        for (own, outcome), count in self.outcomes.items():
            if layout in ("", own):
                found[outcome] += count
        return found

    def add(self, other: Tally) -> None:
        """Count what another has counted."""
        self.outcomes += other.outcomes
        self.bugs += other.bugs


class _SideBySide(nn.Module):
    """Layers that share nothing but the graph."""

    def __init__(self, drawn: Sequence[Recipe]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(composed_layouts.compose(recipe, HIDDEN) for recipe in drawn)

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, xs, strict=True))


def judge(seeds: Seeds, *, defect: bool, train: bool) -> Tally:
    """Compose the layers of one graph, run the pass on it, and count what became of them."""
    outcomes, wrong = _judged(seeds, defect=defect, train=train)
    layout = recipes.draw(seeds[0], defect=defect).layout
    tally = Tally(Counter({(layout, outcome): n for outcome, n in outcomes.items()}))
    if wrong:
        alone = {seed: _judged([seed], defect=defect, train=train)[1] for seed in seeds}
        tally.bugs = [
            f"seed {seed}: {bug}: {recipes.draw(seed, defect=defect)}"
            for seed, bug in alone.items()
            if bug
        ] or [f"seeds {list(seeds)}, but none of them alone: {wrong}"]
    return tally


def _judged(seeds: Seeds, *, defect: bool, train: bool) -> tuple[Counter[str], str]:
    """Return what became of the layers of one graph, and what is wrong with it, if anything."""
    drawn = [recipes.draw(seed, defect=defect) for seed in seeds]
    num_ranks = 2 if drawn[0].layout == "exchanged" else 1
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    xs = [torch.randn(NUM_TOKENS, HIDDEN, generator=g).bfloat16() for g in generators]
    group = joint_graphs.fake_group(num_ranks) if num_ranks > 1 else contextlib.nullcontext()
    with group:
        graph = joint_graphs.capture(_SideBySide(drawn), *xs, train=train)
        after = joint_graphs.clone(graph)
        before = joint_graphs.listing(after)
        counts = joint_graphs.run_pass(after)
    outcomes = Counter({why: counts[f"rejected.{why}"] for why in joint_graphs.rejections(counts)})
    outcomes["rewritten"] = joint_graphs.num_rewritten(counts)
    outcomes["not found"] = max(0, len(seeds) - outcomes.total())
    outcomes = +outcomes
    if not outcomes["rewritten"]:
        return outcomes, "" if joint_graphs.listing(after) == before else "refused but changed"
    for number in range(2):
        inputs = lockstep.random_inputs(graph, num_ranks, number, NUM_TOKENS)
        try:
            results = [lockstep.execute(g, inputs, num_ranks) for g in (after, graph)]
        except (AssertionError, RuntimeError) as error:  # offsets or splits of a near-miss
            return outcomes, f"does not run: {error}"
        if wrong := lockstep.differences(*results):
            return outcomes, wrong
    return outcomes, ""


@dataclasses.dataclass(frozen=True)
class Graph:
    """Layers of one layout that are judged together."""

    seeds: Seeds
    defect: bool
    train: bool

    def judge(self) -> Tally:
        return judge(self.seeds, defect=self.defect, train=self.train)


def graphs(seeds: range, *, defect: bool) -> list[Graph]:
    """Return what to judge: the layers of all seeds."""
    found = []
    for layout in recipes.WAYS:
        own = [seed for seed in seeds if recipes.draw(seed, defect=defect).layout == layout]
        for number, start in enumerate(range(0, len(own), _TOGETHER)):
            train = number % _TRAINING == 0
            found.append(Graph(own[start : start + _TOGETHER], defect, train))
    return found


def run(todo: Iterable[Graph]) -> Tally:
    """Judge graphs in this process."""
    tally = Tally()
    for graph in todo:
        tally.add(graph.judge())
    return tally


def _tallies(todo: list[Graph], workers: int) -> Iterator[Tally]:
    """Yield the tally of each graph, in any order."""
    # a forked process would share torch's threads
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        for done in concurrent.futures.as_completed([pool.submit(g.judge) for g in todo]):
            yield done.result()


def main() -> int:
    """Judge as many as the command line says, and say what became of them."""
    from rich.progress import track

    count, bugs = int(sys.argv[1]), 0
    workers = int(os.environ.get("FUZZ_WORKERS", os.cpu_count() or 1))
    for defect, title in ((False, "correct layers"), (True, "near-misses")):
        todo = graphs(range(count), defect=defect)
        tally = Tally()
        for part in track(_tallies(todo, workers), description=title, total=len(todo)):
            tally.add(part)
        print(f"{count} {title}:\n{tally}")
        bugs += len(tally.bugs)
    return 1 if bugs else 0


if __name__ == "__main__":
    sys.exit(main())
