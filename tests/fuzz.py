"""Random layers, correct and not: whatever is rewritten must compute what it did before.

    make fuzz FUZZ=10000        # so many correct ones and so many near-misses

The judge is independent of the prover: a graph and what the pass made of it are run node by node
on dense random numbers (`lockstep`). `zoo.composed` composes the layers.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable

import joint_graphs
import lockstep
import torch
from zoo import composed

NUM_TOKENS, HIDDEN = 6, 32
_TRAINING = 10  # every so many-th layer is captured with its backward


@dataclasses.dataclass
class Tally:
    """What became of layers; `bugs` is empty, or comet is wrong."""

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    bugs: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        total = sum(self.outcomes.values())
        lines = [f"{count / total:7.2%}  {what}" for what, count in self.outcomes.most_common()]
        return "\n".join([*lines, *self.bugs])


def judge(seed: int, *, defect: bool, tally: Tally) -> None:
    """Compose a layer, run the pass on its graph, and count what became of it."""
    recipe = composed.draw(seed, defect=defect)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator).bfloat16()
    train = seed % _TRAINING == 0
    graph = joint_graphs.capture(composed.ComposedMoE(recipe, HIDDEN), x, train=train)
    after = joint_graphs.clone(graph)
    before = joint_graphs.listing(after)
    counts = joint_graphs.run_pass(after)
    if not joint_graphs.is_rewritten(counts):
        tally.outcomes[", ".join(joint_graphs.rejections(counts)) or "not found"] += 1
        if joint_graphs.listing(after) != before:
            tally.bugs.append(f"seed {seed}: refused but changed: {recipe}")
        return
    tally.outcomes["rewritten"] += 1
    for number in range(2):
        inputs = lockstep.random_inputs(graph, 1, number, NUM_TOKENS)
        wrong = lockstep.differences(
            lockstep.execute(after, inputs, 1), lockstep.execute(graph, inputs, 1)
        )
        if wrong:
            tally.bugs.append(f"seed {seed}: {wrong}: {recipe}")
            return


def run(seeds: Iterable[int], *, defect: bool) -> Tally:
    """Judge the layers of all seeds."""
    tally = Tally()
    for seed in seeds:
        judge(seed, defect=defect, tally=tally)
    return tally


def main() -> int:
    """Judge as many as the command line says, and say what became of them."""
    from rich.progress import track

    count, bugs = int(sys.argv[1]), 0
    for defect, title in ((False, "correct layers"), (True, "near-misses")):
        tally = run(track(range(count), description=title), defect=defect)
        print(f"{count} {title}:\n{tally}")
        bugs += len(tally.bugs)
    return 1 if bugs else 0


if __name__ == "__main__":
    sys.exit(main())
