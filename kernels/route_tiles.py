"""Which token row goes to which tile of which expert, worked out on the device.

The expert GEMMs run on tiles of `block_m` rows, each of one expert. `route_tiles` sorts the slots
of a routing by expert, stable in slot order, and pads every expert's rows to whole tiles. Nothing
is read on the host, so sizes are bounds: ``max_tiles(S, L, block_m)`` tiles, of which the first
`num_tiles` are in use. The same ids give the same tables, bit for bit.

Example with block_m = 2, three experts, ids [[0, 2], [2, 2], [0, 9]] (9 is a stray id)::

    slot of row   0  4 | 1  2 | 3 -1        row of slot   0  2  3  4  1 -1
    expert of tile  0      2      2         num_tiles     3      first_row  0  2  4
    end_tile  1  1  3

Legend: T tokens, A experts per token, S = T*A slots, L experts, M tiles, R = M * block_m rows, NB
blocks of slots, E_P experts and one bin for strays, rounded up to a power of two.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from comet_compile.kernels.launch import div_up, full_grid, launch, power_of_2

_SLOTS_PER_BLOCK = 512


@dataclasses.dataclass(frozen=True, eq=False)
class TileRouting:
    """The tables of one routing. Rows and tiles past `num_tiles` hold garbage."""

    slot_R: Tensor  # [R] int32, the slot of each row, -1 for padding
    row_S: Tensor  # [S] int32, the row of each slot, -1 for a stray id
    expert_M: Tensor  # [M] int32, the expert of each tile
    first_row_M: Tensor  # [M] int32, where the tile's rows begin if nothing is padded
    num_tiles: Tensor  # [1] int32
    totals: Tensor  # [2] int32, num_tiles and the number of slots that have a row
    end_tile_L: Tensor  # [L] int32, where the tiles of each expert end
    arrive: Tensor  # int32 zeros, counters for `sync.keep_pace`
    block_m: int
    memory: Tensor  # of all tables; `totals` come first

    def with_rows(self, num_rows: int) -> TileRouting:
        """Return the tables for work on `num_rows` rows at most, which all in use must be among."""
        return dataclasses.replace(self, slot_R=self.slot_R[:num_rows])


def max_tiles(num_slots: int, num_experts: int, block_m: int) -> int:
    """Return the most tiles that any routing of `num_slots` slots can need."""
    # every expert in use may leave a part of a tile empty
    experts = min(num_experts, num_slots)
    return (num_slots - experts) // block_m + experts


def route_tiles(
    ids_TA: Tensor, num_experts: int, block_m: int, num_arrivals: int = 0
) -> TileRouting:
    """Return the tables for int32 or int64 `ids_TA` [T, A]; ids outside [0, L) get no row."""
    num_slots = ids_TA.numel()
    flat_S = ids_TA.reshape(-1)
    routing = empty_routing(num_slots, num_experts, block_m, ids_TA.device, num_arrivals)
    if num_slots == 0:
        routing.totals.zero_()
        routing.end_tile_L.zero_()
        return routing
    bins, block = count_bins(num_experts), slots_per_block(num_slots)
    num_blocks = div_up(num_slots, block)
    hist = routing.row_S.new_empty(num_blocks * bins)
    if num_blocks > 1:
        launch(
            count_slots_kernel,
            full_grid(num_blocks),
            flat_S,
            hist,
            num_slots,
            L=num_experts,
            E_P=bins,
            BLOCK=block,
            num_warps=4,
        )
    place_slots(flat_S, hist, num_experts, block, routing)
    return routing


def empty_routing(
    num_slots: int,
    num_experts: int,
    block_m: int,
    device: torch.device,
    num_arrivals: int = 0,
    memory: Tensor | None = None,
) -> TileRouting:
    """Return tables to be filled for any routing of that many slots.

    `memory`: that of tables of the same sizes, which may be filled already.
    """
    num_tiles = max_tiles(num_slots, num_experts, block_m)
    # one allocation, cut where addresses stay multiples of 16 bytes
    sizes = (2, num_tiles * block_m, num_slots, num_tiles, num_tiles, num_experts, num_arrivals)
    padded = [-(-size // 4) * 4 for size in sizes]
    if memory is None:
        memory = torch.empty(sum(padded), dtype=torch.int32, device=device)
    totals, slot_R, row_S, expert_M, first_row_M, ends, arrive = memory.split(padded)
    return TileRouting(
        slot_R,
        row_S[:num_slots],
        expert_M,
        first_row_M,
        totals[:1],
        totals[:2],
        ends[:num_experts],
        arrive[:num_arrivals],
        block_m,
        memory,
    )


def count_bins(num_experts: int) -> int:
    """Return E_P."""
    return power_of_2(num_experts + 1)


def slots_per_block(num_slots: int) -> int:
    """Return how many slots a program of the tables' kernels takes."""
    return min(_SLOTS_PER_BLOCK, max(16, power_of_2(num_slots)))


