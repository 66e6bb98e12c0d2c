"""Composed layers whose experts' rows are padded, in slots of a capacity, or on other ranks.

`compose` makes the layer of a recipe. Legend as in `composed`; P ranks (in `Padded`: padded rows),
L = E / P experts of a rank, R rows that it receives, C rows of an expert.
"""

from __future__ import annotations

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from zoo.composed import ComposedMoE
from zoo.ep import all_to_all_rows, process_group
from zoo.recipes import Recipe


class Padded(ComposedMoE):
    """torchtitan's padding: -1 among the row numbers picks a row of zeros that is appended."""

    align = 4

    def all_experts(
        self, rows_SH: Tensor, weights_S1: Tensor, expert_S: Tensor, counts_E: Tensor
    ) -> Tensor:
        """As of the sorted rows."""
        recipe, num_rows = self.recipe, rows_SH.shape[0]
        place_S, offs_E = self._padded(counts_E, num_rows)
        room = num_rows + self.align * recipe.num_experts
        row_P = torch.full((room,), -1).scatter(0, place_S, torch.arange(num_rows))
        rows_PH, weights_P1, expert_P = (
            torch.cat([value, value.new_zeros(1, *value.shape[1:])])[row_P]
            for value in (rows_SH, weights_S1, expert_S)
        )
        if recipe.biases:
            # rows behind all ends would have gradients that nobody has written
            offs_E = torch.cat([offs_E[:-1], offs_E.new_full((1,), room)])
        out_PH = self.experts(rows_PH, weights_P1, expert_P, offs_E)
        if recipe.way == "read back":
            return out_PH[place_S]
        if recipe.defect == "pads overwrite a row":
            row_P = row_P.clamp(min=0)
        unpadded = out_PH.new_zeros(num_rows + 1, out_PH.shape[1])
        if recipe.way == "added":
            return unpadded.index_add(0, row_P % (num_rows + 1), out_PH)[:-1]
        return unpadded.index_put((row_P,), out_PH)[:-1]

    def _padded(self, counts_E: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return (padded place of every row, where each expert's padded rows end)."""
        defect = self.recipe.defect
        more = 0 if defect == "padded down" else self.align - 1
        padded_E = ((counts_E + more) // self.align * self.align).clamp(min=self.align)
        first_E = padded_E.cumsum(0) - padded_E
        starts_E = counts_E.cumsum(0) - counts_E
        segment_S = torch.arange(len(counts_E)).repeat_interleave(counts_E, output_size=num_rows)
        place_S = torch.arange(num_rows)
        if defect != "rows moved to no gaps":
            place_S = place_S + (first_E - starts_E)[segment_S]
        return place_S, self._ends(counts_E if defect == "ends without pads" else padded_E)


class Capacity(ComposedMoE):
    """Every expert has C slots; a token that comes later is dropped."""

    def routed(self, x: Tensor, weights_TA: Tensor, ids_TA: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        recipe, (num_tokens, hidden) = self.recipe, x.shape
        if recipe.way == "choices first":
            ids_S, weights_S = ids_TA.t().reshape(-1), weights_TA.t().reshape(-1)
            token_S = torch.arange(num_tokens).repeat(recipe.top_k)
        else:
            ids_S, weights_S = ids_TA.reshape(-1), weights_TA.reshape(-1)
            token_S = torch.arange(num_tokens).repeat_interleave(recipe.top_k)
        capacity = max(2, 3 * num_tokens * recipe.top_k // (4 * recipe.num_experts))
        kept_S, slot_S = self._slot_of(ids_S, capacity)
        num_slots = capacity * recipe.num_experts
        rows = self._dispatch(x, self._token(token_S), slot_S, num_slots)
        rows = rows.view(recipe.num_experts, capacity, hidden)
        weights = weights_S.new_zeros(num_slots + 1).scatter(0, slot_S, weights_S)
        weights = weights[:-1].view(recipe.num_experts, capacity, 1)
        if recipe.place == "before":
            rows = self._scaled(rows, weights)
        out = self.experts(rows, weights, None, None).reshape(num_slots, hidden)
        if recipe.way == "masked":
            back_SH = out[slot_S.clamp(max=num_slots - 1)]
            if recipe.defect != "dropped rows count":
                back_SH = back_SH * kept_S[:, None].to(x.dtype)
        else:
            back_SH = torch.cat([out, out.new_zeros(1, hidden)])[slot_S]
        if recipe.place == "after":
            back_SH = self._scaled(back_SH, weights_S[:, None])
        if not recipe.combine.startswith("inverse"):
            return self._sum(back_SH, token_S, x)
        if recipe.way == "choices first":
            return back_SH.view(recipe.top_k, num_tokens, hidden).sum(0)
        return back_SH.view(num_tokens, recipe.top_k, hidden).sum(1)

    def _slot_of(self, ids_S: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """Return (who is kept, the slot of every choice, one behind all others for no slot)."""
        recipe = self.recipe
        mask_SE = F.one_hot(ids_S, recipe.num_experts)
        place_S = ((mask_SE.cumsum(0) - 1) * mask_SE).sum(-1)
        kept_S = place_S < capacity + (recipe.defect == "one row too many")
        if recipe.defect == "dropped in another order":
            kept_S = kept_S.view(recipe.top_k, -1).t().reshape(-1)
        if recipe.defect == "dropped rows overwrite":
            return kept_S, ids_S * capacity + place_S.clamp(max=capacity - 1)
        nowhere = recipe.num_experts * capacity
        return kept_S, torch.where(kept_S, ids_S * capacity + place_S, nowhere)

    def _token(self, token_S: Tensor) -> Tensor:
        return token_S.roll(1, 0) if self.recipe.defect == "next token" else token_S

    def _dispatch(self, x: Tensor, token_S: Tensor, slot_S: Tensor, num_slots: int) -> Tensor:
        num_tokens, hidden = x.shape
        if self.recipe.way == "written by slot":
            return x.new_zeros(num_slots + 1, hidden).index_put((slot_S,), x[token_S])[:-1]
        source = torch.full((num_slots + 1,), num_tokens).scatter(0, slot_S, token_S)[:-1]
        return torch.cat([x, x.new_zeros(1, hidden)])[source]


class Exchanged(ComposedMoE):
    """Experts of two ranks: counts and rows go to the rank of their expert, results come home."""

    num_ranks = 2

    def all_experts(
        self, rows_SH: Tensor, weights_S1: Tensor, expert_S: Tensor, counts_E: Tensor
    ) -> Tensor:
        """As of the sorted rows, of which each rank has its own."""
        defect = self.recipe.defect
        sent_PL = counts_E.view(self.num_ranks, -1)
        group = process_group(None)
        received_PL = funcol.wait_tensor(funcol.all_to_all_single(sent_PL, None, None, group))
        send, receive = sent_PL.sum(1).tolist(), received_PL.sum(1).tolist()
        rows_RH = all_to_all_rows(rows_SH, receive, send, None)
        local_E = torch.arange(self.num_local).repeat(self.num_ranks)
        if defect == "sorted by rank":
            local_E = torch.arange(self.num_local).repeat_interleave(self.num_ranks)
        expert_R = local_E.repeat_interleave(received_PL.reshape(-1), output_size=sum(receive))
        order_R = torch.argsort(expert_R, stable=True)
        weights_R1 = weights_S1
        if self.recipe.place == "between":
            weights_R1 = all_to_all_rows(weights_S1, receive, send, None)[order_R]
        counts_L = (sent_PL if defect == "counts that were sent" else received_PL).sum(0)
        out_RH = self.experts(rows_RH[order_R], weights_R1, expert_R[order_R], self._ends(counts_L))
        home = (receive, send) if defect == "splits swapped" else (send, receive)
        return all_to_all_rows(self._unsorted(out_RH, order_R), *home, None)

    def _unsorted(self, out_RH: Tensor, order_R: Tensor) -> Tensor:
        if self.recipe.defect == "home unsorted":
            return out_RH
        if self.recipe.defect == "home sorted twice":
            return out_RH[order_R]
        if self.recipe.way == "argsort":
            return out_RH[torch.argsort(order_R)]
        if self.recipe.way == "index_copy":
            return torch.zeros_like(out_RH).index_copy(0, order_R, out_RH)
        rows = torch.arange(order_R.shape[0])
        return out_RH[torch.empty_like(order_R).scatter_(0, order_R, rows)]


_LAYOUTS = {
    "sorted": ComposedMoE,
    "padded": Padded,
    "capacity": Capacity,
    "exchanged": Exchanged,
}


def compose(recipe: Recipe, hidden: int) -> ComposedMoE:
    """Return the layer of a recipe."""
    return _LAYOUTS[recipe.layout](recipe, hidden)
