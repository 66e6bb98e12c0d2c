"""The tables of `route_tiles` as lists, and a plain Python twin of it.

Legend: T tokens, A experts per token, S slots, M tiles, R rows.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from comet_compile.kernels.route_tiles import TileRouting


@dataclasses.dataclass
class Tables:
    """The tables in use, as lists."""

    slot_R: list[int]
    row_S: list[int]
    expert_M: list[int]
    first_row_M: list[int]

    @classmethod
    def read(cls, routing: TileRouting) -> Tables:
        """Copy the tables to the host, without what is past the tiles in use."""
        num_tiles = int(routing.num_tiles)
        return cls(
            routing.slot_R[: num_tiles * routing.block_m].tolist(),
            routing.row_S.tolist(),
            routing.expert_M[:num_tiles].tolist(),
            routing.first_row_M[:num_tiles].tolist(),
        )


def route_tiles_ref(ids_TA: Tensor, num_experts: int, block_m: int) -> Tables:
    """Return what `route_tiles` should, by a loop over slots and one over experts."""
    flat = ids_TA.reshape(-1).tolist()
    slots_of: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(flat):
        if 0 <= expert < num_experts:
            slots_of[expert].append(slot)
    tables = Tables([], [-1] * len(flat), [], [])
    num_routed = 0
    for expert, slots in enumerate(slots_of):
        for start in range(0, len(slots), block_m):
            tables.expert_M.append(expert)
            tables.first_row_M.append(num_routed + start)
            for slot in slots[start : start + block_m]:
                tables.row_S[slot] = len(tables.slot_R)
                tables.slot_R.append(slot)
            tables.slot_R += [-1] * (-len(tables.slot_R) % block_m)
        num_routed += len(slots)
    return tables
