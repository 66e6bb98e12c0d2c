"""torchtitan's expert parallel layer (August 2026), restated in plain PyTorch.

`AllToAllTokenDispatcher` around `GroupedExperts`: rank-major rows are brought into expert-major
order without padding, three separate weights w1, w3, w2, scores applied in float32 after the
combine (or, as an option of older releases, before the dispatch).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from zoo.ep import ExpertParallelLayer, Group, all_to_all_rows


class TitanMoE(ExpertParallelLayer):
    """Router, dispatcher and grouped experts; `group` is a process group or a DeviceMesh."""

    def __init__(self, group: Group = None, *, score_before_experts: bool = False, **shape):
        self.score_before_experts = score_before_experts
        self.weight_place = "before" if score_before_experts else "after"
        super().__init__(group, **shape)

    def set_experts(self, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> None:
        self.w1_LIH = nn.Parameter(w_gate.clone())
        self.w3_LIH = nn.Parameter(w_up.clone())
        self.w2_LHI = nn.Parameter(w_down.clone())

    def expert_gradients(self) -> dict[str, Tensor]:
        return {"w_gate": self.w1_LIH.grad, "w_up": self.w3_LIH.grad, "w_down": self.w2_LHI.grad}

    def routed(self, x: Tensor, scores_TA: Tensor, ids_TA: Tensor) -> Tensor:
        counts_E = (
            torch.zeros(x.shape[0], self.num_experts, dtype=torch.bool, device=x.device)
            .scatter_(-1, ids_TA, True)
            .sum(0)
        )
        order_S = torch.argsort(ids_TA.view(-1), stable=True)
        scores_S = scores_TA.view(-1)[order_S]
        token_S = order_S // self.top_k
        rows_SH = x[token_S]
        if self.score_before_experts:
            rows_SH = (rows_SH.to(torch.float32) * scores_S.reshape(-1, 1)).to(x.dtype)
        rows_RH, perm_R, counts_L, splits = self.dispatch(rows_SH, counts_E)
        out_RH = self.experts(rows_RH, counts_L)
        out_SH = self.combine(out_RH, perm_R, splits)
        if not self.score_before_experts:
            out_SH = (out_SH.to(torch.float32) * scores_S.reshape(-1, 1)).to(out_SH.dtype)
        index_SH = token_S.reshape(-1, 1).expand(-1, x.shape[-1])
        return torch.zeros_like(x).scatter_add(0, index_SH, out_SH)

    def dispatch(
        self, rows_SH: Tensor, counts_E: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[list[int], list[int]]]:
        """Exchange counts, read the splits on the host, exchange rows, go expert-major."""
        group = dist.group.WORLD if self.group is None else self.group
        with torch.no_grad():
            counts_PL = funcol.all_to_all_single(
                counts_E.view(self.ep_size, -1), None, None, group=group
            )
            counts_PL = torch.ops._c10d_functional.wait_tensor(counts_PL)
            received_E = counts_PL.reshape(-1)
            cpu = torch.device("cpu")
            send = counts_E.view(self.ep_size, -1).sum(dim=1).to(cpu, non_blocking=True)
            receive = received_E.view(self.ep_size, -1).sum(dim=1).to(cpu, non_blocking=False)
            send, receive = send.tolist(), receive.tolist()
        rows_RH = all_to_all_rows(rows_SH, receive, send, self.group)
        perm_R, counts_L = self.expert_major(received_E, rows_RH.shape[0])
        return rows_RH[perm_R, :], perm_R, counts_L, (send, receive)

    def expert_major(self, received_E: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return the rank-major position of every expert-major row, and the rows per expert."""
        counts_PL = received_E.view(self.ep_size, -1)
        starts_PL = (received_E.cumsum(0) - received_E).view(self.ep_size, -1)
        lengths_E = counts_PL.t().reshape(-1)
        starts_E = starts_PL.t().reshape(-1)
        segments_R = torch.arange(lengths_E.shape[0], device=received_E.device).repeat_interleave(
            lengths_E, output_size=total
        )
        output_starts_E = lengths_E.cumsum(0) - lengths_E
        perm_R = (
            starts_E[segments_R]
            + torch.arange(segments_R.shape[0], device=received_E.device)
            - output_starts_E[segments_R]
        )
        return perm_R, counts_PL.sum(0)

    def experts(self, rows_RH: Tensor, counts_L: Tensor) -> Tensor:
        """Grouped gated FFN over expert-major rows [R, H]."""
        offs_L = torch.cumsum(counts_L, dim=0, dtype=torch.int32)
        x = rows_RH.bfloat16()
        w1, w3, w2 = self.w1_LIH, self.w3_LIH, self.w2_LHI
        h = self.activation(
            torch._grouped_mm(x, w1.bfloat16().transpose(-2, -1), offs=offs_L)
        ) * torch._grouped_mm(x, w3.bfloat16().transpose(-2, -1), offs=offs_L)
        out = torch._grouped_mm(h, w2.bfloat16().transpose(-2, -1), offs=offs_L)
        return out.type_as(rows_RH)

    def combine(
        self, out_RH: Tensor, perm_R: Tensor, splits: tuple[list[int], list[int]]
    ) -> Tensor:
        """Back to rank-major order and home: [R, H] -> [S, H]."""
        unpermuted_RH = out_RH.new_empty(out_RH.shape)
        unpermuted_RH[perm_R, :] = out_RH
        send, receive = splits
        return all_to_all_rows(unpermuted_RH, send, receive, self.group)
