"""Random layers, correct and not: whatever is rewritten must compute what it did before.

    make fuzz FUZZ=10000        # so many correct ones and so many near-misses

The judge is independent of the prover: a graph and what the pass made of it are run node by node
on dense random numbers (`lockstep`). `zoo.composed` composes the layers. A few share a graph, since
most of the time goes into capturing them: each has tokens and outputs of its own.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import joint_graphs
import lockstep
import torch
from torch import Tensor, nn
from zoo import composed

NUM_TOKENS, HIDDEN = 6, 32
_TOGETHER = 5  # layers of one graph
_TRAINING = 10  # every so many-th graph is captured with its backward


@dataclasses.dataclass
class Tally:
    """What became of layers; `bugs` is empty, or comet is wrong."""

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    bugs: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        total = sum(self.outcomes.values())
        lines = [f"{count / total:7.2%}  {what}" for what, count in self.outcomes.most_common()]
        return "\n".join([*lines, *self.bugs])


class _SideBySide(nn.Module):
    """Layers that share nothing but the graph."""

    def __init__(self, recipes: Sequence[composed.Recipe]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(composed.ComposedMoE(recipe, HIDDEN) for recipe in recipes)

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, xs, strict=True))


def judge(seeds: Sequence[int], *, defect: bool, train: bool, tally: Tally) -> None:
    """Compose the layers of one graph, run the pass on it, and count what became of them."""
    outcomes, wrong = _judged(seeds, defect=defect, train=train)
    tally.outcomes += outcomes
    if not wrong:
        return
    alone = {seed: _judged([seed], defect=defect, train=train)[1] for seed in seeds}
    tally.bugs += [
        f"seed {seed}: {bug}: {composed.draw(seed, defect=defect)}"
        for seed, bug in alone.items()
        if bug
    ] or [f"seeds {list(seeds)}, but none of them alone: {wrong}"]


def _judged(seeds: Sequence[int], *, defect: bool, train: bool) -> tuple[Counter[str], str]:
    """Return what became of the layers of one graph, and what is wrong with it, if anything."""
    recipes = [composed.draw(seed, defect=defect) for seed in seeds]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    xs = [torch.randn(NUM_TOKENS, HIDDEN, generator=g).bfloat16() for g in generators]
    graph = joint_graphs.capture(_SideBySide(recipes), *xs, train=train)
    after = joint_graphs.clone(graph)
    before = joint_graphs.listing(after)
    counts = joint_graphs.run_pass(after)
    outcomes = Counter({why: counts[f"rejected.{why}"] for why in joint_graphs.rejections(counts)})
    outcomes["rewritten"] = joint_graphs.num_rewritten(counts)
    outcomes["not found"] = max(0, len(seeds) - outcomes.total())
    if not outcomes["rewritten"]:
        return outcomes, "" if joint_graphs.listing(after) == before else "refused but changed"
    for number in range(2):
        inputs = lockstep.random_inputs(graph, 1, number, NUM_TOKENS)
        wrong = lockstep.differences(
            lockstep.execute(after, inputs, 1), lockstep.execute(graph, inputs, 1)
        )
        if wrong:
            return outcomes, wrong
    return outcomes, ""


def groups(seeds: range) -> list[range]:
    """Return the seeds of each graph."""
    return [seeds[start : start + _TOGETHER] for start in range(0, len(seeds), _TOGETHER)]


def run(graphs: Iterable[Sequence[int]], *, defect: bool) -> Tally:
    """Judge the layers of all seeds, graph by graph."""
    tally = Tally()
    for number, seeds in enumerate(graphs):
        judge(seeds, defect=defect, train=number % _TRAINING == 0, tally=tally)
    return tally


def main() -> int:
    """Judge as many as the command line says, and say what became of them."""
    from rich.progress import track

    count, bugs = int(sys.argv[1]), 0
    for defect, title in ((False, "correct layers"), (True, "near-misses")):
        tally = run(track(groups(range(count)), description=title), defect=defect)
        print(f"{count} {title}:\n{tally}")
        bugs += len(tally.bugs)
    return 1 if bugs else 0


if __name__ == "__main__":
    sys.exit(main())
