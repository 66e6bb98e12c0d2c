"""The ranks of a fused exchange as buffers of one process, stage by stage.

In the interpreter, or on one GPU. A rank's kernels read its peers' memory by address, so in one
process any buffer will do for symmetric memory. All ranks run one stage before any runs the next:
no wait is ever in vain, unless a rank is left out on purpose.

Legend: T tokens, C capacity in tokens, A experts per token, P ranks, L local experts, H model dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from fused_layers import math, params, routed, small_case, small_plan, tiles
from moe_cases import Case
from torch import Tensor

from comet_compile.kernels.exchange_call import ExchangeCall
from comet_compile.kernels.exchange_plan import ExchangePlan
from comet_compile.kernels.experts import Matrices, Needs
from comet_compile.kernels.fused_exchange import BackwardCall
from comet_compile.kernels.route_tiles import TileRouting
from comet_compile.kernels.sync import MESSAGE_FIELDS
from comet_compile.kernels.workspace import _FLAGS_BYTES, Layout, Workspace

TILES = tiles(16, 16, 32)
NAN_BYTE = 255  # NaN in float16, -1 in int32


class LocalWorkspace(Workspace):
    """A rank's memory without symmetric memory behind it, filled with NaN."""

    def __init__(self, num_bytes: int, rank: int, num_ranks: int, device: str = "cpu") -> None:
        self.num_bytes, self.group_name = num_bytes, "in one process"
        self.rank, self.num_ranks = rank, num_ranks
        self.buffer = torch.full((num_bytes,), NAN_BYTE, dtype=torch.uint8, device=device)
        self.buffer[:_FLAGS_BYTES].zero_()
        self.make_counters(device)
        pinned = device == "cuda"  # "meta" has none to pin
        self.message = torch.zeros(MESSAGE_FIELDS, dtype=torch.int32, pin_memory=pinned)
        self.peers = 2**40  # an address; `connect` sets a true one

    @staticmethod
    def connect(workspaces: Sequence[LocalWorkspace]) -> Tensor:
        """Let the ranks find each other; return the table of addresses, to be kept alive."""
        addresses = [ws.buffer.data_ptr() for ws in workspaces]
        table = torch.tensor(addresses, device=workspaces[0].buffer.device)
        for ws in workspaces:
            ws.peers = table.data_ptr()
        return table


