"""Layers in which every expert has room for C rows and drops the tokens beyond, and near-misses.

`Capacity` has the router and matrices of `AllExperts`, and does what DeepSpeed, Tutel and
Megatron-Core do, on one device: a token's place among its expert's rows comes from a running sum,
places of C and more are dropped, and the rows are padded to [E, C, H], so that batched products can
take them. `REWRITTEN` lists what the pass must rewrite,
`REFUSED` what it must not, each with the reason.

T tokens, A experts per token, S = T * A slots, E experts, C rows of an expert, H model dim, I
expert intermediate dim, N = 2I columns of gate and up side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.all_experts import AllExperts


class Capacity(AllExperts):
    """[T, H] both ways; first choices come first, so they are the last to be dropped."""

    choices_first = True
    eighths = 6  # of an equal share that an expert has room for

    def capacity(self, num_tokens: int) -> int:
        return max(2, self.eighths * num_tokens * self.top_k // (8 * self.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        weights_TA, ids_TA = self.route(x)
        num_tokens = x.shape[0]
        capacity = self.capacity(num_tokens)
        ids_S = (ids_TA.t() if self.choices_first else ids_TA).reshape(-1)
        place_S = self.places(ids_S, weights_TA)
        kept_S = place_S < capacity
        slot_S = self.slots(ids_S, place_S, kept_S, capacity)
        token_S = torch.arange(num_tokens, device=x.device)
        if self.choices_first:
            token_S = token_S.repeat(self.top_k)
        else:
            token_S = token_S.repeat_interleave(self.top_k, output_size=ids_S.shape[0])
        rows_ECH = self.dispatch(x, token_S, slot_S, capacity)
        out_ECH = self.experts(rows_ECH)
        return self.combine(out_ECH, slot_S, kept_S, weights_TA).to(x.dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights_TA, ids_TA = torch.topk((x @ self.router.T).float().softmax(-1), self.top_k, dim=1)
        return weights_TA.to(x.dtype), ids_TA

    def places(self, ids_S: Tensor, weights_TA: Tensor) -> Tensor:
        """Return the place of each slot among those of its expert."""
        mask_SE = F.one_hot(ids_S, self.num_experts)
        return ((mask_SE.cumsum(0) - 1) * mask_SE).sum(-1)

    def slots(self, ids_S: Tensor, place_S: Tensor, kept_S: Tensor, capacity: int) -> Tensor:
        """Return each slot's row among all experts' [E * C], one behind them if it has none."""
        return torch.where(kept_S, ids_S * capacity + place_S, self.num_experts * capacity)

    def dispatch(self, x: Tensor, token_S: Tensor, slot_S: Tensor, capacity: int) -> Tensor:
        num_tokens, hidden = x.shape
        nobody = torch.full((self.num_experts * capacity + 1,), num_tokens, device=x.device)
        source = nobody.scatter(0, slot_S, token_S)[:-1]
        padded = torch.cat([x, x.new_zeros(1, hidden)])
        return padded.index_select(0, source).view(self.num_experts, capacity, hidden)

    def experts(self, rows_ECH: Tensor) -> Tensor:
        gate, up = torch.bmm(rows_ECH, self.w_in_EHN).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, self.w_out_EIH)

    def combine(
        self, out_ECH: Tensor, slot_S: Tensor, kept_S: Tensor, weights_TA: Tensor
    ) -> Tensor:
        hidden = out_ECH.shape[-1]
        rows = torch.cat([out_ECH.reshape(-1, hidden), out_ECH.new_zeros(1, hidden)])
        taken = rows.index_select(0, slot_S)
        if self.choices_first:
            taken = taken.view(self.top_k, -1, hidden)
            return (taken * weights_TA.t().unsqueeze(-1)).sum(0)
        return (taken.view(-1, self.top_k, hidden) * weights_TA.unsqueeze(-1)).sum(1)


class TokensFirst(Capacity):
    """All choices of a token come before those of the next."""

    choices_first = False


class OneChoice(Capacity):
    """Top-1, as Switch transformers."""

    def __init__(self, **shape: int) -> None:
        super().__init__(**{"top_k": 1, **shape})


class Roomy(Capacity):
    """Room for all tokens at one expert: none is ever dropped."""

    def capacity(self, num_tokens: int) -> int:
        return num_tokens


class HeaviestFirst(TokensFirst):
    """Those with the largest weights are the last to be dropped, as Megatron-Core's "probs"."""

    def places(self, ids_S: Tensor, weights_TA: Tensor) -> Tensor:
        order_S = torch.argsort(weights_TA.reshape(-1), descending=True, stable=True)
        place_S = super().places(ids_S[order_S], weights_TA)
        return torch.zeros_like(place_S).scatter(0, order_S, place_S)


