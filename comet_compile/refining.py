"""``comet.refine``: measure other plans for a shape when it is first used, within a budget.

The layer's own tensors are used, so no memory is taken for weights; its result is computed once
more by the plan that was found. Only layers of one device are refined: ranks would have to search
together, which `comet tune` does.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

from comet_compile.errors import CometWarning
from comet_compile.kernels import paths
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.portable import Routed

__all__ = ["Refiner", "switch_on"]

log = logging.getLogger(__name__)

_REPEATS = 5


class _OutOfTimeError(Exception):
    """The budget is spent."""


@dataclasses.dataclass(frozen=True)
class Refiner:
    """What `paths.refine` asks; `seconds` is the budget of a shape and direction."""

    seconds: float

    def __call__(
        self,
        direction: str,
        plan: Any,
        routed: Routed,
        params: ExpertParams,
        math: LayerMath,
        run: Callable[[Any], Any],
    ) -> Any:
        """Return `plan`, or a faster one, which is then kept in the user's table.

        A shape that a table knows is not searched again.
        """
        from comet_compile.kernels import fused, tuned
        from comet_compile.tuning_layer import TunedLayer, measure
        from comet_compile.tuning_search import Search

        device = fused.read_device(routed.x.device.index or 0)
        shape = fused.shape_of(routed, params, math, routed.ids.numel())
        if any(shape in table.changes for table in tuned.tables(device)):
            return plan
        end = time.monotonic() + self.seconds

        def step(done: int, of: int) -> None:
            if time.monotonic() > end:
                raise _OutOfTimeError

        layer = TunedLayer(plan, run, alone=True)
        search = Search(
            shape, direction, plan, device, lambda plans: measure(layer, plans, _REPEATS)
        )
        complete = True
        try:
            search.run(step)
        except _OutOfTimeError:
            complete = False
            search.confirm()
        log.info(
            "comet: of %d plans for %s, %s, the best takes %.1f us, the rule's %.1f",
            search.num_tried, shape, direction, search.measured_best, search.measured_rule,
        )  # fmt: skip
        _keep(search, device, complete=complete)
        if not search.best:
            return plan
        found = search.best_plan()
        return dataclasses.replace(found, source="refined when it was first used")


def _keep(search: Any, device: Any, *, complete: bool) -> None:
    """Write what was found into the user's table, if there can be one."""
    from comet_compile import tuning_file
    from comet_compile.kernels import tuned

    try:
        path = tuned.cached_file(device)
        entry = tuning_file.entry_of(search, complete=complete)
        tuning_file.add_entry(path, device, entry, log.info)
    except (ImportError, OSError) as error:
        warnings.warn(
            f"comet: the plan that was found for {search.shape} is not kept: {error}",
            CometWarning,
            stacklevel=2,
        )


def switch_on(seconds: float) -> None:
    """Have shapes refined from now on, in this process; needs Triton to have an effect."""
    paths.refine = Refiner(seconds)
