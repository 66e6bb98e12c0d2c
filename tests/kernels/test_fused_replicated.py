"""The replicated form's forward in Triton's interpreter, its ranks buffers of one process.

float16 only: bfloat16 goes wrong in the interpreter.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from covering import covering
from fused_layers import math, params, routed, small_case
from numerics import assert_matches_ref
from replicated_ranks import WIDTH, ReplicatedRanks

from comet_compile.errors import PeerTimeoutError
from comet_compile.kernels import portable
from comet_compile.kernels.fused_replicated import column_width
from comet_compile.kernels.refs import moe_layer_ref
from comet_compile.kernels.workspace import _FLAGS_BYTES, MAX_COLUMN_BLOCKS, Workspace

pytestmark = pytest.mark.usefixtures("interpreted")


def check(num_ranks: int, width: int = WIDTH, **layer: object) -> None:
    """Assert that all ranks have the same y, which errs at most as `numerics` allows."""
    ranks = ReplicatedRanks(num_ranks, small_case(**layer))
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
    ranks = ReplicatedRanks(num_ranks, small_case(num_experts=2 * num_ranks))
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
    ranks = ReplicatedRanks(3, small_case(num_experts=6))
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


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_who_has_given_up_writes_to_no_peer(num_ranks: int) -> None:
    """A peer that has not entered the call may still use its memory for the one before."""
    ranks = ReplicatedRanks(num_ranks, small_case(num_experts=2 * num_ranks))
    calls = ranks.calls()
    before = ranks.workspaces[1].buffer[_FLAGS_BYTES:].clone()
    for step in range(calls[0].num_steps):
        for rank, call in enumerate(calls):
            if rank != 1:
                call.reduce(step, step + 1)
    assert torch.equal(ranks.workspaces[1].buffer[_FLAGS_BYTES:], before)
    assert calls[0].y_TH.isnan().all()
