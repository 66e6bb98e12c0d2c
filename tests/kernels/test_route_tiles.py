"""Routing tables in Triton's interpreter, against a loop over experts.

Legend: T tokens, A experts per token, L experts, M tiles, R rows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tile_tables import Tables, route_tiles_ref

from comet_compile.kernels.route_tiles import max_tiles, route_tiles
from comet_compile.kernels.routing import sort_slots

pytestmark = pytest.mark.usefixtures("interpreted")


def check(ids_TA: Tensor, num_experts: int, block_m: int) -> Tables:
    routing = route_tiles(ids_TA, num_experts, block_m)
    got = Tables.read(routing)
    assert got == route_tiles_ref(ids_TA, num_experts, block_m)
    assert len(got.expert_M) <= max_tiles(ids_TA.numel(), num_experts, block_m)
    assert routing.slot_R.dtype == torch.int32
    return got


def random_ids(num_tokens: int, top_k: int, low: int, high: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (num_tokens, top_k), generator=generator)


SHAPES = {
    "one_slot": (1, 1, 1, 16),
    "one_token_of_many_experts": (1, 8, 128, 16),
    "more_experts_than_slots": (5, 3, 64, 16),
    "not_whole_tiles": (41, 3, 7, 16),
    "exactly_one_block_of_slots": (256, 2, 5, 32),
    "one_slot_past_a_block": (513, 1, 5, 32),
    "many_blocks_uneven": (450, 3, 60, 64),
    "bins_past_1024": (80, 8, 1030, 16),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("routing", ["random", "strays", "all_to_one"])
def test_tables(shape: str, routing: str) -> None:
    num_tokens, top_k, num_experts, block_m = SHAPES[shape]
    if routing == "strays":
        ids = random_ids(num_tokens, top_k, -3, 2 * num_experts)
        ids[0, 0] = 2**32  # expert 0 in 32 bits
        ids[-1, -1] = -(2**32)
    elif routing == "all_to_one":
        ids = torch.full((num_tokens, top_k), num_experts - 1)
    else:
        ids = random_ids(num_tokens, top_k, 0, num_experts)
    check(ids, num_experts, block_m)


def test_the_example_of_the_docstring() -> None:
    got = check(torch.tensor([[0, 2], [2, 2], [0, 9]]), 3, 2)
    assert got == Tables([0, 4, 1, 2, 3, -1], [0, 2, 3, 4, 1, -1], [0, 2, 2], [0, 2, 4])


@pytest.mark.parametrize("top_k", range(1, 9))
def test_top_k(top_k: int) -> None:
    check(random_ids(19, top_k, -1, 6), 5, 16)


@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_empty_experts_have_no_tile(block_m: int) -> None:
    ids = random_ids(150, 2, 0, 3) * 2  # experts 0, 2 and 4 of 7
    assert set(check(ids, 7, block_m).expert_M) == {0, 2, 4}


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_only_strays(num_blocks: int) -> None:
    ids = torch.full((512 * num_blocks, 1), 4)
    got = check(ids, 4, 16)
    assert got.expert_M == []
    assert got.row_S == [-1] * ids.numel()


def test_no_tokens() -> None:
    routing = route_tiles(torch.empty(0, 4, dtype=torch.int64), 8, 16)
    assert Tables.read(routing) == Tables([], [], [], [])


def test_int32_ids_and_strided_ids() -> None:
    ids = random_ids(37, 4, -1, 9)
    assert check(ids.to(torch.int32), 8, 16) == check(ids, 8, 16)
    assert check(ids.t().contiguous().t(), 8, 16) == check(ids, 8, 16)


def test_rows_without_padding_are_those_of_sort_slots() -> None:
    ids = random_ids(300, 3, -1, 8)
    got = check(ids, 7, 32)
    assert [slot for slot in got.slot_R if slot >= 0] == sort_slots(ids, 7).slot_V.tolist()


@pytest.mark.parametrize(
    ("num_slots", "num_experts", "block_m"), [(40, 3, 16), (5, 9, 16), (64, 4, 16), (17, 1, 16)]
)
def test_the_bound_on_tiles_is_met(num_slots: int, num_experts: int, block_m: int) -> None:
    # one slot for each expert, the rest for expert 0
    ids = torch.zeros(num_slots, 1, dtype=torch.int64)
    ids[: min(num_experts, num_slots), 0] = torch.arange(min(num_experts, num_slots))
    got = check(ids, num_experts, block_m)
    assert len(got.expert_M) == max_tiles(num_slots, num_experts, block_m)
