"""Layers that loop over their experts in Python, and near-misses of them.

Every expert multiplies all tokens, and what a token did not choose counts zero times: a graph of
static shape that does E / top_k times the sparse layer's work. `REWRITTEN` lists what the pass must
rewrite, `REFUSED` what it must not, each with the reason.

T tokens, A experts per token, E experts, H model dim, I expert intermediate dim, N = 2I columns of
gate and up side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import ep

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 32, 48, 4, 2


class Loop(nn.Module):
    """One stack of matrices per projection, of which expert e takes its own; [.., H] both ways.

    Small steps for others to change.
    """

    def __init__(
        self,
        num_experts: int = NUM_EXPERTS,
        top_k: int = TOP_K,
        hidden: int = HIDDEN,
        inner: int = INTERMEDIATE,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        weights = ep.expert_weights(num_experts, hidden, inner)
        self.num_experts, self.top_k = num_experts, top_k
        self.router = nn.Parameter(weights["gate"].to(dtype))
        self.w_gate_EIH = nn.Parameter(weights["w_gate"].to(dtype))
        self.w_up_EIH = nn.Parameter(weights["w_up"].to(dtype))
        self.w_down_EHI = nn.Parameter(weights["w_down"].to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows_TH = x.reshape(-1, x.shape[-1])
        probs_TE = torch.softmax((rows_TH @ self.router.T).float(), dim=-1)
        weights_TA, ids_TA = probs_TE.topk(self.top_k, dim=-1)
        return self.routed(rows_TH, weights_TA, ids_TA).view(x.shape)

    def routed(self, rows_TH: Tensor, weights_TA: Tensor, ids_TA: Tensor) -> Tensor:
        y = torch.zeros_like(rows_TH)
        for e in range(self.num_experts):
            weight_T1 = self.weight(weights_TA, ids_TA, e).to(rows_TH.dtype).unsqueeze(-1)
            y = self.add(y, self.expert(rows_TH, e), weight_T1)
        return y

    def weight(self, weights_TA: Tensor, ids_TA: Tensor, e: int) -> Tensor:
        """Return what expert e's rows are multiplied with, [T]."""
        return (weights_TA * (ids_TA == e)).sum(-1)

    def expert(self, rows_TH: Tensor, e: int) -> Tensor:
        h = F.silu(F.linear(rows_TH, self.w_gate_EIH[e])) * F.linear(rows_TH, self.w_up_EIH[e])
        return F.linear(h, self.w_down_EHI[e])

    def add(self, y: Tensor, out_TH: Tensor, weight_T1: Tensor) -> Tensor:
        return y + out_TH * weight_T1


class Where(Loop):
    """A mask decides; what it leaves out is zero."""

    def add(self, y, out_TH, weight_T1):
        return y + torch.where(weight_T1 != 0, out_TH * weight_T1, 0.0)


class WeightsBefore(Loop):
    """The weight multiplies the rows in front of the experts."""

    def routed(self, rows_TH, weights_TA, ids_TA):
        y = torch.zeros_like(rows_TH)
        for e in range(self.num_experts):
            weight_T1 = self.weight(weights_TA, ids_TA, e).to(rows_TH.dtype).unsqueeze(-1)
            y += self.expert(rows_TH * weight_T1, e)
        return y


class Scores(Loop):
    """Weights are put into a matrix [T, E], of which each expert takes a column."""

    def routed(self, rows_TH, weights_TA, ids_TA):
        zeros_TE = weights_TA.new_zeros(rows_TH.shape[0], self.num_experts)
        scores_TE = zeros_TE.scatter(1, ids_TA, weights_TA).to(rows_TH.dtype)
        y = torch.zeros_like(rows_TH)
        for e in range(self.num_experts):
            y = self.add(y, self.expert(rows_TH, e), scores_TE[:, e : e + 1])
        return y


class Stacked(Loop):
    """All outputs first; every token then takes its own experts'."""

    def routed(self, rows_TH, weights_TA, ids_TA):
        out_TEH = torch.stack([self.expert(rows_TH, e) for e in range(self.num_experts)], dim=1)
        index_TAH = ids_TA.unsqueeze(-1).expand(-1, -1, rows_TH.shape[1])
        chosen_TAH = out_TEH.gather(1, index_TAH)
        return (chosen_TAH * weights_TA.to(rows_TH.dtype).unsqueeze(-1)).sum(1)


