"""In which order the tiles of an all-to-all layer are computed, while rows are on their way.

Rows arrive turn by turn (`exchange_kernels`), tiles belong to experts (`route_tiles`), and an
expert's matrices are best read once. `order_by_turn` is the compromise, again worked out on the
device.

Legend: L experts, M tiles, NB blocks of slots, P turns, E_P experts and one bin for strays, rounded
up to a power of two.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from comet_compile.kernels.launch import full_grid, launch
from comet_compile.kernels.route_tiles import TileRouting, count_bins, count_blocks


@dataclasses.dataclass(frozen=True, eq=False)
class TileOrder:
    """The tiles in the order in which they are computed, [0] by layer0 and [1], from its end
    backwards, by layer1."""

    tile_2M: Tensor  # [2, M] int32
    turn_2M: Tensor  # [2, M] int32, the turn of the i-th tile in that order
    lead_2: Tensor  # [2] int32, how many tiles come in the order of their turns
    scratch: Tensor
    memory: Tensor  # of all of it


def empty_order(
    num_experts: int, num_turns: int, num_tiles: int, device: torch.device,
    memory: Tensor | None = None,
) -> TileOrder:  # fmt: skip
    """Return room for the order of at most `num_tiles` tiles; `memory`: that of another one."""
    sizes = (2 * num_tiles, 2 * num_tiles, 2, num_turns * 10 * count_bins(num_experts))
    if memory is None:
        memory = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    tile_2M, turn_2M, lead_2, scratch = memory.split(sizes)
    return TileOrder(tile_2M.view(2, -1), turn_2M.view(2, -1), lead_2, scratch, memory)


def order_by_turn(
    hist: Tensor,
    num_experts: int,
    num_turns: int,
    routing: TileRouting,
    lead: tuple[float, float],
    order: TileOrder,
) -> None:
    """Fill `order` for the tiles of layer0 and of layer1, each for its part of `lead`.

    The blocks of `hist` [NB, E_P] belong to turns, NB / `num_turns` to each. A tile's turn is that
    of its last row. First comes the part `lead` of all tiles, turn by turn and expert by expert
    (for layer1 of turn 0 only, so maybe fewer): work for the time in which the rows of later turns
    are on their way. Then come the others expert by expert, so that an expert's matrices are read
    once.

    Example with two turns, the experts' tiles being a0 a1 of turn 0, a2 of turn 1, b0 of turn 0,
    b1 b2 of turn 1: lead 0.2 gives a0 a1 | a2 b0 b1 b2; lead 0.5 gives a0 a1 b0 | a2 b1 b2.
    """
    bins = count_bins(num_experts)
    launch(
        order_tiles_kernel,
        full_grid(num_turns, 2),
        hist,
        order.scratch,
        order.tile_2M,
        order.turn_2M,
        order.lead_2,
        hist.shape[0] // bins // num_turns,
        order.tile_2M.shape[1],
        int(lead[0] * 1024),
        int(lead[1] * 1024),
        L=num_experts,
        E_P=bins,
        BM=routing.block_m,
        P=num_turns,
        TILES=max(16, min(128, 8192 // bins)),
        num_warps=8,
    )


@triton.jit
def order_tiles_kernel(
    hist_ptr,  # [NB, E_P]
    tables_ptr,  # [2, P, 5, E_P] scratch
    tile_ptr,  # [2, M]
    turn_ptr,  # [2, M]
    lead_ptr,  # [2]
    blocks_per_turn,
    M,
    first_lead,  # of 1024
    second_lead,
    L: tl.constexpr,
    E_P: tl.constexpr,
    BM: tl.constexpr,
    P: tl.constexpr,
    TILES: tl.constexpr,
):
    """Put the tiles of one turn where they belong. Grid: (turns, 2 orders).

    An expert's rows lie in the order of their turns, so the tiles that end in turns before this
    one are the whole tiles that those rows fill, or all its tiles if it has no more rows. Of an
    expert's tiles, the first ones lead.
    """
    turn, which = tl.program_id(0), tl.program_id(1)
    experts = tl.arange(0, E_P)
    is_expert = experts < L
    count = tl.where(is_expert, count_blocks(hist_ptr, 0, P * blocks_per_turn, E_P), 0)
    tiles = (count + BM - 1) // BM
    num_tiles = tl.sum(tiles, 0)
    lead = (num_tiles * tl.where(which == 0, first_lead, second_lead) + 1023) // 1024

    through = tl.zeros((E_P,), tl.int32)  # rows of the turns so far
    ended = tl.zeros((E_P,), tl.int32)  # tiles that end in them
    num_lead = tl.zeros((E_P,), tl.int32)  # those of them that lead
    ended_before = tl.zeros((E_P,), tl.int32)  # the three for this program's turn
    here = tl.zeros((E_P,), tl.int32)
    place = tl.zeros((E_P,), tl.int32)
    leads = tl.zeros((E_P,), tl.int32)
    for other in range(P):
        through += count_blocks(
            hist_ptr, other * blocks_per_turn, (other + 1) * blocks_per_turn, E_P
        )
        now = tl.where(is_expert, tl.where(through >= count, tiles, through // BM), 0)
        fresh = now - ended
        start = tl.sum(ended, 0) + tl.cumsum(fresh, 0) - fresh  # in the order of turns
        fresh_lead = tl.minimum(tl.maximum(lead - start, 0), fresh)
        # what layer1 leaves for the end must keep no peer's sums waiting
        fresh_lead = tl.where((which == 0) | (other == 0), fresh_lead, 0)
        num_lead += fresh_lead
        mine = (other == turn).to(tl.int32)
        ended_before += mine * ended
        here += mine * fresh
        place += mine * start
        leads += mine * fresh_lead
        ended = now
    others = tiles - num_lead
    rest = tl.sum(num_lead, 0) + tl.cumsum(others, 0) - others + ended_before - num_lead
    end = tl.cumsum(here, 0)
    first_tile = tl.cumsum(tiles, 0) - tiles + ended_before

    tables = tables_ptr + (which * P + turn) * 5 * E_P
    tl.store(tables + experts, end - here)
    tl.store(tables + E_P + experts, first_tile)
    tl.store(tables + 2 * E_P + experts, place)
    tl.store(tables + 3 * E_P + experts, rest)
    tl.store(tables + 4 * E_P + experts, leads)
    tl.debug_barrier()
    num_here = tl.sum(here, 0)
    if turn == 0:
        tl.store(lead_ptr + which, tl.sum(num_lead, 0))
    for first in range(0, num_here, TILES):
        index = first + tl.arange(0, TILES)
        expert = tl.sum((end[None, :] <= index[:, None]).to(tl.int32), 1)
        is_tile = index < num_here
        inside = index - tl.load(tables + expert, mask=is_tile, other=0)
        tile = tl.load(tables + E_P + expert, mask=is_tile, other=0) + inside
        leading = inside < tl.load(tables + 4 * E_P + expert, mask=is_tile, other=0)
        to = tl.load(tables + tl.where(leading, 2, 3) * E_P + expert, mask=is_tile, other=0)
        to += which * M + inside
        tl.store(tile_ptr + to, tile, mask=is_tile)
        tl.store(turn_ptr + to, turn, mask=is_tile)
