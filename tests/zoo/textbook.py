"""Expert parallelism as a tutorial writes it, twice: functional and in-place collectives.

One fused gate/up weight per expert, ids of received rows rebuilt with repeat_interleave and
sorted, inverse permutations by sorting or by scattering an arange.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from zoo.ep import ExpertParallelLayer, all_to_all_rows, process_group


class _FusedGateUp(ExpertParallelLayer):
    """Stores gate and up side by side in one weight [L, H, 2I], down in [L, I, H]."""

    def set_experts(self, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> None:
        fused = torch.cat([w_gate, w_up], dim=1).transpose(1, 2).contiguous()
        self.w_in_LHN = nn.Parameter(fused)
        self.w_out_LIH = nn.Parameter(w_down.transpose(1, 2).contiguous())

    def expert_gradients(self) -> dict[str, Tensor]:
        gate, up = self.w_in_LHN.grad.transpose(1, 2).chunk(2, dim=1)
        return {"w_gate": gate, "w_up": up, "w_down": self.w_out_LIH.grad.transpose(1, 2)}

    def experts(self, rows_RH: Tensor, offs_L: Tensor) -> Tensor:
        """Grouped gated FFN over expert-major rows [R, H]."""
        pre = torch._grouped_mm(rows_RH, self.w_in_LHN, offs=offs_L)
        gate, up = pre.chunk(2, dim=-1)
        return torch._grouped_mm(self.activation(gate) * up, self.w_out_LIH, offs=offs_L)


class FuncolMoE(_FusedGateUp):
    """Functional collectives; weights multiply the rows in their own dtype, then a sum over A."""

    def routed(self, x: Tensor, scores_TA: Tensor, ids_TA: Tensor) -> Tensor:
        ids_S = ids_TA.view(-1)
        order_S = torch.argsort(ids_S, stable=True)
        counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device).scatter_add(
            0, ids_S, torch.ones_like(ids_S)
        )
        rows_RH, perm_R, offs_L, send, receive = self.dispatch(x[order_S // self.top_k], counts_E)
        out_RH = self.experts(rows_RH[perm_R], offs_L)[torch.argsort(perm_R)]
        out_SH = self.combine(out_RH, send, receive)
        slots_SH = torch.zeros_like(out_SH)
        slots_SH[order_S] = out_SH
        slots_TAH = slots_SH.view(-1, self.top_k, x.shape[-1])
        return (slots_TAH * scores_TA.unsqueeze(-1).to(x.dtype)).sum(dim=1)

    def dispatch(
        self, rows_SH: Tensor, counts_E: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[int], list[int]]:
        """Exchange counts and rows; return rows [R, H], their expert-major order, offsets."""
        group = dist.group.WORLD if self.group is None else self.group
        each = [self.num_local_experts] * self.ep_size
        received_E = funcol.all_to_all_single(counts_E, each, each, group)
        received_E = funcol.wait_tensor(received_E)
        received_PL = received_E.view(self.ep_size, -1)
        send = counts_E.view(self.ep_size, -1).sum(1).tolist()
        receive = received_PL.sum(1).tolist()
        rows_RH = self.exchange(rows_SH, send, receive)
        expert_R = (
            torch.arange(self.num_local_experts, device=rows_SH.device)
            .repeat(self.ep_size)
            .repeat_interleave(received_E, output_size=sum(receive))
        )
        offs_L = received_PL.sum(0).cumsum(0).to(torch.int32)
        return rows_RH, torch.argsort(expert_R, stable=True), offs_L, send, receive

    def exchange(self, rows_SH: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Send every row to the rank of its expert: [S, H] -> [R, H]."""
        return all_to_all_rows(rows_SH, receive, send, self.group)

    def combine(self, out_RH: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Send every row home: [R, H] -> [S, H]."""
        return all_to_all_rows(out_RH, send, receive, self.group)


class _ExchangeRows(torch.autograd.Function):
    """An in-place all-to-all made differentiable: its backward swaps the splits."""

    @staticmethod
    def forward(ctx, x, output_splits, input_splits, group):
        ctx.output_splits, ctx.input_splits, ctx.group = output_splits, input_splits, group
        out = x.new_empty((sum(output_splits), x.shape[1]))
        dist.all_to_all_single(out, x.contiguous(), output_splits, input_splits, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty((sum(ctx.input_splits), grad.shape[1]))
        dist.all_to_all_single(
            out, grad.contiguous(), ctx.input_splits, ctx.output_splits, group=ctx.group
        )
        return out, None, None, None


class InPlaceMoE(_FusedGateUp):
    """In-place `dist.all_to_all_single`: for inference, eager does not differentiate it."""

    def routed(self, x: Tensor, scores_TA: Tensor, ids_TA: Tensor) -> Tensor:
        group = process_group(self.group)
        ids_S = ids_TA.view(-1)
        order_S = ids_S.argsort()
        counts_E = torch.nn.functional.one_hot(ids_S, self.num_experts).sum(0)
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E, group=group)
        received_PL = received_E.view(self.ep_size, self.num_local_experts)
        send = counts_E.view(self.ep_size, self.num_local_experts).sum(1).tolist()
        receive = received_PL.sum(1).tolist()

        rows_RH = self.exchange(x[order_S // self.top_k], receive, send, group)
        local_ids = torch.arange(self.num_local_experts, device=x.device).repeat(self.ep_size)
        perm_R = torch.repeat_interleave(local_ids, received_E).argsort(stable=True)
        offs_L = torch.cumsum(received_PL.sum(0), 0, dtype=torch.int32)
        out_RH = self.experts(rows_RH[perm_R], offs_L)
        inverse_R = torch.empty_like(perm_R)
        inverse_R[perm_R] = torch.arange(perm_R.shape[0], device=x.device)
        out_SH = self.exchange(out_RH[inverse_R], send, receive, group)

        weighted_SH = out_SH * scores_TA.view(-1)[order_S].unsqueeze(-1).to(x.dtype)
        return torch.zeros_like(x).index_add(0, order_S // self.top_k, weighted_SH)

    def exchange(
        self, x: Tensor, output_splits: list[int], input_splits: list[int], group
    ) -> Tensor:
        """All-to-all of rows into a fresh buffer."""
        out = torch.empty(sum(output_splits), x.shape[1], dtype=x.dtype, device=x.device)
        dist.all_to_all_single(out, x, output_splits, input_splits, group=group)
        return out


class InPlaceFunctionMoE(InPlaceMoE):
    """The same layer with its exchanges inside an autograd.Function, so that it trains."""

    def exchange(
        self, x: Tensor, output_splits: list[int], input_splits: list[int], group
    ) -> Tensor:
        return _ExchangeRows.apply(x, output_splits, input_splits, group)