class MaskedWeights(TokensFirst):
    """Dropped slots read a row of others, with weight zero."""

    def combine(
        self, out_ECH: Tensor, slot_S: Tensor, kept_S: Tensor, weights_TA: Tensor
    ) -> Tensor:
        rows = out_ECH.reshape(-1, out_ECH.shape[-1])
        taken = rows.index_select(0, slot_S.clamp(max=rows.shape[0] - 1))
        weights_S = weights_TA.reshape(-1) * kept_S
        return (taken * weights_S.unsqueeze(-1)).view(-1, self.top_k, taken.shape[-1]).sum(1)


class GateAndUpApart(Capacity):
    """Three matrices an expert."""

    def __init__(self, **shape: int) -> None:
        super().__init__(**shape)
        gate, up = self.w_in_EHN.detach().chunk(2, dim=-1)
        self.w_gate_EHI, self.w_up_EHI = nn.Parameter(gate.clone()), nn.Parameter(up.clone())

    def experts(self, rows_ECH: Tensor) -> Tensor:
        gate, up = torch.bmm(rows_ECH, self.w_gate_EHI), torch.bmm(rows_ECH, self.w_up_EHI)
        return torch.bmm(F.silu(gate) * up, self.w_out_EIH)


class LooksWeightsUp(Capacity):
    """As DeepSeek's routers: ids of some scores, weights looked up in others."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE = (x @ self.router.T).float()
        ids_TA = torch.topk(logits_TE, self.top_k, dim=1, sorted=False).indices
        weights_TA = logits_TE.sigmoid().gather(1, ids_TA)
        return (weights_TA * 2.5).to(x.dtype), ids_TA


class WritesRows(Capacity):
    """Tokens are written to their places, those without one behind all others."""

    def dispatch(self, x: Tensor, token_S: Tensor, slot_S: Tensor, capacity: int) -> Tensor:
        rows = x.new_zeros(self.num_experts * capacity + 1, x.shape[1])
        rows = rows.index_put((slot_S,), x[token_S])[:-1]
        return rows.view(self.num_experts, capacity, -1)


class LoopOverExperts(Capacity):
    """A product per expert, as DeepSpeed's list of modules makes them."""

    def experts(self, rows_ECH: Tensor) -> Tensor:
        out = []
        for e, rows_1CH in enumerate(rows_ECH.chunk(self.num_experts)):
            gate, up = (rows_1CH @ self.w_in_EHN[e]).chunk(2, dim=-1)
            out.append((F.silu(gate) * up) @ self.w_out_EIH[e])
        return torch.cat(out)


class OneHot(Capacity):
    """GShard's einsums: one-hot tensors [T, E, C] dispatch and combine."""

    def forward(self, x: Tensor) -> Tensor:
        weights_TA, ids_TA = torch.topk((x @ self.router.T).float().softmax(-1), self.top_k, dim=1)
        combine_TEC = self.one_hot(weights_TA, ids_TA, self.capacity(x.shape[0]))
        rows_ECH = torch.einsum("tec,th->ech", self.dispatched(combine_TEC).to(x.dtype), x)
        return torch.einsum("tec,ech->th", combine_TEC.to(x.dtype), self.experts(rows_ECH))

    def one_hot(self, weights_TA: Tensor, ids_TA: Tensor, capacity: int) -> Tensor:
        """The weight of each token in each place of each expert."""
        combine_TEC = weights_TA.new_zeros(len(ids_TA), self.num_experts, capacity)
        before_E = torch.zeros(self.num_experts, dtype=torch.int64, device=ids_TA.device)
        for choice in range(self.top_k):
            mask_TE = F.one_hot(ids_TA[:, choice], self.num_experts)
            place_TE = mask_TE.cumsum(0) - 1 + before_E
            before_E = before_E + mask_TE.sum(0)
            kept_TE = self.kept(mask_TE, place_TE, capacity)
            place_T = (place_TE * kept_TE).sum(-1).clamp(max=capacity - 1)
            weight_TE = weights_TA[:, choice : choice + 1] * kept_TE
            combine_TEC = combine_TEC + weight_TE.unsqueeze(-1) * F.one_hot(
                place_T, capacity
            ).unsqueeze(1)
        return combine_TEC

    def kept(self, mask_TE: Tensor, place_TE: Tensor, capacity: int) -> Tensor:
        return mask_TE * (place_TE < capacity)

    def dispatched(self, combine_TEC: Tensor) -> Tensor:
        return combine_TEC != 0