class Ranks:
    """P ranks that share a layer of L experts each."""

    def __init__(
        self,
        num_ranks: int,
        *,
        capacity: int = 16,
        num_experts: int = 2,
        top_k: int = 2,
        block_tokens: int = 4,
        lead: tuple[float, float] = (0.3, 0.3),
        device: str = "cpu",
        gathers: bool = False,
        **layer: object,
    ) -> None:
        whole = small_case(
            num_tokens=1, num_experts=num_ranks * num_experts, top_k=top_k, **layer
        ).on(device)
        self.device = device
        self.whole, self.num_experts, self.num_ranks = whole, num_experts, num_ranks
        # one fetcher: the interpreter runs one program after the other, and none may wait for a
        # later one
        self.plan = ExchangePlan(
            small_plan(TILES, TILES, gathers=gathers), capacity, 1, 1, lead, block_tokens
        )
        self.layout = Layout.of(
            capacity, top_k, whole.x.shape[1], num_ranks, whole.x.element_size(), backward=True
        )
        self.workspaces = [
            LocalWorkspace(self.layout.num_bytes, rank, num_ranks, device)
            for rank in range(num_ranks)
        ]
        self._table = LocalWorkspace.connect(self.workspaces)

    def tokens(self, num_tokens: Sequence[int], seed: int = 0, strays: bool = True) -> list[Case]:
        """The whole layer with each rank's tokens; with strays, NaN weights beside them."""
        layers = []
        for rank, count in enumerate(num_tokens):
            random = small_case(
                seed=100 * seed + rank + 1,
                num_tokens=count,
                top_k=self.whole.ids.shape[1],
                num_experts=self.whole.w_in.shape[0],
                hidden=self.whole.x.shape[1],
                with_weights=self.whole.weights is not None,
                dtype=self.whole.x.dtype,
            ).on(self.device)
            num_experts = self.whole.w_in.shape[0]
            ids, weights = random.ids, random.weights
            if strays and count:
                ids[0, 0], ids[-1, -1] = 2**32, -2  # the first is expert 0 in 32 bits
            else:
                ids.remainder_(num_experts)
            if weights is not None:
                weights[(ids < 0) | (ids >= num_experts)] = float("nan")
            layers.append(
                dataclasses.replace(
                    self.whole, x=random.x, ids=ids, weights=weights, grad_y=random.grad_y
                )
            )
        return layers

    def calls(self, layers: Sequence[Case]) -> list[ExchangeCall]:
        """Each rank's call, not begun."""
        return [
            ExchangeCall(
                routed(layer),
                params(self.experts_of(rank, layer)),
                math(layer),
                self.plan,
                self.workspaces[rank],
                deadline=5.0,
                clock=self.device != "cpu",
            )
            for rank, layer in enumerate(layers)
        ]

    def experts_of(self, rank: int, layer: Case) -> Case:
        """The layer with the rank's experts only."""
        mine = slice(rank * self.num_experts, (rank + 1) * self.num_experts)
        names = ("w_in", "w_up", "w_out", "b_in", "b_up", "b_out")
        values = {name: getattr(layer, name) for name in names}
        return dataclasses.replace(
            layer, **{name: None if v is None else v[mine] for name, v in values.items()}
        )

    def run(self, layers: Sequence[Case], saved: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Each rank's y; `saved` is given the rows in front of the activation."""
        calls = self.calls(layers)
        for call in calls:
            call.publish()
        for call in calls:
            call.receive()
        return finish(calls, saved)

    def poison_fetched(self, workspace: LocalWorkspace) -> None:
        """Put NaN where the rank has its peers' tokens and gradients from the last call."""
        shape = (self.num_ranks, self.plan.capacity, self.whole.x.shape[1])
        for offset in (self.layout.tokens, self.layout.grads):
            workspace.view(offset, shape, self.whole.x.dtype)[1:] = float("nan")

    def memory_for_rows(self, layer: Case, num_rows: int | None = None) -> Tensor:
        """[num_rows, N] of NaN, what a rank keeps rows in; [P * C * A, N] by default."""
        columns = layer.w_in.shape[2] + (0 if layer.w_up is None else layer.w_up.shape[2])
        if num_rows is None:
            num_rows = self.num_ranks * self.plan.capacity * layer.ids.shape[1]
        return layer.x.new_full((num_rows, columns), float("nan"))

    def run_backward(
        self,
        layers: Sequence[Case],
        needs: Needs | None = None,
        saved: Sequence[Tensor | None] | None = None,
        into: Sequence[Matrices | None] | None = None,
        *,
        fits: bool = False,
        frees: bool = False,
    ) -> list[tuple[Tensor | None, ...]]:
        """Each rank's gradients; ranks without `saved` rows compute them again.

        `fits`: with memory for as many rows as there are, and no more.
        """
        calls = [
            BackwardCall(
                layer.grad_y,
                routed(layer),
                params(self.experts_of(rank, layer)),
                math(layer),
                needs or Needs(),
                self.plan,
                self.workspaces[rank],
                deadline=5.0,
                saved_SN=None if saved is None else saved[rank],
                frees=frees,
                into=None if into is None else into[rank],
                clock=self.device != "cpu",
            )
            for rank, layer in enumerate(layers)
        ]
        for stage in (BackwardCall.publish, BackwardCall.receive):
            for call in calls:
                stage(call)
        for call in calls:
            if fits:
                num_tiles, _ = call.tables.totals.tolist()
                call.take(call.tables, num_tiles * call.routing.block_m)
            call.compute()
        return [call.finish() for call in calls]


def finish(calls: Sequence[ExchangeCall], saved: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Run what follows `receive` on these ranks and return their y."""
    kept = saved or [None] * len(calls)
    hidden = [call.compute_hidden(rows) for call, rows in zip(calls, kept, strict=True)]
    rows = [call.combine(h_RI) for call, h_RI in zip(calls, hidden, strict=True)]
    results = []
    for call, rows_RH in zip(calls, rows, strict=True):
        y = call.x.new_full((call.num_tokens, call.hidden), float("nan"))
        call.sum_own(rows_RH, y)
        results.append(y)
    return results


def order_tiles_ref(
    routing: TileRouting, turn_S: Sequence[int], lead: float, own_only: bool
) -> list[tuple[int, int]]:
    """Return (turn, tile) of the tiles in use as they are to be computed."""
    in_use = []
    for tile in range(int(routing.num_tiles)):
        rows = routing.slot_R[tile * routing.block_m : (tile + 1) * routing.block_m].tolist()
        turn = max(turn_S[slot] for slot in rows if slot >= 0)
        in_use.append((turn, int(routing.expert_M[tile]), tile))
    num_lead = -(-len(in_use) * int(lead * 1024) // 1024)
    leading = [one for one in sorted(in_use)[:num_lead] if one[0] == 0 or not own_only]
    rest = sorted(set(in_use) - set(leading), key=lambda one: one[2])
    return [(turn, tile) for turn, _, tile in leading + rest]
