"""Layers that look like MoE layers and are not, or not quite: none may be rewritten whole.

`LocalMoE` and `zoo.textbook.FuncolMoE` are the accepted forms; every class here changes one
thing. `LOCAL` and `DISTRIBUTED` list them with the wrong thing in words.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import ep
from zoo.textbook import FuncolMoE


class LocalMoE(nn.Module):
    """An exact MoE layer on one device, written as small steps for the others to break.

    One fused gate/up weight [E, H, 2I]; weights applied after the experts in their own dtype.
    """

    def __init__(self, num_experts: int = 4, top_k: int = 2, hidden: int = 32, inner: int = 48):
        super().__init__()
        weights = ep.expert_weights(num_experts, hidden, inner)
        fused = torch.cat([weights["w_gate"], weights["w_up"]], dim=1).transpose(1, 2)
        self.num_experts = num_experts
        self.top_k = top_k
        self.gate = nn.Parameter(weights["gate"])
        self.w_in_EHN = nn.Parameter(fused.contiguous().bfloat16())
        self.w_out_EIH = nn.Parameter(weights["w_down"].transpose(1, 2).contiguous().bfloat16())

    def forward(self, x: Tensor):
        """[T, H] -> [T, H]."""
        scores_TA, ids_TA = ep.route(x, self.gate, self.top_k)
        order_S, offs_E = self.order(ids_TA)
        rows_SH = x[order_S // self.top_k]
        out_SH = self.ffn(rows_SH, offs_E)
        return self.reduce(out_SH, scores_TA, order_S, x)

    def order(self, ids_TA: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slot of every sorted row [S] and the end of each expert's rows [E]."""
        ids_S = ids_TA.view(-1)
        counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=ids_S.device)
        counts_E = counts_E.scatter_add(0, ids_S, torch.ones_like(ids_S))
        return torch.argsort(ids_S, stable=True), counts_E.cumsum(0).to(torch.int32)

    def activate(self, pre_SN: Tensor) -> Tensor:
        gate, up = pre_SN.chunk(2, dim=-1)
        return F.silu(gate) * up

    def ffn(self, rows_SH: Tensor, offs_E: Tensor) -> Tensor:
        pre_SN = torch._grouped_mm(rows_SH, self.w_in_EHN, offs=offs_E)
        return torch._grouped_mm(self.activate(pre_SN), self.w_out_EIH, offs=offs_E)

    def reduce(self, out_SH: Tensor, scores_TA: Tensor, order_S: Tensor, x: Tensor) -> Tensor:
        slots_SH = out_SH[torch.argsort(order_S)]
        slots_TAH = slots_SH.view(-1, self.top_k, x.shape[-1])
        return (slots_TAH * scores_TA.unsqueeze(-1).to(x.dtype)).sum(dim=1)


class ReturnsExpertOutput(LocalMoE):
    """The rows of the second GEMM leave the region."""

    def reduce(self, out_SH, scores_TA, order_S, x):
        return super().reduce(out_SH, scores_TA, order_S, x), out_SH


