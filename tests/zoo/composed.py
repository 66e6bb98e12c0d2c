"""Random MoE layers of one device, composed from interchangeable ways to write each step.

A `Recipe` says how each step is written; `draw` draws one. Every recipe without a `defect` is a
correct layer, whatever the combination. A defect makes one step wrong.

Legend: T tokens, A experts per token, S = T*A slots, E experts, H model dim, I expert intermediate
dim, N columns of the in-projection.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SCORES: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "softmax, then top-k": lambda logits, a: logits.softmax(-1).topk(a, -1),
    "top-k, then softmax": lambda logits, a: _mapped(logits.topk(a, -1), lambda v: v.softmax(-1)),
    "sigmoid": lambda logits, a: logits.sigmoid().topk(a, -1),
    "renormalised": lambda logits, a: _mapped(
        logits.softmax(-1).topk(a, -1), lambda v: v / v.sum(-1, keepdim=True)
    ),
    "sorted": lambda logits, a: _mapped(
        [part[:, :a] for part in logits.sigmoid().sort(-1, descending=True)], lambda v: 2.5 * v
    ),
    "gathered": lambda logits, a: _gathered(logits, logits.topk(a, -1, sorted=False)[1]),
}


def _mapped(found: object, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    values, ids = found  # type: ignore[misc]
    return change(values), ids


def _gathered(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return logits.softmax(-1).gather(1, ids), ids


_COUNTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "scatter_add": lambda ids_S, e: ids_S.new_zeros(e).scatter_add(
        0, ids_S, torch.ones_like(ids_S)
    ),
    "bincount": lambda ids_S, e: torch.bincount(ids_S, minlength=e),
    "one_hot": lambda ids_S, e: F.one_hot(ids_S, e).sum(0),
    "compare": lambda ids_S, e: (ids_S[:, None] == torch.arange(e)).sum(0),
    "histc": lambda ids_S, e: torch.histc(ids_S.float(), bins=e, min=0, max=e - 1).long(),
}
_ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "argsort": lambda ids_S: torch.argsort(ids_S),
    "stable argsort": lambda ids_S: torch.argsort(ids_S, stable=True),
    "sort": lambda ids_S: torch.sort(ids_S, stable=True)[1],
}
_GATHERS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "divide": lambda x, order_S, a: x[order_S // a],
    "div floor": lambda x, order_S, a: x[torch.div(order_S, a, rounding_mode="floor")],
    "index_select": lambda x, order_S, a: x.index_select(0, order_S // a),
    "repeated": lambda x, order_S, a: x.repeat_interleave(a, 0)[order_S],
    "expanded": lambda x, order_S, a: x[:, None].expand(-1, a, -1).reshape(-1, x.shape[1])[order_S],
    "token numbers": lambda x, order_S, a: x[torch.arange(len(x)).repeat_interleave(a)[order_S]],
    "gather": lambda x, order_S, a: torch.gather(
        x, 0, (order_S // a)[:, None].expand(-1, x.shape[1])
    ),
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "written silu": lambda v: v * torch.sigmoid(v),
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu": F.relu,
}
_PLAIN = {**_ACTIVATIONS, "relu2": lambda v: F.relu(v).square()}
_COMBINES = ("inverse argsort", "inverse scatter", "index_add", "scatter_add", "index_put")
DEFECTS = (
    "counts of the next expert", "starts for ends", "descending order", "next token",
    "weights not sorted", "not brought back", "brought back twice", "rows weighted by place",
    "activation of the sum", "gate of the next row", "bias of the slot's place",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a layer writes each step."""

    scores: str
    counts: str
    order: str
    gather: str
    pairing: str  # "halves", "up first", "interleaved", "separate" or "plain"
    activation: str
    transposed: bool  # weights [E, N, H], multiplied transposed
    biases: bool
    place: str  # where weights multiply: "before", "between", "after", "none"
    wide: bool  # in float32
    combine: str
    num_experts: int
    top_k: int
    defect: str | None = None

    def __str__(self) -> str:
        fields = dataclasses.asdict(self)
        return ", ".join(f"{name}={value}" for name, value in fields.items())


def draw(seed: int, *, defect: bool = False) -> Recipe:
    """Return a random recipe."""
    rng = random.Random(seed)
    pairing = rng.choice(("halves", "up first", "interleaved", "separate", "plain"))
    place = rng.choice(("before", "between", "after", "after", "none"))
    num_experts, top_k = rng.choice((4, 5, 6)), rng.choice((1, 2, 2, 3))
    biases = rng.random() < 0.3
    combine = rng.choice(_COMBINES)
    by_slot = place == "none" or (place == "after" and combine.startswith("inverse"))
    possible = [
        name
        for name in DEFECTS
        if not (name == "weights not sorted" and by_slot)
        and not (name == "gate of the next row" and pairing == "plain")
        and not (name == "bias of the slot's place" and not biases)
    ]
    return Recipe(
        scores=rng.choice(list(_SCORES)),
        counts=rng.choice(list(_COUNTS)),
        order=rng.choice(list(_ORDERS)),
        gather=rng.choice(list(_GATHERS)),
        pairing=pairing,
        activation=rng.choice(list(_PLAIN if pairing == "plain" else _ACTIVATIONS)),
        transposed=rng.random() < 0.5,
        biases=biases,
        place=place,
        wide=rng.random() < 0.4,
        combine=combine,
        num_experts=num_experts,
        top_k=top_k,
        defect=rng.choice(possible) if defect else None,
    )


