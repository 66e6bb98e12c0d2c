"""The search of ``comet tune``: which changes of a plan make a layer faster.

Coordinate descent: every field that matters for a direction is tried at its neighbouring values,
and a change that gains MIN_GAIN or more is kept; passes go on until one brings nothing. A candidate
is measured in turns with the best so far, so that a drifting clock hits both. Before it is measured
it must be a plan that the device can run, and must not multiply much more than the best
(`padded_work`): tiles that are wider than what is left to multiply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from comet_compile.kernels.plan import Device, GemmTiles, Plan, choose_stages, columns_of
from comet_compile.kernels.plan_changes import TILE_FIELDS, PlanChangeError, change
from comet_compile.kernels.tuned import Shape

MIN_GAIN = 0.01
MAX_PASSES = 3
MAX_MORE_WORK = 1.25

Measure = Callable[[Sequence[Any]], list[float]]
"""Microseconds of plans, measured in turns; inf for one that cannot run or computes otherwise."""

# The gradients of tokens are multiplied as in layer1, whose tiles are the forward's.
_GEMMS = {"forward": ("layer0", "layer1"), "backward": ("grad_hidden", "grad_weight")}


@dataclasses.dataclass
class Search:
    """One shape and direction being tuned; what is best so far can be read at any time.

    `measured_rule` and `measured_best` are microseconds of the last comparison that each was in.
    """

    shape: Shape
    direction: str
    plan: Any
    """The rule's: a `Plan` or an `ExchangePlan`."""
    device: Device
    measure: Measure
    best: dict[str, Any] = dataclasses.field(default_factory=dict)
    measured_rule: float = 0.0
    measured_best: float = 0.0
    num_tried: int = 0
    num_pruned: int = 0

    def run(self, step: Callable[[int, int], None] = lambda done, of: None) -> None:
        """Search; `step` is told after every candidate how many of its pass are done."""
        if self.best and self._changed(self.best) is None:
            self.best = {}  # what an earlier run left, under other rules
        for _ in range(MAX_PASSES):
            before = dict(self.best)
            candidates = list(self.candidates())
            for number, candidate in enumerate(candidates, 1):
                self._try(candidate)
                step(number, len(candidates))
            if self.best == before:
                break
        self.confirm()

    def confirm(self) -> None:
        """Measure the rule's plan and the best once more, and keep the best if it still is."""
        rule, best = self.measure([self.plan, self.best_plan()])
        # what looked better while it was found must still be
        if best > (1 - MIN_GAIN) * rule:
            self.best, best = {}, rule
        self.measured_rule, self.measured_best = rule, best

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Yield changes that differ from the best in one field, or a field and the steps it leaves
        room for."""
        plan = self.best_plan()
        gemms: Plan = plan if isinstance(plan, Plan) else plan.gemms
        for gemm in _GEMMS[self.direction]:
            tiles = getattr(gemms, gemm)
            for field in TILE_FIELDS[gemm]:
                for value in _neighbours(tiles, field):
                    found = {**self.best, f"{gemm}.{field}": value}
                    if field in ("block_n", "store_n"):
                        found[f"{gemm}.num_stages"] = self._stages(gemm, tiles, field, value)
                    yield found
        if self.direction == "forward" and plan is not gemms:
            for num in (8, 12, 16, 24, 32, 48):
                if num != plan.num_fetchers:
                    yield {**self.best, "num_fetchers": num}
            for num in (0, 4, 8, 16):
                if num != plan.num_senders:
                    yield {**self.best, "num_senders": num}
            for place in range(2):
                for part in (0.0, 0.125, 0.25, 0.4, 0.6):
                    lead = (part, plan.lead[1]) if place == 0 else (plan.lead[0], part)
                    if lead != plan.lead:
                        yield {**self.best, "lead": lead}

    def _try(self, candidate: dict[str, Any]) -> None:
        plan, best = self._changed(candidate), self.best_plan()
        if plan is None or plan == best or self._work(plan) > MAX_MORE_WORK * self._work(best):
            self.num_pruned += 1
            return
        self.num_tried += 1
        then, now = self.measure([best, plan])
        if now < (1 - MIN_GAIN) * then:
            self.best, self.measured_best = candidate, now
            self.measured_rule = self.measured_rule or then

    def _stages(self, gemm: str, tiles: GemmTiles, field: str, value: int) -> int:
        changes: dict[str, Any] = {field: value}
        other = dataclasses.replace(tiles, **changes)
        return choose_stages(other, columns_of(gemm, other, self.shape.gated), self.device)

    def best_plan(self) -> Any:
        """Return the rule's plan with the best changes so far."""
        plan = self._changed(self.best)
        assert plan is not None, "every best was a candidate"
        return plan

    def _changed(self, changes: dict[str, Any]) -> Any | None:
        try:
            return change(self.plan, changes, gated=self.shape.gated, device=self.device)
        except PlanChangeError:
            return None

    def _work(self, plan: Any) -> float:
        gemms: Plan = plan if isinstance(plan, Plan) else plan.gemms
        shape, slots = self.shape, self.shape.ranks * self.shape.tokens * self.shape.top_k
        work = 0.0
        for gemm in _GEMMS[self.direction]:
            columns = shape.inter if gemm in ("layer0", "grad_hidden") else shape.hidden
            if gemm != "grad_weight":
                rows = slots // shape.ranks
                work += padded_work(getattr(gemms, gemm), rows, shape.experts, columns)
        return work


def padded_work(tiles: GemmTiles, rows: int, experts: int, columns: int) -> float:
    """Return the elements of the result that the busiest program computes, padding included.

    The rows are spread evenly over the experts.
    """
    busy = max(1, min(experts, rows))
    row_tiles = busy * -(-max(1, rows // busy) // tiles.block_m)
    num_tiles = row_tiles * -(-columns // tiles.block_n)
    return -(-num_tiles // tiles.num_programs) * tiles.block_m * tiles.block_n


def _neighbours(tiles: GemmTiles, field: str) -> list[Any]:
    value = getattr(tiles, field)
    if field == "block_n":
        return [n for n in (value // 2, 2 * value) if 32 <= n <= 256]
    if field == "store_n":
        return [n for n in (None, 64, 128) if n != value]
    if field == "num_stages":
        return [n for n in (value - 1, value + 1) if n >= 2]
    if field == "group_m":
        return [n for n in (4, 8, 16, 32) if n != value]
    return [not value]
