"""The ranks of a replicated layer as buffers of one process, step by step.

In the interpreter, or on one GPU. The all-reduce goes step by step, all ranks one step before any
takes the next: so every wait is over when it begins.
"""

from __future__ import annotations

import dataclasses

from exchange_ranks import LocalWorkspace
from fused_layers import math, params, routed, small_plan, tiles
from moe_cases import Case
from torch import Tensor

from comet_compile.kernels.fused_replicated import ReplicatedCall
from comet_compile.kernels.workspace import ReduceLayout

PLAN = small_plan(tiles(16, 16, 32), tiles(16, 16, 16))
WIDTH = 16


class ReplicatedRanks:
    """P ranks that share the experts of a layer and have all its tokens."""

    def __init__(self, num_ranks: int, layer: Case) -> None:
        self.layer, self.num_ranks = layer, num_ranks
        device = layer.x.device.type
        num_tokens, hidden = layer.x.shape
        layout = ReduceLayout.of(num_tokens, hidden, num_ranks, layer.out_dtype.itemsize)
        self.workspaces = [
            LocalWorkspace(layout.num_bytes, rank, num_ranks, device) for rank in range(num_ranks)
        ]
        self._table = LocalWorkspace.connect(self.workspaces)

    def part(self, rank: int) -> Case:
        """The rank's experts, their ids counted from 0, NaN weights beside the others'."""
        count = self.layer.w_in.shape[0] // self.num_ranks
        mine = slice(rank * count, (rank + 1) * count)
        names = ("w_in", "w_up", "w_out", "b_in", "b_up", "b_out")
        values = {name: getattr(self.layer, name) for name in names}
        ids, weights = self.layer.ids - rank * count, self.layer.weights
        if weights is not None:
            weights = weights.masked_fill((ids < 0) | (ids >= count), float("nan"))
        return dataclasses.replace(
            self.layer,
            ids=ids,
            weights=weights,
            **{name: None if v is None else v[mine] for name, v in values.items()},
        )

    def calls(self, width: int = WIDTH) -> list[ReplicatedCall]:
        """Each rank's call, layer0 done."""
        calls = []
        for rank, workspace in enumerate(self.workspaces):
            part = self.part(rank)
            call = ReplicatedCall(
                routed(part), params(part), math(part), part.out_dtype, PLAN, workspace,
                deadline=5.0, width=width, clock=part.x.is_cuda,
            )  # fmt: skip
            assert call.y_TH.isnan().all(), "poisoned"
            assert call.rows_RH.isnan().all()
            calls.append(call)
        return calls

    def run(self, width: int = WIDTH) -> list[Tensor]:
        """Each rank's y."""
        calls = self.calls(width)
        for step in range(calls[0].num_steps):
            for call in calls:
                call.reduce(step, step + 1)
        for workspace in self.workspaces:
            workspace.check()
            assert not workspace.reduce_counters.any(), "as the next call needs them"
        return [call.y_TH for call in calls]
