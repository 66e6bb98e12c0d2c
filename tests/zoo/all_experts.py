"""Layers that run every expert on every token, and near-misses of them.

`AllExperts` is Llama 4's: scores of all experts [T, E], of which all but top_k are zero, multiply
the tokens in front of the experts. `WeightedAfter` multiplies the experts' rows, as layers written
with einsum do. Both compute the sparse layer at E / top_k times its work. `REWRITTEN` lists what
the pass must rewrite, `REFUSED` what it must not, each with the reason.

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


class AllExperts(nn.Module):
    """Llama 4's routed experts, as small steps for others to change; [.., H] both ways."""

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
        fused = torch.cat([weights["w_gate"], weights["w_up"]], dim=1).transpose(1, 2)
        self.num_experts, self.top_k = num_experts, top_k
        self.router = nn.Parameter(weights["gate"].to(dtype))
        self.w_in_EHN = nn.Parameter(fused.contiguous().to(dtype))
        self.w_out_EIH = nn.Parameter(weights["w_down"].transpose(1, 2).contiguous().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows_TH = x.reshape(-1, x.shape[-1])
        scores_TE = self.scores(rows_TH)
        out_ETH = self.experts(self.rows(rows_TH, scores_TE))
        return self.combine(out_ETH, scores_TE).view(x.shape)

    def scores(self, rows_TH: Tensor) -> Tensor:
        logits_TE = rows_TH @ self.router.T
        values_TA, ids_TA = torch.topk(logits_TE, self.top_k, dim=1)
        return self.score(logits_TE, values_TA, ids_TA)

    def score(self, logits_TE: Tensor, values_TA: Tensor, ids_TA: Tensor) -> Tensor:
        chosen_TE = torch.full_like(logits_TE, float("-inf")).scatter_(1, ids_TA, values_TA)
        return torch.sigmoid(chosen_TE.float()).to(values_TA.dtype)

    def rows(self, rows_TH: Tensor, scores_TE: Tensor) -> Tensor:
        """Return each expert's rows [E, T, H]."""
        repeated = rows_TH.repeat(self.num_experts, 1)
        weighted = repeated * scores_TE.transpose(0, 1).reshape(-1, 1)
        return weighted.view(self.num_experts, -1, rows_TH.shape[1])

    def activate(self, pre_ETN: Tensor) -> Tensor:
        gate, up = pre_ETN.chunk(2, dim=-1)
        return up * F.silu(gate)

    def experts(self, rows_ETH: Tensor) -> Tensor:
        return torch.bmm(self.activate(torch.bmm(rows_ETH, self.w_in_EHN)), self.w_out_EIH)

    def combine(self, out_ETH: Tensor, scores_TE: Tensor) -> Tensor:
        return out_ETH.sum(dim=0)


class SoftmaxScores(AllExperts):
    """A softmax over the chosen logits, written over all."""

    def score(self, logits_TE, values_TA, ids_TA):
        chosen_TE = torch.full_like(logits_TE, float("-inf")).scatter_(1, ids_TA, values_TA)
        return torch.softmax(chosen_TE.float(), 1).to(values_TA.dtype)


class MaskedScores(AllExperts):
    """The scores of the chosen experts are kept by a mask, with a temperature."""

    def score(self, logits_TE, values_TA, ids_TA):
        mask_TE = torch.zeros_like(logits_TE).scatter(1, ids_TA, 1.0)
        return torch.sigmoid(logits_TE * 0.5) * mask_TE


class ScattersWeights(AllExperts):
    """The weights of the chosen experts are made first, and then put among zeros."""

    def score(self, logits_TE, values_TA, ids_TA):
        weights_TA = torch.softmax(values_TA.float(), 1).to(values_TA.dtype)
        return torch.zeros_like(logits_TE).scatter(1, ids_TA, weights_TA)


class StraightThroughBefore(AllExperts):
    """All scores are trained as if none were masked: in front of gated experts, that is nothing."""

    def score(self, logits_TE, values_TA, ids_TA):
        scores_TE = torch.sigmoid(logits_TE)
        mask_TE = torch.zeros_like(logits_TE).scatter(1, ids_TA, 1.0)
        return scores_TE + (scores_TE * mask_TE - scores_TE).detach()


class WeightedAfter(ScattersWeights):
    """Scores multiply what the experts return: one product that sums over the experts."""

    def rows(self, rows_TH, scores_TE):
        return rows_TH.unsqueeze(0).expand(self.num_experts, -1, -1)

    def combine(self, out_ETH, scores_TE):
        return torch.einsum("te,eth->th", scores_TE, out_ETH)


class WeightedSum(WeightedAfter):
    """The same, with a product for each expert and token, and a sum."""

    def combine(self, out_ETH, scores_TE):
        return (out_ETH * scores_TE.T.unsqueeze(-1)).sum(0)


class BiasesAfter(WeightedSum):
    """Biases behind both projections: a score of zero behind the experts hides them."""

    def __init__(self, **shape) -> None:
        super().__init__(**shape)
        dtype = self.w_in_EHN.dtype
        generator = torch.Generator().manual_seed(3)
        for name, weight in (("b_in", self.w_in_EHN), ("b_out", self.w_out_EIH)):
            bias = torch.randn(weight.shape[0], weight.shape[2], generator=generator)
            setattr(self, name, nn.Parameter(bias.to(dtype)))

    def experts(self, rows_ETH):
        pre_ETN = torch.bmm(rows_ETH, self.w_in_EHN) + self.b_in[:, None, :]
        return torch.bmm(self.activate(pre_ETN), self.w_out_EIH) + self.b_out[:, None, :]


class SeparateUp(AllExperts):
    """Gate and up are two stacks."""

    def __init__(self, **shape) -> None:
        super().__init__(**shape)
        gate, up = self.w_in_EHN.detach().chunk(2, dim=2)
        self.w_in_EHN = nn.Parameter(gate.contiguous())
        self.w_up_EHI = nn.Parameter(up.contiguous())

    def experts(self, rows_ETH):
        gate, up = torch.bmm(rows_ETH, self.w_in_EHN), torch.bmm(rows_ETH, self.w_up_EHI)
        return torch.bmm(F.silu(gate) * up, self.w_out_EIH)


# -- near-misses ------------------------------------------------------------------------------


class FiniteFill(AllExperts):
    """Other experts than the chosen get a small score, not none."""

    def score(self, logits_TE, values_TA, ids_TA):
        chosen_TE = torch.full_like(logits_TE, -10.0).scatter_(1, ids_TA, values_TA)
        return torch.sigmoid(chosen_TE.float()).to(values_TA.dtype)


class FiniteSoftmaxFill(AllExperts):
    """Zero for logits of usual size, but not for all: a softmax compares."""

    def score(self, logits_TE, values_TA, ids_TA):
        chosen_TE = torch.full_like(logits_TE, -1e9).scatter_(1, ids_TA, values_TA)
        return torch.softmax(chosen_TE.float(), 1).to(values_TA.dtype)


class AllScores(AllExperts):
    """Scores of the chosen are doubled, the others' kept."""

    def score(self, logits_TE, values_TA, ids_TA):
        return torch.sigmoid(logits_TE.scatter(1, ids_TA, 2 * values_TA))


class TwoChoices(AllExperts):
    """The scores of a second choice are put beside those of the first."""

    def score(self, logits_TE, values_TA, ids_TA):
        others_TA, other_ids_TA = torch.topk(-logits_TE, self.top_k, dim=1)
        chosen_TE = torch.full_like(logits_TE, float("-inf")).scatter(1, ids_TA, values_TA)
        chosen_TE = chosen_TE.scatter(1, other_ids_TA, others_TA)
        return torch.sigmoid(chosen_TE.float()).to(values_TA.dtype)


class NextExpertsScore(AllExperts):
    """Every expert takes the score of the one before it."""

    def rows(self, rows_TH, scores_TE):
        return super().rows(rows_TH, scores_TE.roll(1, 1))


class NotTransposed(AllExperts):
    """The scores are laid beside the rows in the order of tokens, the rows in that of experts."""

    def rows(self, rows_TH, scores_TE):
        repeated = rows_TH.repeat(self.num_experts, 1) * scores_TE.reshape(-1, 1)
        return repeated.view(self.num_experts, -1, rows_TH.shape[1])


class WrongTokens(AllExperts):
    """Every token is repeated in place, so an expert sees a few tokens several times."""

    def rows(self, rows_TH, scores_TE):
        repeated = rows_TH.repeat_interleave(self.num_experts, 0)
        weighted = repeated * scores_TE.transpose(0, 1).reshape(-1, 1)
        return weighted.view(self.num_experts, -1, rows_TH.shape[1])


class Mean(AllExperts):
    """The mean over the experts, not the sum."""

    def combine(self, out_ETH, scores_TE):
        return out_ETH.mean(dim=0)


class WithoutFirst(AllExperts):
    """The first expert is left out of the sum."""

    def combine(self, out_ETH, scores_TE):
        return out_ETH[1:].sum(dim=0)


class Maximum(AllExperts):
    """The largest of the experts' outputs, not their sum."""

    def combine(self, out_ETH, scores_TE):
        return out_ETH.amax(dim=0)


class BiasesBefore(BiasesAfter):
    """With the scores in front, an expert that is not chosen gives f(0), which biases make."""

    rows = AllExperts.rows

    def combine(self, out_ETH, scores_TE):
        return out_ETH.sum(0)


class Cosine(AllExperts):
    """An activation that is not zero at zero."""

    def activate(self, pre_ETN):
        gate, up = pre_ETN.chunk(2, dim=-1)
        return torch.cos(gate) + up


class Sine(AllExperts):
    """An activation that no kernel knows."""

    def activate(self, pre_ETN):
        gate, up = pre_ETN.chunk(2, dim=-1)
        return torch.sin(gate) * up


class TwoArgmax(AllExperts):
    """The chosen experts may be one and the same, which counts once here."""

    def scores(self, rows_TH):
        logits_TE = rows_TH @ self.router.T
        ids_TA = torch.stack([logits_TE.argmax(1), (logits_TE * logits_TE).argmax(1)], 1)
        mask_TE = torch.zeros_like(logits_TE).scatter(1, ids_TA, 1.0)
        return torch.sigmoid(logits_TE) * mask_TE


class ScoresTwice(AllExperts):
    """Scores in front of the experts and behind them."""

    def combine(self, out_ETH, scores_TE):
        return (out_ETH * scores_TE.T.unsqueeze(-1)).sum(0)


class RowsEscape(AllExperts):
    """What the experts return is used outside as well."""

    def combine(self, out_ETH, scores_TE):
        return out_ETH.sum(dim=0) + out_ETH[0]


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class ScalesGradient(AllExperts):
    """Exact forward, but the gradient is doubled between the projections."""

    def activate(self, pre_ETN):
        return _ScaledGradient.apply(super().activate(pre_ETN))


class UpPlusOne(AllExperts):
    """Zero at zero, but its slope is not: a score of zero has a gradient."""

    def activate(self, pre_ETN):
        gate, up = pre_ETN.chunk(2, dim=-1)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)