def place_slots(
    ids_S: Tensor,
    hist: Tensor,
    num_experts: int,
    block: int,
    routing: TileRouting,
) -> None:
    """Fill `routing` for `ids_S` [S] and the counts `hist` [NB, E_P] of its blocks."""
    num_slots, bins = ids_S.shape[0], count_bins(num_experts)
    num_blocks = div_up(num_slots, block)
    launch(
        place_slots_kernel,
        full_grid(num_blocks),
        ids_S,
        hist,
        hist.new_empty(num_blocks * 4 * bins),
        routing.slot_R,
        routing.row_S,
        routing.expert_M,
        routing.first_row_M,
        routing.totals,
        routing.end_tile_L,
        routing.arrive,
        routing.arrive.shape[0],
        num_slots,
        num_blocks,
        L=num_experts,
        E_P=bins,
        BLOCK=block,
        BM=routing.block_m,
        ONE_BLOCK=num_blocks == 1,
        PIECE=1024,
        TILES=16,
        num_warps=8,
    )


@triton.jit
def _expert_bins(ids_ptr, offs, num_slots, L: tl.constexpr, E_P: tl.constexpr):
    """Return the bins of slots: the expert, L for stray ids, E_P past the end."""
    ids = tl.load(ids_ptr + offs, mask=offs < num_slots, other=0)
    # compared before narrowing: a stray id of 2**32 would come out as expert 0
    bins = tl.where((ids >= 0) & (ids < L), ids, L).to(tl.int32)
    return tl.where(offs < num_slots, bins, E_P)