class Fused(Loop):
    """Gate and up in one matrix [H, N], which multiplies from the right; matrices are unbound."""

    def __init__(self, **shape: int) -> None:
        super().__init__(**shape)
        fused = torch.cat([self.w_gate_EIH, self.w_up_EIH], dim=1).detach()
        self.w_in_EHN = nn.Parameter(fused.transpose(1, 2).contiguous())
        self.w_out_EIH = nn.Parameter(self.w_down_EHI.detach().transpose(1, 2).contiguous())
        del self.w_gate_EIH, self.w_up_EIH, self.w_down_EHI

    def routed(self, rows_TH, weights_TA, ids_TA):
        y = torch.zeros_like(rows_TH)
        for e, (w_in_HN, w_out_IH) in enumerate(zip(self.w_in_EHN, self.w_out_EIH, strict=True)):
            gate, up = (rows_TH @ w_in_HN).chunk(2, dim=-1)
            weight_T1 = self.weight(weights_TA, ids_TA, e).to(rows_TH.dtype).unsqueeze(-1)
            y = self.add(y, (F.silu(gate) * up) @ w_out_IH, weight_T1)
        return y


class Biases(Loop):
    """Two matrices with biases, GELU between them."""

    def __init__(self, **shape: int) -> None:
        super().__init__(**shape)
        experts, inner, hidden = self.w_gate_EIH.shape
        dtype = self.w_gate_EIH.dtype
        self.b_in_EI = nn.Parameter(torch.randn(experts, inner).to(dtype))
        self.b_out_EH = nn.Parameter(torch.randn(experts, hidden).to(dtype))
        del self.w_up_EIH

    def expert(self, rows_TH, e):
        h = F.gelu(F.linear(rows_TH, self.w_gate_EIH[e], self.b_in_EI[e]))
        return F.linear(h, self.w_down_EHI[e], self.b_out_EH[e])


class AddsBiases(Biases):
    """The same, the biases added by hand."""

    def expert(self, rows_TH, e):
        h = F.gelu(rows_TH @ self.w_gate_EIH[e].T + self.b_in_EI[e])
        return h @ self.w_down_EHI[e].T + self.b_out_EH[e]


class SharedExpert(Loop):
    """An expert for all tokens stands in front of the loop."""

    def __init__(self, **shape: int) -> None:
        super().__init__(**shape)
        _, inner, hidden = self.w_gate_EIH.shape
        dtype = self.w_gate_EIH.dtype
        self.up = nn.Linear(hidden, inner, bias=False, dtype=dtype)
        self.down = nn.Linear(inner, hidden, bias=False, dtype=dtype)

    def routed(self, rows_TH, weights_TA, ids_TA):
        shared = self.down(F.relu(self.up(rows_TH)))
        return super().routed(rows_TH, weights_TA, ids_TA) + shared


class SharedExpertLast(SharedExpert):
    """The same, but it stands behind the loop in the code, too."""

    def routed(self, rows_TH, weights_TA, ids_TA):
        y = Loop.routed(self, rows_TH, weights_TA, ids_TA)
        return y + self.down(F.relu(self.up(rows_TH)))


class InPlace(Loop):
    """A buffer is added to in place."""

    def routed(self, rows_TH, weights_TA, ids_TA):
        y = torch.zeros_like(rows_TH)
        for e in range(self.num_experts):
            weight_T1 = self.weight(weights_TA, ids_TA, e).to(rows_TH.dtype).unsqueeze(-1)
            y.add_(self.expert(rows_TH, e) * weight_T1)
        return y


class AsManyChoices(Loop):
    """The outer loop is over choices, the weight of an expert the sum of its masks'."""

    def weight(self, weights_TA, ids_TA, e):
        masks = [(ids_TA[:, a] == e) * weights_TA[:, a] for a in range(self.top_k)]
        return torch.stack(masks).sum(0)


class Descending(Loop):
    """The experts are counted down."""

    def routed(self, rows_TH, weights_TA, ids_TA):
        y = torch.zeros_like(rows_TH)
        for e in reversed(range(self.num_experts)):
            weight_T1 = self.weight(weights_TA, ids_TA, e).to(rows_TH.dtype).unsqueeze(-1)
            y = self.add(y, self.expert(rows_TH, e), weight_T1)
        return y


class WrongExpert(Loop):
    """Expert e's rows get the weight of the next one."""

    def weight(self, weights_TA, ids_TA, e):
        return super().weight(weights_TA, ids_TA, (e + 1) % self.num_experts)


class ThreeOfFour(Loop):
    """The last expert's rows are left out."""

    def weight(self, weights_TA, ids_TA, e):
        scale = float(e != self.num_experts - 1)
        return super().weight(weights_TA, ids_TA, e) * scale


class Squared(Loop):
    """Weights are squared where they multiply."""

    def weight(self, weights_TA, ids_TA, e):
        return super().weight(weights_TA, ids_TA, e).square()