class OneHotOneChoice(OneHot, OneChoice):
    """Switch Transformer's: every token at one expert."""


class OneHotMatrices(OneHot):
    """Dispatched and combined by products of matrices, as einsum is compiled for GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        weights_TA, ids_TA = torch.topk((x @ self.router.T).float().softmax(-1), self.top_k, dim=1)
        combine_TEC = self.one_hot(weights_TA, ids_TA, self.capacity(x.shape[0]))
        combine_TS = combine_TEC.flatten(1)
        rows_ECH = (self.dispatched(combine_TS).to(x.dtype).T @ x).view(
            self.num_experts, -1, x.shape[1]
        )
        return combine_TS.to(x.dtype) @ self.experts(rows_ECH).flatten(0, 1)


class OneHotLoop(OneHot, LoopOverExperts):
    """The einsums around a product per expert."""


class OneHotNothingDropped(OneHot):
    """Tokens beyond the capacity are added to those in the last place."""

    def kept(self, mask_TE: Tensor, place_TE: Tensor, capacity: int) -> Tensor:
        return mask_TE


class OneHotNextPlace(OneHot):
    """Dispatched are the tokens of the place before."""

    def dispatched(self, combine_TEC: Tensor) -> Tensor:
        return (combine_TEC != 0).roll(1, 2)


class OneHotWeighted(OneHot):
    """Weights multiply twice: in front of the experts and behind them."""

    def dispatched(self, combine_TEC: Tensor) -> Tensor:
        return combine_TEC


class NothingDropped(Capacity):
    """Near-miss: slots beyond the capacity overwrite the last row of their expert."""

    def slots(self, ids_S: Tensor, place_S: Tensor, kept_S: Tensor, capacity: int) -> Tensor:
        return ids_S * capacity + place_S.clamp(max=capacity - 1)


class Renormalised(TokensFirst):
    """Near-miss: what is left of a token's weights adds up to one again."""

    def combine(
        self, out_ECH: Tensor, slot_S: Tensor, kept_S: Tensor, weights_TA: Tensor
    ) -> Tensor:
        kept_TA = kept_S.view(weights_TA.shape)
        total = (weights_TA * kept_TA).sum(1, keepdim=True) + 1e-3
        return super().combine(out_ECH, slot_S, kept_S, weights_TA / total)


class WrongOrder(Capacity):
    """Near-miss: dropped as if tokens came first, dispatched as if choices did."""

    def slots(self, ids_S: Tensor, place_S: Tensor, kept_S: Tensor, capacity: int) -> Tensor:
        kept_S = kept_S.view(self.top_k, -1).t().reshape(-1)
        return super().slots(ids_S, place_S, kept_S, capacity)


class OthersRow(MaskedWeights):
    """Near-miss: dropped slots read a row of others, and keep their weight."""

    def combine(
        self, out_ECH: Tensor, slot_S: Tensor, kept_S: Tensor, weights_TA: Tensor
    ) -> Tensor:
        return super().combine(out_ECH, slot_S, torch.ones_like(kept_S), weights_TA)


REWRITTEN: dict[str, Callable[..., Capacity]] = {
    "choices_first": Capacity,
    "tokens_first": TokensFirst,
    "one_choice": OneChoice,
    "roomy": Roomy,
    "heaviest_first": HeaviestFirst,
    "masked_weights": MaskedWeights,
    "gate_and_up_apart": GateAndUpApart,
    "looks_weights_up": LooksWeightsUp,
    "writes_rows": WritesRows,
    "loop": LoopOverExperts,
    "one_hot": OneHot,
    "one_hot_one_choice": OneHotOneChoice,
    "one_hot_loop": OneHotLoop,
    "one_hot_matrices": OneHotMatrices,
}
REFUSED: dict[str, Callable[..., Capacity]] = {
    "nothing_dropped": NothingDropped,
    "renormalised": Renormalised,
    "wrong_order": WrongOrder,
    "others_row": OthersRow,
    "one_hot_nothing_dropped": OneHotNothingDropped,
    "one_hot_next_place": OneHotNextPlace,
    "one_hot_weighted": OneHotWeighted,
}
