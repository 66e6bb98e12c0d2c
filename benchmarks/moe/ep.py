"""Suite "ep": one MoE layer over the ranks of a group, as torchtitan writes it.

Tokens are sharded, experts too; rows travel by all-to-all with splits that are read on the host.
The layer starts from router logits, so softmax, top-k and all index arithmetic are in the timed
region. Every rank can draw every other's tokens and weights from their seeds, so references need
no communication.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn

from moe_bench import layers
from moe_bench.errors import layer_errors
from moe_bench.shapes import Case, Shape
from moe_bench.workload import Workload


class ExpertParallelMoE(nn.Module):
    """torchtitan's dispatcher and grouped experts, routing weights in float32 after the combine.

    Rank p of P holds the experts [p * L, (p + 1) * L) in three weights [L, I, H], [L, I, H],
    [L, H, I].
    """

    def __init__(self, shape: Shape, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__()
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.num_experts, self.top_k = shape.num_experts, shape.top_k
        own = own_experts(shape, group)
        size_in = (len(own), shape.inter, shape.hidden)
        size_out = (len(own), shape.hidden, shape.inter)
        self.w1, self.w3, self.w2 = (
            nn.Parameter(torch.empty(size, device=device, dtype=layers.DTYPE))
            for size in (size_in, size_in, size_out)
        )
        with torch.no_grad():
            for local, expert in enumerate(own):
                gate_up, down = layers.draw_expert(shape, expert, device)
                self.w1[local], self.w3[local] = gate_up.chunk(2)
                self.w2[local] = down

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        """x [T, H], logits [T, E] -> [T, H]."""
        scores_TA, ids_TA = torch.softmax(logits, dim=-1).topk(self.top_k, dim=-1)
        order_S = torch.argsort(ids_TA.view(-1), stable=True)
        token_S = order_S // self.top_k
        counts_E = torch.zeros(
            (x.shape[0], self.num_experts), dtype=torch.bool, device=x.device
        ).scatter_(-1, ids_TA, True)
        rows_RH, perm_R, counts_L, splits = self.dispatch(x[token_S], counts_E.sum(0))
        out_RH = self.experts(rows_RH, counts_L)
        unpermuted_RH = out_RH.new_empty(out_RH.shape)
        unpermuted_RH[perm_R, :] = out_RH
        send, receive = splits
        out_SH = self.exchange(unpermuted_RH, send, receive)
        scores_S1 = scores_TA.view(-1)[order_S].reshape(-1, 1)
        out_SH = (out_SH.to(torch.float32) * scores_S1).to(out_SH.dtype)
        index_SH = token_S.reshape(-1, 1).expand(-1, x.shape[-1])
        return torch.zeros_like(x).scatter_add(0, index_SH, out_SH)

    def dispatch(
        self, rows_SH: Tensor, counts_E: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[list[int], list[int]]]:
        """Exchange counts, read the splits on the host, exchange rows, go expert-major."""
        with torch.no_grad():
            received_E = funcol.all_to_all_single(counts_E, None, None, group=self.group)
            received_E = torch.ops._c10d_functional.wait_tensor(received_E)
            received_PL = received_E.view(self.num_ranks, -1)
            send = counts_E.view(self.num_ranks, -1).sum(dim=1).to("cpu", non_blocking=True)
            receive = received_PL.sum(dim=1).to("cpu", non_blocking=False)
            send, receive = send.tolist(), receive.tolist()
        rows_RH = self.exchange(rows_SH, receive, send)
        starts_PL = (received_E.cumsum(0) - received_E).view(self.num_ranks, -1)
        lengths_E, starts_E = received_PL.t().reshape(-1), starts_PL.t().reshape(-1)
        segment_R = torch.arange(lengths_E.shape[0], device=rows_SH.device).repeat_interleave(
            lengths_E, output_size=rows_RH.shape[0]
        )
        place_R = torch.arange(rows_RH.shape[0], device=rows_SH.device)
        perm_R = starts_E[segment_R] + place_R - (lengths_E.cumsum(0) - lengths_E)[segment_R]
        return rows_RH[perm_R, :], perm_R, received_PL.sum(0), (send, receive)

    def experts(self, rows_RH: Tensor, counts_L: Tensor) -> Tensor:
        """Grouped gated FFN over expert-major rows: [R, H] -> [R, H]."""
        offs_L = torch.cumsum(counts_L, dim=0, dtype=torch.int32)
        gate_RI = torch._grouped_mm(rows_RH, self.w1.transpose(-2, -1), offs=offs_L)
        up_RI = torch._grouped_mm(rows_RH, self.w3.transpose(-2, -1), offs=offs_L)
        hidden_RI = F.silu(gate_RI) * up_RI
        return torch._grouped_mm(hidden_RI, self.w2.transpose(-2, -1), offs=offs_L)

    def exchange(self, rows: Tensor, output_splits: list[int], input_splits: list[int]) -> Tensor:
        """Return the rows that the other ranks send."""
        if torch.__version__ >= "2.12":
            return funcol.all_to_all_single(rows, output_splits, input_splits, self.group)
        return funcol.all_to_all_single_autograd(rows, output_splits, input_splits, self.group)


def own_experts(shape: Shape, group: dist.ProcessGroup) -> range:
    """Return the experts of this rank."""
    num_ranks = dist.get_world_size(group)
    if shape.num_experts % num_ranks:
        raise ValueError(
            f"{shape.name} has {shape.num_experts} experts, which {num_ranks} ranks cannot share "
            "evenly; run with a number of ranks that divides it"
        )
    each = shape.num_experts // num_ranks
    first = dist.get_rank(group) * each
    return range(first, first + each)


def tokens_of(case: Case, rank: int, num_ranks: int) -> int:
    """Return how many tokens the rank has."""
    return 0 if case.skew == "empty" and rank == num_ranks - 1 else case.tokens


def workloads(case: Case, device: torch.device, group: dist.ProcessGroup) -> list[Workload]:
    """Return a workload per mode of the case, over the same weights and inputs."""
    shape, rank, num_ranks = case.shape, dist.get_rank(group), dist.get_world_size(group)
    layer = ExpertParallelMoE(shape, group, device)
    drawn = []
    for peer in range(num_ranks):
        tokens = tokens_of(case, peer, num_ranks)
        x = layers.draw_tokens(shape, tokens, device, 100 * peer)
        logits = layers.draw_logits(shape, tokens, device, 100 * peer, hot=case.skew == "hot")
        weights, ids = torch.softmax(logits, dim=-1).topk(shape.top_k, dim=-1)
        grad_y = layers.draw_tokens(shape, tokens, device, 100 * peer + 1)
        drawn.append((x, logits, ids, weights, grad_y))
    own_drawn = drawn[rank]
    every = [torch.cat(tensors) for tensors in zip(*drawn, strict=True)]
    del drawn
    gemms, rows_RH, grad_RH = bare_gemms(layer, shape, every, own_experts(shape, group))
    return [
        _workload(case, mode, layer, own_drawn, every, (gemms, rows_RH, grad_RH), group)
        for mode in case.modes
    ]


def bare_gemms(
    layer: ExpertParallelMoE, shape: Shape, every: list[Tensor], own: range
) -> tuple[layers.BareGemms, Tensor, Tensor]:
    """Return the "gemms" baseline with the rows [R, H] that reach this rank, and gradients."""
    x, _, ids, _, grad_y = every
    mine = (ids >= own.start) & (ids < own.stop)
    local_R, order_R = torch.sort(ids[mine] - own.start)
    token_R = mine.nonzero()[:, 0][order_R]
    gate_up = nn.Parameter(torch.cat([layer.w1, layer.w3], dim=1).detach())
    return layers.BareGemms(gate_up, layer.w2, local_R), x[token_R], grad_y[token_R]


def _workload(
    case: Case,
    mode: str,
    layer: ExpertParallelMoE,
    own_drawn: tuple[Tensor, ...],
    every: list[Tensor],
    bare: tuple[layers.BareGemms, Tensor, Tensor],
    group: dist.ProcessGroup,
) -> Workload:
    shape, train = case.shape, mode == "train"
    own = own_experts(shape, group)
    _, _, ids, weights, grad_y = own_drawn
    gemms, rows_RH, grad_RH = bare
    x, logits, rows_RH = (
        t.detach().requires_grad_(train) for t in (own_drawn[0], own_drawn[1], rows_RH)
    )

    def weights_of(expert: int) -> tuple[Tensor, Tensor]:
        return layers.draw_expert(shape, expert, x.device)

    def grads_of(expert: int) -> tuple[Tensor, Tensor]:
        local = expert - own.start
        d_gate_up = torch.cat([layer.w1.grad[local], layer.w3.grad[local]])
        return d_gate_up, layer.w2.grad[local]

    def errors(out: Tensor) -> dict[str, float]:
        got: dict[str, Any] = {"y": out, "d_x": x.grad} if train else {"y": out}
        experts = range(shape.num_experts)
        grad = grad_y if train else None
        found = layer_errors(x, ids, weights, experts, weights_of, got, grad)
        if train:  # an expert's gradient comes from the tokens of all ranks
            all_x, _, all_ids, all_weights, all_grad = every
            found |= layer_errors(
                all_x, all_ids, all_weights, own, weights_of, {}, all_grad, grads_of
            )
        return found

    mean_tokens = every[0].shape[0] / dist.get_world_size(group)
    return Workload(
        case=case,
        mode=mode,
        layer=layer,
        inputs=(x, logits),
        leaves=[x, logits, rows_RH, *layer.parameters(), gemms.gate_up_proj],
        errors=errors,
        functions={"gemms": gemms},
        inputs_of={"gemms": (rows_RH,)},
        grad_of={"gemms": grad_RH},
        grad_out=grad_y,
        flops=shape.forward_flops(1) * mean_tokens,
        host_splits=True,
    )