class _Expert(nn.Module):
    """One expert as a module of its own."""

    def __init__(self, gate_IH: Tensor, up_IH: Tensor, down_HI: Tensor, *, bias: bool) -> None:
        super().__init__()
        for name, weight in (("gate", gate_IH), ("up", up_IH), ("down", down_HI)):
            linear = nn.Linear(*weight.shape[::-1], bias=bias, dtype=weight.dtype)
            linear.weight.data.copy_(weight.detach())
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Modules(Loop):
    """A list of modules, as most people write experts first."""

    bias = False

    def __init__(self, **shape: int) -> None:
        super().__init__(**shape)
        stacks = (self.w_gate_EIH, self.w_up_EIH, self.w_down_EHI)
        self.experts = nn.ModuleList(
            _Expert(*matrices, bias=self.bias) for matrices in zip(*stacks, strict=True)
        )
        del self.w_gate_EIH, self.w_up_EIH, self.w_down_EHI

    def expert(self, rows_TH, e):
        return self.experts[e](rows_TH)


class ModulesWithBiases(Modules):
    """The same with biases."""

    bias = True


class ModulesOwnRows(Modules):
    """Every expert multiplies the rows of its own tokens alone, of which it has room for all."""

    def routed(self, rows_TH, weights_TA, ids_TA):
        y = torch.zeros_like(rows_TH)
        for e in range(self.num_experts):
            weight_T1 = self.weight(weights_TA, ids_TA, e).to(rows_TH.dtype).unsqueeze(-1)
            # those that chose the expert first; the other half is of the others
            order_T = torch.argsort((ids_TA != e).all(1).int(), stable=True)
            half = order_T[: (len(rows_TH) + 1) // 2]
            y = y.index_add(0, half, self.expert(rows_TH[half], e) * weight_T1[half])
        return y


class ModulesSquared(Modules, Squared):
    """Weights are squared where they multiply."""


class CountsALittle(Loop):
    """What a token did not choose counts a little."""

    def weight(self, weights_TA, ids_TA, e):
        return super().weight(weights_TA, ids_TA, e) + 1e-3


class Cosine(Loop):
    """An activation of its own."""

    def expert(self, rows_TH, e):
        h = F.linear(rows_TH, self.w_gate_EIH[e]).cos() * F.linear(rows_TH, self.w_up_EIH[e])
        return F.linear(h, self.w_down_EHI[e])


class OneDiffers(Loop):
    """One expert has another activation."""

    def expert(self, rows_TH, e):
        if e != 1:
            return super().expert(rows_TH, e)
        h = F.gelu(F.linear(rows_TH, self.w_gate_EIH[e])) * F.linear(rows_TH, self.w_up_EIH[e])
        return F.linear(h, self.w_down_EHI[e])


class Escapes(Loop):
    """One expert's rows leave the layer, too."""

    def routed(self, rows_TH, weights_TA, ids_TA):
        out_ETH = [self.expert(rows_TH, e) for e in range(self.num_experts)]
        y = torch.zeros_like(rows_TH)
        for e, out_TH in enumerate(out_ETH):
            weight_T1 = self.weight(weights_TA, ids_TA, e).to(rows_TH.dtype).unsqueeze(-1)
            y = self.add(y, out_TH, weight_T1)
        return y + out_ETH[2].sin()


REWRITTEN: dict[str, Callable[..., Loop]] = {
    "loop": Loop,
    "where": Where,
    "weights_before": WeightsBefore,
    "scores": Scores,
    "stacked": Stacked,
    "fused": Fused,
    "biases": Biases,
    "adds_biases": AddsBiases,
    "shared_expert": SharedExpert,
    "shared_expert_last": SharedExpertLast,
    "in_place": InPlace,
    "as_many_choices": AsManyChoices,
    "descending": Descending,
    "modules": Modules,
    "modules_with_biases": ModulesWithBiases,
}

REFUSED: dict[str, tuple[Callable[..., Loop], str]] = {
    "wrong_expert": (WrongExpert, "not_equivalent"),
    "three_of_four": (ThreeOfFour, "not_equivalent"),
    "squared": (Squared, "not_equivalent"),
    "counts_a_little": (CountsALittle, "not_equivalent"),
    "cosine": (Cosine, "unknown_activation"),
    "one_differs": (OneDiffers, "unknown_activation"),
    "escapes": (Escapes, "no_output"),
    "modules_own_rows": (ModulesOwnRows, "separate_experts"),
    "modules_squared": (ModulesSquared, "not_equivalent"),
}
