"""Numbers of a machine from measured layers: those with which the cost model predicts them best."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from comet_compile.kernels.cost_model import Load, Machine, Phase, predict

__all__ = [
    "BACKWARD",
    "FORWARD",
    "LINKED",
    "UNFUSED",
    "Observation",
    "Predicts",
    "descend",
    "median_error",
]

FORWARD = ("gemm_tf", "row_gemm_tf", "memory_tb", "hide", "fixed_us")
"""Numbers that forwards on one GPU tell."""
LINKED = ("sync_us",)
"""What forwards between ranks tell besides, once the links' rates are known."""
UNFUSED = ("torch_gemm_tf", "unfused_us")
"""Numbers that unfused layers on one GPU tell."""
BACKWARD = ("hidden_gemm_tf", "weight_gemm_tf")
"""Numbers that only backwards depend on."""


class Predicts(Protocol):
    """Something measured that the cost model has an opinion of."""

    @property
    def us(self) -> float:
        """Microseconds."""
        ...

    def predicted(self, machine: Machine) -> float:
        """Return what the model says of it, in microseconds."""
        ...


@dataclasses.dataclass(frozen=True)
class Observation:
    """Phases of a layer that took `us` microseconds together; all but top-k if none are named."""

    load: Load
    us: float
    phases: tuple[str, ...] = ()
    model: Callable[[Load, Machine], list[Phase]] = predict
    """Of what it is a layer: `predict`, `predict_backward` or `predict_unfused`."""

    def predicted(self, machine: Machine) -> float:
        """Return what the model says of them, in microseconds."""
        return sum(
            one.us
            for one in self.model(self.load, machine)
            if (one.name in self.phases if self.phases else one.name != "top-k")
        )


def descend(
    rows: Sequence[Predicts], fields: Sequence[str | tuple[str, ...]], start: Machine
) -> Machine:
    """Return a machine that predicts `rows` best: one number at a time, ever finer.

    Several names in a tuple keep their ratio.
    """
    best, least = start, _loss(start, rows)
    step = 0.2
    while step > 1e-3:
        improved = False
        for field in fields:
            for factor in (1 + step, 1 / (1 + step)):
                names = (field,) if isinstance(field, str) else field
                values: dict[str, Any] = {one: getattr(best, one) * factor for one in names}
                other = dataclasses.replace(best, **values)
                if (found := _loss(other, rows)) < least:
                    best, least, improved = other, found, True
        if not improved:
            step /= 2
    return best


def median_error(rows: Sequence[Predicts], machine: Machine) -> float:
    """Return the median part of the measured times by which the predicted ones are off."""
    return statistics.median(abs(row.predicted(machine) / row.us - 1) for row in rows)


def _loss(machine: Machine, rows: Sequence[Predicts]) -> float:
    """Return the sum of squared log ratios of predicted to measured."""
    return sum(math.log(row.predicted(machine) / row.us) ** 2 for row in rows)
