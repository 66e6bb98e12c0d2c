"""Random MoE layers with their rows sorted by expert; `composed_layouts` has the other layouts.

Legend: T tokens, A experts per token, S = T*A slots, E experts, H model dim, I expert intermediate
dim, N columns of the in-projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo import recipes
from zoo.recipes import Recipe


class ComposedMoE(nn.Module):
    """The layer of a recipe, [T, H] -> [T, H] in bfloat16."""

    num_ranks = 1

    def __init__(self, recipe: Recipe, hidden: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.recipe = recipe
        self.num_local = recipe.num_experts // self.num_ranks
        generator = torch.Generator().manual_seed(1)

        def weight(k: int, n: int) -> nn.Parameter:
            shape = (n, k) if recipe.transposed else (k, n)
            values = torch.randn(self.num_local, *shape, generator=generator) * k**-0.5
            return nn.Parameter(values.bfloat16())

        def bias(n: int) -> nn.Parameter | None:
            values = torch.randn(self.num_local, n, generator=generator)
            return nn.Parameter(values.bfloat16()) if recipe.biases else None

        gated = recipe.pairing != "plain"
        separate = recipe.pairing == "separate"
        columns = 2 * inner if gated and not separate else inner
        self.gate = nn.Parameter(torch.randn(recipe.num_experts, hidden, generator=generator))
        self.w_in, self.w_out = weight(hidden, columns), weight(inner, hidden)
        self.w_up = weight(hidden, inner) if separate else None
        self.b_in, self.b_out = bias(columns), bias(hidden)
        self.b_up = bias(inner) if separate else None

    def forward(self, x: Tensor) -> Tensor:
        """Route, bring to the experts, multiply, activate, multiply, bring back."""
        logits = x.float() @ self.gate.T
        return self.routed(x, *recipes.SCORES[self.recipe.scores](logits, self.recipe.top_k))

    def routed(self, x: Tensor, weights_TA: Tensor, ids_TA: Tensor) -> Tensor:
        """Sort, let the experts compute, bring back."""
        recipe = self.recipe
        ids_S = ids_TA.reshape(-1)
        order_S = self._order(ids_S)
        counts_E = recipes.COUNTS[recipe.counts](ids_S, recipe.num_experts)
        if recipe.defect == "counts of the next expert":
            counts_E = counts_E.roll(1, 0)
        weights_S1 = self._by_row(weights_TA, order_S)
        rows_SH = recipes.GATHERS[recipe.gather](x, self._slots(order_S), recipe.top_k)
        if recipe.place == "before":
            rows_SH = self._scaled(rows_SH, weights_S1)
        expert_S = ids_S[order_S] if recipe.defect != "bias of the slot's place" else ids_S
        out_SH = self.all_experts(rows_SH, weights_S1, expert_S, counts_E)
        if recipe.defect == "rows weighted by place":
            out_SH = out_SH * torch.arange(len(out_SH))[:, None].to(out_SH.dtype)
        return self._combine(out_SH, order_S, weights_TA, x)

    def all_experts(
        self, rows_SH: Tensor, weights_S1: Tensor, expert_S: Tensor, counts_E: Tensor
    ) -> Tensor:
        """Rows of x to rows of the output, both sorted by expert."""
        return self.experts(rows_SH, weights_S1, expert_S, self._ends(counts_E))

    def experts(
        self, rows: Tensor, weights: Tensor, expert: Tensor | None, offs: Tensor | None
    ) -> Tensor:
        """The products of rows [R, H] up to `offs`, or without it of slots [E, C, H]."""
        hidden = self._hidden(rows, expert, offs)
        if self.recipe.place == "between":
            hidden = self._scaled(hidden, weights)
        return self._multiply(hidden, self.w_out, self.b_out, expert, offs)

    def _order(self, ids_S: Tensor) -> Tensor:
        if self.recipe.defect == "descending order":
            return torch.argsort(ids_S, stable=True, descending=True)
        return recipes.ORDERS[self.recipe.order](ids_S)

    def _slots(self, order_S: Tensor) -> Tensor:
        if self.recipe.defect == "next token":
            return (order_S + self.recipe.top_k) % order_S.shape[0]
        return order_S

    def _by_row(self, weights_TA: Tensor, order_S: Tensor) -> Tensor:
        weights_S = weights_TA.reshape(-1)
        if self.recipe.defect != "weights not sorted":
            weights_S = weights_S[order_S]
        return weights_S[:, None]

    def _ends(self, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0)
        return (ends - counts if self.recipe.defect == "starts for ends" else ends).to(torch.int32)

    def _multiply(
        self,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        expert: Tensor | None,
        offs: Tensor | None,
    ) -> Tensor:
        matrix = weight.transpose(1, 2) if self.recipe.transposed else weight
        out = (
            torch.bmm(rows, matrix) if offs is None else torch._grouped_mm(rows, matrix, offs=offs)
        )
        if bias is None:
            return out
        return out + (bias[:, None] if expert is None else bias[expert])

    def _hidden(self, rows: Tensor, expert: Tensor | None, offs: Tensor | None) -> Tensor:
        recipe = self.recipe
        pre = self._multiply(rows, self.w_in, self.b_in, expert, offs)
        if recipe.defect == "activation of the sum":
            pre = pre.cumsum(0)
        act = recipes.PLAIN[recipe.activation]
        if recipe.pairing == "plain":
            return act(pre)
        if recipe.pairing == "separate":
            return act(self._gate(pre)) * self._multiply(rows, self.w_up, self.b_up, expert, offs)
        if recipe.pairing == "interleaved":
            return act(self._gate(pre[..., ::2])) * pre[..., 1::2]
        first, second = pre.chunk(2, -1)
        if recipe.pairing == "up first":
            first, second = second, first
        return act(self._gate(first)) * second

    def _gate(self, gate: Tensor) -> Tensor:
        return gate.roll(1, 0) if self.recipe.defect == "gate of the next row" else gate

    def _scaled(self, rows: Tensor, weights: Tensor) -> Tensor:
        if self.recipe.wide:
            return (rows.float() * weights.float()).to(rows.dtype)
        return rows * weights.to(rows.dtype)

    def _combine(self, out_SH: Tensor, order_S: Tensor, weights_TA: Tensor, x: Tensor) -> Tensor:
        recipe, top_k = self.recipe, self.recipe.top_k
        place = self._places(order_S)
        if recipe.combine.startswith("inverse"):
            slots_TAH = out_SH[place].view(-1, top_k, x.shape[1])
            if recipe.place == "after":
                slots_TAH = self._scaled(slots_TAH, weights_TA[:, :, None])
            return slots_TAH.sum(1)
        if recipe.place == "after":
            out_SH = self._scaled(out_SH, self._by_row(weights_TA, order_S))
        return self._sum(out_SH, place // top_k, x)

    def _sum(self, rows_SH: Tensor, token_S: Tensor, x: Tensor) -> Tensor:
        """Add rows up by token, which may be the token of several rows."""
        if self.recipe.combine == "index_add":
            return torch.zeros_like(x).index_add(0, token_S, rows_SH)
        if self.recipe.combine == "index_put":
            return torch.zeros_like(x).index_put((token_S,), rows_SH, accumulate=True)
        return torch.zeros_like(x).scatter_add(0, token_S[:, None].expand_as(rows_SH), rows_SH)

    def _places(self, order_S: Tensor) -> Tensor:
        """Return the row of every slot, or for sums by token the slot of every row."""
        by_row = not self.recipe.combine.startswith("inverse")
        if self.recipe.defect == "not brought back":
            return torch.arange(order_S.shape[0]) if by_row else order_S
        if by_row:
            return order_S[order_S] if self.recipe.defect == "brought back twice" else order_S
        if self.recipe.combine == "inverse argsort":
            inverse_S = torch.argsort(order_S)
        else:
            rows = torch.arange(order_S.shape[0])
            inverse_S = torch.empty_like(order_S).scatter_(0, order_S, rows)
        return inverse_S[inverse_S] if self.recipe.defect == "brought back twice" else inverse_S