class ReturnsPreActivation(LocalMoE):
    """The rows of the first GEMM leave the region."""

    def forward(self, x):
        scores_TA, ids_TA = ep.route(x, self.gate, self.top_k)
        order_S, offs_E = self.order(ids_TA)
        pre_SN = torch._grouped_mm(x[order_S // self.top_k], self.w_in_EHN, offs=offs_E)
        out_SH = torch._grouped_mm(self.activate(pre_SN), self.w_out_EIH, offs=offs_E)
        return self.reduce(out_SH, scores_TA, order_S, x), pre_SN


class FirstGemmOnly(LocalMoE):
    """Half a region: gather and first GEMM, no second one."""

    def forward(self, x):
        scores_TA, ids_TA = ep.route(x, self.gate, self.top_k)
        order_S, offs_E = self.order(ids_TA)
        pre_SN = torch._grouped_mm(x[order_S // self.top_k], self.w_in_EHN, offs=offs_E)
        return self.activate(pre_SN)


class WeightsOfNextToken(LocalMoE):
    """Every token is scaled by the weights of the token before it."""

    def reduce(self, out_SH, scores_TA, order_S, x):
        return super().reduce(out_SH, scores_TA.roll(1, 0), order_S, x)


class WeightsOfNextSlot(LocalMoE):
    """The weights of a token's choices change places."""

    def reduce(self, out_SH, scores_TA, order_S, x):
        return super().reduce(out_SH, scores_TA.flip(1), order_S, x)


class ExpertsSwapped(LocalMoE):
    """Experts 0 and 1 of the second GEMM change places."""

    def ffn(self, rows_SH, offs_E):
        pre_SN = torch._grouped_mm(rows_SH, self.w_in_EHN, offs=offs_E)
        swapped = torch.cat([self.w_out_EIH[1:2], self.w_out_EIH[:1], self.w_out_EIH[2:]])
        return torch._grouped_mm(self.activate(pre_SN), swapped, offs=offs_E)


class NotUnpermuted(LocalMoE):
    """Rows stay in expert order and are summed as if they were in token order."""

    def reduce(self, out_SH, scores_TA, order_S, x):
        slots_TAH = out_SH.view(-1, self.top_k, x.shape[-1])
        return (slots_TAH * scores_TA.unsqueeze(-1).to(x.dtype)).sum(dim=1)


class UnpermutedTwice(LocalMoE):
    """The permutation itself is used where its inverse belongs."""

    def reduce(self, out_SH, scores_TA, order_S, x):
        slots_TAH = out_SH[order_S].view(-1, self.top_k, x.shape[-1])
        return (slots_TAH * scores_TA.unsqueeze(-1).to(x.dtype)).sum(dim=1)


class GathersWrongToken(LocalMoE):
    """Slot s reads token s % T instead of s // A."""

    def forward(self, x):
        scores_TA, ids_TA = ep.route(x, self.gate, self.top_k)
        order_S, offs_E = self.order(ids_TA)
        out_SH = self.ffn(x[order_S % x.shape[0]], offs_E)
        return self.reduce(out_SH, scores_TA, order_S, x)


class OffsetsShifted(LocalMoE):
    """Expert e runs on the rows of expert e - 1."""

    def order(self, ids_TA):
        order_S, offs_E = super().order(ids_TA)
        return order_S, torch.cat([torch.zeros_like(offs_E[:1]), offs_E[:-1]])


class SineActivation(LocalMoE):
    """An activation that no kernel knows."""

    def activate(self, pre_SN):
        gate, up = pre_SN.chunk(2, dim=-1)
        return torch.sin(gate) * up


class MixesRowsBetweenGemms(LocalMoE):
    """The activation looks at the row above."""

    def activate(self, pre_SN):
        gate, up = pre_SN.chunk(2, dim=-1)
        return F.silu(gate) * up.roll(1, 0)


class GraphBreakBetweenGemms(LocalMoE):
    """A graph break leaves one GEMM in each of two graphs."""

    def ffn(self, rows_SH, offs_E):
        pre_SN = torch._grouped_mm(rows_SH, self.w_in_EHN, offs=offs_E)
        torch._dynamo.graph_break()
        return torch._grouped_mm(self.activate(pre_SN), self.w_out_EIH, offs=offs_E)


class ChangesWeightsAfterUse(LocalMoE):
    """The expert weights are updated in place inside the graph."""

    def forward(self, x):
        out = super().forward(x)
        with torch.no_grad():
            self.w_out_EIH.mul_(0.5)
        return out


class CombineOnOtherGroup(FuncolMoE):
    """Dispatch on one group, combine on another one with the same members."""

    def __init__(self, group: ep.Group = None, **shape):
        super().__init__(group, **shape)
        self.other_group = dist.new_group(dist.get_process_group_ranks(ep.process_group(group)))

    def combine(self, out_RH, send, receive):
        return ep.all_to_all_rows(out_RH, send, receive, self.other_group)


class SplitsSwapped(FuncolMoE):
    """Rows go home by the splits they came with: right only where traffic is symmetric."""

    def combine(self, out_RH, send, receive):
        return ep.all_to_all_rows(out_RH, receive, send, self.group)


class BreakAfterDispatch(FuncolMoE):
    """A graph break between dispatch and experts: half a region in each of two graphs."""

    def experts(self, rows_RH, offs_L):
        torch._dynamo.graph_break()
        return super().experts(rows_RH, offs_L)


class DispatchOnly(FuncolMoE):
    """Dispatch and experts without a combine: the rows stay where the experts are."""

    def routed(self, x, scores_TA, ids_TA):
        ids_S = ids_TA.view(-1)
        order_S = torch.argsort(ids_S, stable=True)
        counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
        counts_E = counts_E.scatter_add(0, ids_S, torch.ones_like(ids_S))
        rows_RH, perm_R, offs_L, _, _ = self.dispatch(x[order_S // self.top_k], counts_E)
        return self.experts(rows_RH[perm_R], offs_L)


class DispatchedRowsEscape(FuncolMoE):
    """The rows that the dispatch brought are also summed outside the region."""

    def experts(self, rows_RH, offs_L):
        self.seen = rows_RH.float().sum()
        return super().experts(rows_RH, offs_L)

    def routed(self, x, scores_TA, ids_TA):
        out = super().routed(x, scores_TA, ids_TA)
        return out + (self.seen * 1e-3).to(out.dtype)


class NeighboursExperts(FuncolMoE):
    """Every rank runs its local experts in reverse order."""

    def experts(self, rows_RH, offs_L):
        pre = torch._grouped_mm(rows_RH, self.w_in_LHN.flip(0), offs=offs_L)
        gate, up = pre.chunk(2, dim=-1)
        h = self.activation(gate) * up
        return torch._grouped_mm(h, self.w_out_LIH.flip(0), offs=offs_L)


LOCAL: dict[str, type[LocalMoE]] = {
    "returns_expert_output": ReturnsExpertOutput,
    "returns_pre_activation": ReturnsPreActivation,
    "first_gemm_only": FirstGemmOnly,
    "weights_of_next_token": WeightsOfNextToken,
    "weights_of_next_slot": WeightsOfNextSlot,
    "experts_swapped": ExpertsSwapped,
    "not_unpermuted": NotUnpermuted,
    "unpermuted_twice": UnpermutedTwice,
    "gathers_wrong_token": GathersWrongToken,
    "offsets_shifted": OffsetsShifted,
    "sine_activation": SineActivation,
    "mixes_rows_between_gemms": MixesRowsBetweenGemms,
    "graph_break_between_gemms": GraphBreakBetweenGemms,
    "changes_weights_after_use": ChangesWeightsAfterUse,
}

DISTRIBUTED: dict[str, type[FuncolMoE]] = {
    "combine_on_other_group": CombineOnOtherGroup,
    "splits_swapped": SplitsSwapped,
    "break_after_dispatch": BreakAfterDispatch,
    "dispatch_only": DispatchOnly,
    "dispatched_rows_escape": DispatchedRowsEscape,
    "neighbours_experts": NeighboursExperts,
}