@triton.jit
def count_slots_kernel(
    ids_ptr,  # [S]
    hist_ptr,  # [NB, E_P]
    num_slots,
    L: tl.constexpr,
    E_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the slots of each expert in each block of slots. Grid: one program per block."""
    block = tl.program_id(0)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    bins = _expert_bins(ids_ptr, offs, num_slots, L, E_P)
    # past the end counts as stray: that bin is never used
    hist = tl.histogram(tl.minimum(bins, L), E_P)
    tl.store(hist_ptr + block * E_P + tl.arange(0, E_P), hist)


@triton.jit
def place_slots_kernel(
    ids_ptr,  # [S]
    hist_ptr,  # [NB, E_P]
    tables_ptr,  # [NB, 4, E_P] scratch
    slot_R_ptr,
    row_S_ptr,
    expert_M_ptr,
    first_row_M_ptr,
    totals_ptr,
    end_tile_L_ptr,
    arrive_ptr,  # set to zero
    num_arrivals,
    num_slots,
    num_blocks,
    L: tl.constexpr,
    E_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Give every slot its row, and every tile its expert. Grid: one program per block of slots.

    Each program adds up the counts of all blocks for the experts' first rows, and those of the
    blocks in front of it for its own places; inside the block, slots are sorted by expert.
    ONE_BLOCK: there is only this block, `hist` is not read.
    Padding is written PIECE rows at a time, the tiles' table TILES at a time.
    """
    block = tl.program_id(0)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    bins = _expert_bins(ids_ptr, offs, num_slots, L, E_P)

    experts = tl.arange(0, E_P)
    count = tl.zeros((E_P,), tl.int32)
    before = tl.zeros((E_P,), tl.int32)
    if ONE_BLOCK:
        count += tl.histogram(tl.minimum(bins, L), E_P)
    else:
        before += count_blocks(hist_ptr, 0, block, E_P)
        count += before + count_blocks(hist_ptr, block, num_blocks, E_P)
    count = tl.where(experts < L, count, 0)
    tiles = (count + BM - 1) // BM
    end_tile = tl.cumsum(tiles, 0)
    first_tile = end_tile - tiles
    first_row = tl.cumsum(count, 0) - count
    num_tiles = tl.sum(tiles, 0)

    # Look-up tables by expert, through memory: registers cannot be indexed. Every program writes
    # and reads its own, so a barrier of the program is enough.
    if ONE_BLOCK:
        own = tl.histogram(tl.minimum(bins, L), E_P)
    else:
        own = tl.load(hist_ptr + block * E_P + experts)
    tables = tables_ptr + block * 4 * E_P
    tl.store(tables + experts, first_tile * BM + before - (tl.cumsum(own, 0) - own))
    tl.store(tables + E_P + experts, first_tile)
    tl.store(tables + 2 * E_P + experts, first_row)
    tl.store(tables + 3 * E_P + experts, count)
    tl.debug_barrier()

    # sorted by bin, and inside a bin by place
    order = tl.sort(bins * BLOCK + tl.arange(0, BLOCK))
    bins = order // BLOCK
    slot = block * BLOCK + order % BLOCK
    routed = bins < L
    row = tl.load(tables + bins, mask=routed, other=0) + tl.arange(0, BLOCK)
    row = tl.where(routed, row, -1)
    tl.store(row_S_ptr + slot, row, mask=slot < num_slots)
    tl.store(slot_R_ptr + row, slot, mask=routed)

    # The rest is shared out: the rows of padding, and the tiles.
    if block == 0:
        tl.store(totals_ptr, num_tiles)
        tl.store(totals_ptr + 1, tl.sum(count, 0))
        tl.store(end_tile_L_ptr + experts, end_tile, mask=experts < L)
    for first in range(block * PIECE, num_arrivals, num_blocks * PIECE):
        piece = first + tl.arange(0, PIECE)
        tl.store(arrive_ptr + piece, tl.zeros_like(piece), mask=piece < num_arrivals)
    for first in range(block * PIECE, L * BM, num_blocks * PIECE):
        piece = first + tl.arange(0, PIECE)
        expert = piece // BM
        is_expert = expert < L
        rows = tl.load(tables + 3 * E_P + expert, mask=is_expert, other=0)
        tile = tl.load(tables + E_P + expert, mask=is_expert, other=0)
        padding = rows + piece % BM
        is_padding = is_expert & (padding < (rows + BM - 1) // BM * BM)
        tl.store(slot_R_ptr + tile * BM + padding, tl.full((PIECE,), -1, tl.int32), mask=is_padding)
    for first in range(block * TILES, num_tiles, num_blocks * TILES):
        tile = first + tl.arange(0, TILES)
        expert = tl.sum((end_tile[None, :] <= tile[:, None]).to(tl.int32), 1)
        is_tile = tile < num_tiles
        start = tl.load(tables + 2 * E_P + expert, mask=is_tile, other=0)
        inside = tile - tl.load(tables + E_P + expert, mask=is_tile, other=0)
        tl.store(expert_M_ptr + tile, expert, mask=is_tile)
        tl.store(first_row_M_ptr + tile, start + inside * BM, mask=is_tile)


@triton.jit
def count_blocks(hist_ptr, first, last, E_P: tl.constexpr):
    """Return [E_P], the slots of each expert in blocks first .. last - 1."""
    CHUNK: tl.constexpr = 8192 // E_P if E_P < 2048 else 4
    experts = tl.arange(0, E_P)
    count = tl.zeros((E_P,), tl.int32)
    for start in range(first, last, CHUNK):
        blocks = start + tl.arange(0, CHUNK)
        counts = tl.load(
            hist_ptr + blocks[:, None] * E_P + experts[None, :],
            mask=(blocks < last)[:, None],
            other=0,
        )
        count += tl.sum(counts, 0)
    return count