class StraightThroughAfter(WeightedSum, StraightThroughBefore):
    """All scores are trained, and behind the experts each has a gradient."""

    score = StraightThroughBefore.score


REWRITTEN: dict[str, Callable[..., AllExperts]] = {
    "llama4": AllExperts,
    "softmax": SoftmaxScores,
    "mask": MaskedScores,
    "scatter": ScattersWeights,
    "straight_through": StraightThroughBefore,
    "separate_up": SeparateUp,
    "after_einsum": WeightedAfter,
    "after_sum": WeightedSum,
    "after_biases": BiasesAfter,
}

REFUSED: dict[str, tuple[Callable[..., AllExperts], str]] = {
    "finite_fill": (FiniteFill, "not_equivalent"),
    "finite_softmax_fill": (FiniteSoftmaxFill, "not_equivalent"),
    "all_scores": (AllScores, "not_equivalent"),
    "two_choices": (TwoChoices, "not_equivalent"),
    "next_experts_score": (NextExpertsScore, "not_equivalent"),
    "not_transposed": (NotTransposed, "not_equivalent"),
    "wrong_tokens": (WrongTokens, "not_equivalent"),
    "mean": (Mean, "not_equivalent"),
    "without_first": (WithoutFirst, "not_equivalent"),
    "biases_before": (BiasesBefore, "not_equivalent"),
    "maximum": (Maximum, "no_output"),
    "cosine": (Cosine, "unknown_activation"),
    "sine": (Sine, "unknown_activation"),
    "two_argmax": (TwoArgmax, "repeated_ids"),
    "scores_twice": (ScoresTwice, "not_equivalent"),
    "rows_escape": (RowsEscape, "no_output"),
}

# right in the forward, refused where they are trained
REFUSED_IN_TRAINING: dict[str, tuple[Callable[..., AllExperts], str]] = {
    "scales_gradient": (ScalesGradient, "backward_not_proven"),
    "up_plus_one": (UpPlusOne, "backward_not_proven"),
    "straight_through_after": (StraightThroughAfter, "backward_not_proven"),
}
