"""Index arithmetic of the portable path: slots sorted by expert, and sums back to tokens.

A *slot* is one (token, choice) pair, numbered ``token * A + choice``. The experts work on rows
sorted by expert; a stable sort keeps the result the same from call to call, and sums back to
tokens run in slot order instead of through atomics for the same reason.

Legend: T tokens, A experts per token, S = T*A slots, V rows the experts work on (V <= S), L
experts, H model dim.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class SortedSlots:
    """The slots of a routing in the order in which the experts see them.

    `slot_V` and `expert_V` [V] say which slot and expert a row belongs to; `ends_L` [L] int32 is
    where each expert's rows end. `exact` says that every row has an expert; otherwise the rows
    from ``ends_L[-1]`` on belong to slots without one (`expert_V` is L there) and hold garbage.
    """

    slot_V: Tensor
    expert_V: Tensor
    ends_L: Tensor
    num_tokens: int
    top_k: int
    exact: bool

    @property
    def num_rows(self) -> int:
        """V, the number of rows."""
        return self.slot_V.shape[0]

    @functools.cached_property
    def token_V(self) -> Tensor:
        """The token of each row."""
        return self.slot_V // self.top_k

    @functools.cached_property
    def host_ends(self) -> list[int]:
        """`ends_L` on the host. Reads the device, so only paths that loop on the host ask."""
        return self.ends_L.tolist()

    @functools.cached_property
    def expert_index_V(self) -> Tensor:
        """`expert_V` made safe to index [L] tables with; rows without an expert read the last."""
        # Also when exact: the "fake" process group delivers ids that nobody sent.
        return self.expert_V.clamp(max=self.ends_L.shape[0] - 1)

    def zero_strays(self, rows: Tensor) -> Tensor:
        """Return `rows` [V] or [V, ...] with the rows that have no expert set to zero."""
        if self.exact:
            return rows
        stray_V = self.expert_V == self.ends_L.shape[0]
        return rows.masked_fill(stray_V.reshape(-1, *[1] * (rows.dim() - 1)), 0)


def sort_slots(ids_TA: Tensor, num_experts: int, num_valid: int | None = None) -> SortedSlots:
    """Sort the slots of `ids_TA` [T, A] by expert, those outside [0, `num_experts`) last.

    `num_valid`, where the host knows it, is the number of ids inside that range: only those
    slots become rows. Otherwise all of them do, unless asking the device costs nothing (CPU).
    """
    num_tokens, top_k = ids_TA.shape
    flat_S = ids_TA.reshape(-1)
    # Before narrowing: a stray id of 2**32 would come out as expert 0.
    stray_S = (flat_S < 0) | (flat_S >= num_experts)
    key_S = flat_S.masked_fill(stray_S, num_experts).to(torch.int32)
    expert_V, slot_V = torch.sort(key_S, stable=True)
    if num_valid is None and ids_TA.device.type == "cpu":
        num_valid = flat_S.shape[0] - int(stray_S.sum())
    if num_valid is not None:
        expert_V, slot_V = expert_V[:num_valid], slot_V[:num_valid]
    return SortedSlots(
        slot_V=slot_V,
        expert_V=expert_V,
        ends_L=_ends(expert_V, num_experts),
        num_tokens=num_tokens,
        top_k=top_k,
        exact=num_valid is not None,
    )


def merge_slots(parts: list[SortedSlots]) -> tuple[SortedSlots, Tensor]:
    """Merge routings over the same experts into one, for sums over rows only.

    Returns the merged slots and `perm_V` [V], the row of ``cat(parts)`` that comes at each
    place. Slot numbers restart in every part, so the result cannot go back to tokens.
    """
    expert_V, perm_V = torch.sort(torch.cat([part.expert_V for part in parts]), stable=True)
    merged = SortedSlots(
        slot_V=perm_V,
        expert_V=expert_V,
        ends_L=_ends(expert_V, parts[0].ends_L.shape[0]),
        num_tokens=sum(part.num_tokens for part in parts),
        top_k=parts[0].top_k,
        exact=all(part.exact for part in parts),
    )
    return merged, perm_V


def sum_by_token(
    rows_VH: Tensor,
    slot_V: Tensor,
    num_tokens: int,
    width: int,
    scale_V: Tensor | None = None,
) -> Tensor:
    """Return [T, H] with ``sum(rows[v] * scale[v])`` over the rows whose ``slot // width`` is t.

    Products are made in the dtype of `scale_V`; the sum is accumulated in slot order in float32
    (float64 when an operand is) and returned in that dtype.
    """
    wide = rows_VH.dtype == torch.float64 or (
        scale_V is not None and scale_V.dtype == torch.float64
    )
    dtype = torch.float64 if wide else torch.float32
    num_rows, hidden = rows_VH.shape
    if num_rows == 0:
        return rows_VH.new_zeros(num_tokens, hidden, dtype=dtype)
    # Rows in slot order: the rows of a token lie side by side.
    order_V = torch.argsort(slot_V)
    rows_VH = rows_VH.index_select(0, order_V)
    if scale_V is not None:
        rows_VH = rows_VH.to(scale_V.dtype) * scale_V.index_select(0, order_V).unsqueeze(1)
    if num_rows == num_tokens * width:
        return rows_VH.view(num_tokens, width, hidden).sum(1, dtype=dtype)
    lengths_T = torch.zeros(num_tokens, dtype=torch.int64, device=slot_V.device)
    lengths_T.scatter_add_(0, slot_V // width, torch.ones_like(slot_V))
    return _segment_sum(rows_VH.to(dtype), lengths_T)


def sum_by_expert(rows_VN: Tensor, slots: SortedSlots) -> Tensor:
    """Return [L, N], the sum of each expert's rows, in the dtype of `rows_VN`."""
    dtype = torch.float64 if rows_VN.dtype == torch.float64 else torch.float32
    num_experts = slots.ends_L.shape[0]
    if slots.num_rows == 0:
        return rows_VN.new_zeros(num_experts, rows_VN.shape[1])
    # A last segment takes the rows without an expert.
    bounds = torch.nn.functional.pad(slots.ends_L.long(), (1, 1))
    bounds[-1] = slots.num_rows
    sums = _segment_sum(rows_VN.to(dtype), bounds.diff())
    return sums[:num_experts].to(rows_VN.dtype)


def _segment_sum(rows: Tensor, lengths: Tensor) -> Tensor:
    # unsafe: the checks read the device, and the lengths sum to the rows by construction
    return torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)


def _ends(expert_V: Tensor, num_experts: int) -> Tensor:
    experts_L = torch.arange(num_experts, dtype=torch.int32, device=expert_V.device)
    return torch.searchsorted(expert_V, experts_L, right=True, out_int32=True)