class ComposedMoE(nn.Module):
    """The layer of a recipe, [T, H] -> [T, H] in bfloat16."""

    def __init__(self, recipe: Recipe, hidden: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.recipe = recipe
        generator = torch.Generator().manual_seed(1)

        def weight(k: int, n: int) -> nn.Parameter:
            shape = (n, k) if recipe.transposed else (k, n)
            values = torch.randn(recipe.num_experts, *shape, generator=generator) * k**-0.5
            return nn.Parameter(values.bfloat16())

        def bias(n: int) -> nn.Parameter | None:
            values = torch.randn(recipe.num_experts, n, generator=generator)
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
        """Route, sort, multiply, activate, multiply, bring back."""
        recipe = self.recipe
        logits = x.float() @ self.gate.T
        weights_TA, ids_TA = _SCORES[recipe.scores](logits, recipe.top_k)
        ids_S = ids_TA.reshape(-1)
        order_S = self._order(ids_S)
        counts_E = _COUNTS[recipe.counts](ids_S, recipe.num_experts)
        if recipe.defect == "counts of the next expert":
            counts_E = counts_E.roll(1, 0)
        offs_E = counts_E.cumsum(0).to(torch.int32)
        if recipe.defect == "starts for ends":
            offs_E = offs_E - counts_E.to(torch.int32)
        weights_S1 = self._by_row(weights_TA, order_S)
        rows_SH = _GATHERS[recipe.gather](x, self._slots(order_S), recipe.top_k)
        if recipe.place == "before":
            rows_SH = self._scaled(rows_SH, weights_S1)
        expert_S = ids_S[order_S] if recipe.defect != "bias of the slot's place" else ids_S
        h_SI = self._hidden(rows_SH, offs_E, expert_S)
        if recipe.place == "between":
            h_SI = self._scaled(h_SI, weights_S1)
        out_SH = self._multiply(h_SI, self.w_out, offs_E)
        if self.b_out is not None:
            out_SH = out_SH + self.b_out[expert_S]
        if recipe.defect == "rows weighted by place":
            out_SH = out_SH * torch.arange(len(out_SH))[:, None].to(out_SH.dtype)
        return self._combine(out_SH, order_S, weights_TA, x)

    def _order(self, ids_S: Tensor) -> Tensor:
        if self.recipe.defect == "descending order":
            return torch.argsort(ids_S, stable=True, descending=True)
        return _ORDERS[self.recipe.order](ids_S)

    def _slots(self, order_S: Tensor) -> Tensor:
        if self.recipe.defect == "next token":
            return (order_S + self.recipe.top_k) % order_S.shape[0]
        return order_S

    def _by_row(self, weights_TA: Tensor, order_S: Tensor) -> Tensor:
        weights_S = weights_TA.reshape(-1)
        if self.recipe.defect != "weights not sorted":
            weights_S = weights_S[order_S]
        return weights_S[:, None]

    def _multiply(self, rows: Tensor, weight: Tensor, offs_E: Tensor) -> Tensor:
        matrix = weight.transpose(1, 2) if self.recipe.transposed else weight
        return torch._grouped_mm(rows, matrix, offs=offs_E)

    def _hidden(self, rows_SH: Tensor, offs_E: Tensor, expert_S: Tensor) -> Tensor:
        recipe = self.recipe
        pre = self._multiply(rows_SH, self.w_in, offs_E)
        if self.b_in is not None:
            pre = pre + self.b_in[expert_S]
        if recipe.defect == "activation of the sum":
            pre = pre.cumsum(0)
        act = _PLAIN[recipe.activation]
        if recipe.pairing == "plain":
            return act(pre)
        if recipe.pairing == "separate":
            up = self._multiply(rows_SH, self.w_up, offs_E)
            if self.b_up is not None:
                up = up + self.b_up[expert_S]
            return act(self._gate(pre)) * up
        if recipe.pairing == "interleaved":
            return act(self._gate(pre[:, ::2])) * pre[:, 1::2]
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
        token_S = place // top_k
        if recipe.combine == "index_add":
            return torch.zeros_like(x).index_add(0, token_S, out_SH)
        if recipe.combine == "index_put":
            return torch.zeros_like(x).index_put((token_S,), out_SH, accumulate=True)
        return torch.zeros_like(x).scatter_add(0, token_S[:, None].expand_as(out_SH), out_SH)

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
