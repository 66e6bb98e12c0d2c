"""Layers that look like MoE layers and are not, or not quite: none may be rewritten.

`LocalMoE` and `zoo.textbook.FuncolMoE` are forms that are accepted; every class here changes one
thing. `LOCAL` and `DISTRIBUTED` list them by name. Those that only make sense without gradients
say so with `trains = False`, those that cannot be one graph with `fullgraph = False`.
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

    One fused gate/up weight [E, H, 2I]; weights applied after the experts in the rows' dtype.
    """

    trains = True
    fullgraph = True

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
        out_SH = self.ffn(self.gather(x, order_S), offs_E)
        return self.reduce(out_SH, scores_TA, order_S, x)

    def order(self, ids_TA: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slot of every sorted row [S] and the end of each expert's rows [E]."""
        ids_S = ids_TA.view(-1)
        counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=ids_S.device)
        counts_E = counts_E.scatter_add(0, ids_S, torch.ones_like(ids_S))
        return torch.argsort(ids_S, stable=True), counts_E.cumsum(0).to(torch.int32)

    def gather(self, x: Tensor, order_S: Tensor) -> Tensor:
        return x[order_S // self.top_k]

    def activate(self, pre_SN: Tensor) -> Tensor:
        gate, up = pre_SN.chunk(2, dim=-1)
        return F.silu(gate) * up

    def ffn(self, rows_SH: Tensor, offs_E: Tensor) -> Tensor:
        pre_SN = torch._grouped_mm(rows_SH, self.w_in_EHN, offs=offs_E)
        return torch._grouped_mm(self.activate(pre_SN), self.w_out_EIH, offs=offs_E)

    def reduce(self, out_SH: Tensor, scores_TA: Tensor, order_S: Tensor, x: Tensor):
        slots_SH = out_SH[torch.argsort(order_S)]
        slots_TAH = slots_SH.view(-1, self.top_k, x.shape[-1])
        return (slots_TAH * scores_TA.unsqueeze(-1).to(x.dtype)).sum(dim=1)


class ReturnsExpertOutput(LocalMoE):
    """The rows of the second GEMM leave the region."""

    def reduce(self, out_SH, scores_TA, order_S, x):
        return super().reduce(out_SH, scores_TA, order_S, x), out_SH


class ReturnsPreActivation(LocalMoE):
    """The rows of the first GEMM leave the region."""

    def activate(self, pre_SN):
        self.seen = pre_SN
        return super().activate(pre_SN)

    def reduce(self, out_SH, scores_TA, order_S, x):
        return super().reduce(out_SH, scores_TA, order_S, x), self.seen


class FirstGemmOnly(LocalMoE):
    """Half a region: gather and first GEMM, no second one."""

    def ffn(self, rows_SH, offs_E):
        return self.activate(torch._grouped_mm(rows_SH, self.w_in_EHN, offs=offs_E))

    def reduce(self, out_SH, scores_TA, order_S, x):
        return out_SH * scores_TA.sum().to(x.dtype)


class WeightsOfNextRow(LocalMoE):
    """In expert order, every row is scaled by the weight of the row before it."""

    def reduce(self, out_SH, scores_TA, order_S, x):
        weight_S = scores_TA.view(-1)[order_S].roll(1, 0).to(x.dtype)
        slots_SH = (out_SH * weight_S.unsqueeze(-1))[torch.argsort(order_S)]
        return slots_SH.view(-1, self.top_k, x.shape[-1]).sum(dim=1)


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

    def gather(self, x, order_S):
        return x[order_S % x.shape[0]]


class CountsOfNextExpert(LocalMoE):
    """Rows are sorted by expert, but the boundaries between experts are those of a neighbour."""

    def order(self, ids_TA):
        order_S, offs_E = super().order(ids_TA)
        counts_E = torch.diff(offs_E, prepend=offs_E.new_zeros(1))
        return order_S, counts_E.roll(1, 0).cumsum(0).to(torch.int32)


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


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class ScalesGradient(LocalMoE):
    """Exact forward, but the gradient is doubled between the GEMMs."""

    def activate(self, pre_SN):
        return _ScaledGradient.apply(super().activate(pre_SN))


class WideFirstGemm(LocalMoE):
    """A third of the first GEMM's columns is thrown away."""

    def __init__(self, **shape):
        super().__init__(**shape)
        third = self.w_in_EHN.shape[2] // 2
        wide = torch.cat([self.w_in_EHN.detach(), self.w_in_EHN.detach()[:, :, :third]], dim=2)
        self.w_in_EHN = nn.Parameter(wide)

    def activate(self, pre_SN):
        gate, up, _ = pre_SN.chunk(3, dim=-1)
        return F.silu(gate) * up


@torch.library.custom_op("zoo::invert_rows", mutates_args=())
def invert_rows(rows: Tensor, order: Tensor) -> Tensor:
    """Undo a permutation of rows, where no compiler can look."""
    out = torch.empty_like(rows)
    out[order] = rows
    return out


@invert_rows.register_fake
def _invert_rows_fake(rows: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(rows)


class OpaqueUnpermute(LocalMoE):
    """The un-permutation is a custom op (without a gradient)."""

    trains = False

    def reduce(self, out_SH, scores_TA, order_S, x):
        slots_TAH = invert_rows(out_SH, order_S).view(-1, self.top_k, x.shape[-1])
        return (slots_TAH * scores_TA.unsqueeze(-1).to(x.dtype)).sum(dim=1)


class BatchedMoE(LocalMoE):
    """The same layer with one weight gathered per row and a batched GEMM."""

    def forward(self, x):
        scores_TA, ids_TA = ep.route(x, self.gate, self.top_k)
        ids_S = self.expert_ids(ids_TA.view(-1))
        rows_S1H = x.repeat_interleave(self.top_k, dim=0).unsqueeze(1)
        pre_SN = torch.bmm(rows_S1H, self.w_in_EHN[ids_S]).squeeze(1)
        out_SH = torch.bmm(self.activate(pre_SN).unsqueeze(1), self.w_out_EIH[ids_S]).squeeze(1)
        slots_TAH = out_SH.view(-1, self.top_k, x.shape[-1])
        return (slots_TAH * scores_TA.unsqueeze(-1).to(x.dtype)).sum(dim=1)

    def expert_ids(self, ids_S):
        return ids_S


class NegativeIds(BatchedMoE):
    """Ids may be -1, which indexes the last expert's weights."""

    def expert_ids(self, ids_S):
        return ids_S - 1


class BreakBetweenGemms(LocalMoE):
    """A graph break leaves one GEMM in each of two graphs."""

    fullgraph = False

    def activate(self, pre_SN):
        torch._dynamo.graph_break()
        return super().activate(pre_SN)


class CombineOnOtherGroup(FuncolMoE):
    """Dispatch on one group, combine on another one with the same members."""

    fullgraph = True

    def __init__(self, group: ep.Group = None, **shape):
        super().__init__(group, **shape)
        self.other_group = dist.new_group(dist.get_process_group_ranks(ep.process_group(group)))

    def combine(self, out_RH, send, receive):
        return ep.all_to_all_rows(out_RH, send, receive, self.other_group)


class SplitsSwapped(FuncolMoE):
    """Rows go home by the splits they came with: runs only where traffic is symmetric."""

    fullgraph = True

    def combine(self, out_RH, send, receive):
        return ep.all_to_all_rows(out_RH, receive, send, self.group)


class ReversedExperts(FuncolMoE):
    """Received rows are sorted by descending expert, the experts are not."""

    fullgraph = True

    def dispatch(self, rows_SH, counts_E):
        rows_RH, perm_R, offs_L, send, receive = super().dispatch(rows_SH, counts_E)
        return rows_RH, perm_R.flip(0), offs_L, send, receive


class DispatchOnly(FuncolMoE):
    """Dispatch and experts without a combine: results stay where the experts are."""

    fullgraph = True

    def combine(self, out_RH, send, receive):
        self.seen = out_RH.float().sum()
        return out_RH.new_zeros((sum(send), out_RH.shape[1]))

    def routed(self, x, scores_TA, ids_TA):
        return super().routed(x, scores_TA, ids_TA) + self.seen.to(x.dtype)


class DispatchedRowsEscape(FuncolMoE):
    """The rows that the dispatch brought are also summed outside the region."""

    fullgraph = True

    def experts(self, rows_RH, offs_L):
        self.seen = rows_RH.float().sum()
        return super().experts(rows_RH, offs_L)

    def routed(self, x, scores_TA, ids_TA):
        out = super().routed(x, scores_TA, ids_TA)
        return out + (self.seen * 1e-3).to(out.dtype)


class BreakAfterDispatch(FuncolMoE):
    """A graph break between dispatch and experts: half a region in each of two graphs."""

    fullgraph = False

    def experts(self, rows_RH, offs_L):
        torch._dynamo.graph_break()
        return super().experts(rows_RH, offs_L)


class BreakAfterSplits(FuncolMoE):
    """The splits are read on the host in one graph and used as plain numbers in the next."""

    fullgraph = False

    def exchange(self, rows_SH, send, receive):
        torch._dynamo.graph_break()
        return super().exchange(rows_SH, send, receive)


class NoSuchGroup(FuncolMoE):
    """The exchanges name a process group that this process has never made."""

    fullgraph = True

    def exchange(self, rows_SH, send, receive):
        out = torch.ops._c10d_functional.all_to_all_single(rows_SH, receive, send, "no_such_group")
        return torch.ops._c10d_functional.wait_tensor(out)

    def combine(self, out_RH, send, receive):
        return self.exchange(out_RH, receive, send)


LOCAL: dict[str, type[LocalMoE]] = {
    "returns_expert_output": ReturnsExpertOutput,
    "returns_pre_activation": ReturnsPreActivation,
    "first_gemm_only": FirstGemmOnly,
    "weights_of_next_row": WeightsOfNextRow,
    "not_unpermuted": NotUnpermuted,
    "unpermuted_twice": UnpermutedTwice,
    "gathers_wrong_token": GathersWrongToken,
    "counts_of_next_expert": CountsOfNextExpert,
    "sine_activation": SineActivation,
    "mixes_rows_between_gemms": MixesRowsBetweenGemms,
    "scales_gradient": ScalesGradient,
    "wide_first_gemm": WideFirstGemm,
    "opaque_unpermute": OpaqueUnpermute,
    "negative_ids": NegativeIds,
    "break_between_gemms": BreakBetweenGemms,
}

DISTRIBUTED: dict[str, type[FuncolMoE]] = {
    "combine_on_other_group": CombineOnOtherGroup,
    "splits_swapped": SplitsSwapped,
    "reversed_experts": ReversedExperts,
    "dispatch_only": DispatchOnly,
    "dispatched_rows_escape": DispatchedRowsEscape,
    "break_after_dispatch": BreakAfterDispatch,
    "break_after_splits": BreakAfterSplits,
}
