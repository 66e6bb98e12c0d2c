"""The replicated form's forward in Triton's interpreter, its ranks buffers of one process.

The all-reduce goes step by step, all ranks one step before any takes the next: so every wait is
over when it begins. float16 only: bfloat16 goes wrong in the interpreter.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from covering import covering
from exchange_ranks import LocalWorkspace
from fused_layers import math, params, routed, small_case, small_plan, tiles
from moe_cases import Case
from numerics import assert_matches_ref
from torch import Tensor

from comet_compile.errors import PeerTimeoutError
from comet_compile.kernels import portable
from comet_compile.kernels.fused_replicated import ReplicatedCall, column_width
from comet_compile.kernels.refs import moe_layer_ref
from comet_compile.kernels.workspace import MAX_COLUMN_BLOCKS, ReduceLayout, Workspace

pytestmark = pytest.mark.usefixtures("interpreted")

PLAN = small_plan(tiles(16, 16, 32), tiles(16, 16, 16))
WIDTH = 16


class Ranks:
    """P ranks that share the experts of a layer and have all its tokens."""

    def __init__(self, num_ranks: int, layer: Case) -> None:
        self.layer, self.num_ranks = layer, num_ranks
        num_tokens, hidden = layer.x.shape
        layout = ReduceLayout.of(num_tokens, hidden, num_ranks, layer.out_dtype.itemsize)
        self.workspaces = [
            LocalWorkspace(layout.num_bytes, rank, num_ranks) for rank in range(num_ranks)
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
                deadline=5.0, width=width, clock=False,
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


def check(num_ranks: int, width: int = WIDTH, **layer: object) -> None:
    """Assert that all ranks have the same y, which errs at most as `numerics` allows."""
    ranks = Ranks(num_ranks, small_case(**layer))
    case = ranks.layer
    ref = moe_layer_ref(
        *case.to(torch.float64).tensors(),
        activation=case.activation,
        weight_place=case.weight_place,
    )
    eager, _ = portable.local_forward(routed(case), params(case), math(case), case.out_dtype)
    for _ in range(2):  # the second finds the first one's flags and buffers
        results = ranks.run(width)
        for rank, y in enumerate(results):
            assert torch.equal(y, results[0]), f"rank {rank} differs from rank 0"
        assert_matches_ref(results[0], ref, eager, what="y")
    assert [int(workspace.epoch) for workspace in ranks.workspaces] == [2] * num_ranks


@pytest.mark.parametrize(
    ("num_ranks", "num_tokens", "top_k"),
    [(2, 7, 3), (2, 1, 2), (3, 4, 2), (4, 9, 1), (5, 3, 2)],  # some own no token
    ids=str,
)
def test_numbers_of_ranks_and_tokens(num_ranks: int, num_tokens: int, top_k: int) -> None:
    check(num_ranks, num_tokens=num_tokens, top_k=top_k, num_experts=2 * num_ranks, biases=True)


@pytest.mark.parametrize(
    ("hidden", "width"), [(40, 16), (48, 16), (40, 32), (24, 48), (64, 64)], ids=str
)
def test_column_blocks(hidden: int, width: int) -> None:
    check(2, width, num_experts=4, hidden=hidden)


@pytest.mark.parametrize(
    ("weight_place", "product_dtype", "out_dtype", "with_weights"),
    covering(
        ["before", "between", "after"],
        [torch.float16, torch.float32],
        [torch.float16, torch.float32],
        [True, False],
    ),
)
def test_weights_and_dtypes(
    weight_place: str, product_dtype: torch.dtype, out_dtype: torch.dtype, with_weights: bool
) -> None:
    check(
        2,
        num_experts=4,
        weight_place=weight_place,
        product_dtype=product_dtype,
        out_dtype=out_dtype,
        with_weights=with_weights,
    )


@pytest.mark.parametrize("permuted", [False, True])
def test_layouts_of_weights(permuted: bool) -> None:
    check(2, num_experts=4, permuted=permuted, activation="gelu", separate_up=False)


def test_a_rank_without_rows() -> None:
    ids = torch.tensor([[0, 1], [1, 0], [0, 0]])
    check(2, ids=ids, num_experts=4)


def test_rows_of_nobody() -> None:
    check(2, ids=torch.full((5, 2), 99), num_experts=4)


@pytest.mark.parametrize(
    ("num_ranks", "stops_at", "phase"),
    [(2, 0, "peer's entry"), (2, 1, "combine"), (3, 2, "sums over all ranks")],
)
def test_a_lost_peer_leaves_nan_and_a_message(num_ranks: int, stops_at: int, phase: str) -> None:
    """Rank 1 stops before it enters, before it pushes, or before it reduces."""
    ranks = Ranks(num_ranks, small_case(num_experts=2 * num_ranks))
    calls = ranks.calls(width=64)  # one block
    for step in range(calls[0].num_steps):
        for rank, call in enumerate(calls):
            if rank != 1 or step < stops_at:
                call.reduce(step, step + 1)
    assert calls[0].y_TH.isnan().any()
    with pytest.raises(PeerTimeoutError, match=f"group rank 1 in call 1 .*{phase}"):
        ranks.workspaces[0].check()


def test_a_lost_peer_is_lost_to_the_others() -> None:
    """What was summed after a wait in vain is not told to the third rank."""
    ranks = Ranks(3, small_case(num_experts=6))
    calls = ranks.calls()
    for step in range(calls[0].num_steps):
        for call in calls[:2]:
            call.reduce(step, step + 1)
    for rank in (0, 1):
        assert calls[rank].y_TH.isnan().any()
        with pytest.raises(PeerTimeoutError):
            ranks.workspaces[rank].check()
    for rank in range(3):
        workspace = ranks.workspaces[rank]
        assert not workspace.view(Workspace.PARTS, (3,), torch.int32).any()


def test_width_of_column_blocks() -> None:
    assert column_width(2048) == 512
    assert column_width(2880) == 768, "whole tiles"
    for hidden in (8, 256, 1000, 16384):
        width = column_width(hidden)
        assert width % 256 == 0
        assert -(-hidden // width) <= MAX_COLUMN_BLOCKS
