"""Expert parallel layers as other frameworks write them, restated in plain PyTorch.

Each keeps its framework's order of operations: which tensors travel, how rows are ordered, where
the routing weight multiplies, what leaves the layer. Legend as in `ep`; C = slots of an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor
from zoo.ep import Group, all_to_all_rows
from zoo.textbook import _FusedGateUp


def even_all_to_all(x: Tensor, group: Group) -> Tensor:
    """All-to-all with equal splits of the first dimension."""
    target = dist.group.WORLD if group is None else group
    if torch.__version__ >= "2.12":
        return funcol.all_to_all_single(x, None, None, target)
    return funcol.all_to_all_single_autograd(x, None, None, target)


def gathered(x: Tensor, group: Group) -> Tensor:
    """All ranks' values, differentiably, in the spelling that this torch has for it."""
    target = dist.group.WORLD if group is None else group
    newer = getattr(funcol, "all_gather_single_autograd", None)
    return (newer or funcol.all_gather_tensor_autograd)(x, 0, target)


def reduce_scattered(x: Tensor, group: Group) -> Tensor:
    """This rank's part of the sum over all ranks, differentiably."""
    target = dist.group.WORLD if group is None else group
    newer = getattr(funcol, "reduce_scatter_single_autograd", None)
    return (newer or funcol.reduce_scatter_tensor_autograd)(x, "sum", 0, target)


class MegatronAllToAll(_FusedGateUp):
    """Megatron-Core's `MoEAlltoAllTokenDispatcher`: a map [T, E] of who goes where, probabilities
    that travel beside the tokens, weights between the GEMMs. Chunks are sorted by index."""

    def routed(self, x: Tensor, scores_TA: Tensor, ids_TA: Tensor) -> Tensor:
        num_tokens = x.shape[0]
        zeros_TE = torch.zeros(num_tokens, self.num_experts, device=x.device)
        map_TE = zeros_TE.bool().scatter(1, ids_TA, True)
        probs_TE = zeros_TE.to(scores_TA.dtype).scatter(1, ids_TA, scores_TA)
        counts_E = map_TE.sum(0)
        # row by expert, tokens in their own order: the first S of a stable descending sort
        order = torch.argsort(map_TE.T.reshape(-1).int(), descending=True, stable=True)
        flat_S = order[: num_tokens * self.top_k]
        token_S = flat_S % num_tokens
        rows_SH = x.index_select(0, token_S)
        probs_S = probs_TE.T.reshape(-1).index_select(0, flat_S)
        group = dist.group.WORLD if self.group is None else self.group
        with torch.no_grad():
            received_PL = funcol.wait_tensor(
                funcol.all_to_all_single(counts_E.view(self.ep_size, -1), None, None, group)
            )
            send = counts_E.view(self.ep_size, -1).sum(1).tolist()
            receive = received_PL.sum(1).tolist()
        rows_RH = all_to_all_rows(rows_SH, receive, send, self.group)
        probs_R = all_to_all_rows(probs_S.unsqueeze(-1), receive, send, self.group)
        rows_RH, probs_R, back = self.by_expert(rows_RH, probs_R, received_PL)
        offs_L = received_PL.sum(0).cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(rows_RH, self.w_in_LHN, offs=offs_L).chunk(2, dim=-1)
        h_RI = ((self.activation(gate) * up).float() * probs_R).to(x.dtype)
        out_RH = back(torch._grouped_mm(h_RI, self.w_out_LIH, offs=offs_L))
        out_SH = all_to_all_rows(out_RH, send, receive, self.group)
        index_SH = token_S.unsqueeze(1).expand(-1, x.shape[1])
        return torch.zeros_like(x).scatter_add(0, index_SH, out_SH)

    def by_expert(
        self, rows_RH: Tensor, probs_R: Tensor, received_PL: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Rows and probabilities expert by expert, and what brings rows back rank by rank."""
        expert_R = torch.arange(self.num_local_experts).repeat(self.ep_size)
        expert_R = expert_R.repeat_interleave(received_PL.reshape(-1), output_size=rows_RH.shape[0])
        order = torch.argsort(expert_R, stable=True)
        return rows_RH[order], probs_R[order], lambda out: out[torch.argsort(order)]


class MegatronChunks(MegatronAllToAll):
    """The same with Megatron's own `sort_chunks_by_idxs`: split by counts that the host has read,
    and cat. No compiler captures it in one graph."""

    def by_expert(
        self, rows_RH: Tensor, probs_R: Tensor, received_PL: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """As above."""
        numbers = torch.arange(self.num_experts).view(self.ep_size, -1)

        def sort_chunks(rows: Tensor, counts: Tensor, order: Tensor) -> Tensor:
            parts = torch.split(rows, counts.reshape(-1).tolist())
            return torch.cat([parts[i] for i in order.reshape(-1).tolist()])

        def back(out: Tensor) -> Tensor:
            return sort_chunks(out, received_PL.t(), numbers.view(-1, self.ep_size).t())

        rows = sort_chunks(rows_RH, received_PL, numbers.t())
        return rows, sort_chunks(probs_R, received_PL, numbers.t()), back


class MegatronAllGather(_FusedGateUp):
    """Megatron-Core's `MoEAllGatherTokenDispatcher`: every rank gathers all tokens, computes what
    its experts are asked for, and the results are reduced and scattered."""

    def routed(self, x: Tensor, scores_TA: Tensor, ids_TA: Tensor) -> Tensor:
        group = dist.group.WORLD if self.group is None else self.group
        zeros_TE = torch.zeros(x.shape[0], self.num_experts, device=x.device)
        map_TE = zeros_TE.bool().scatter(1, ids_TA, True)
        probs_TE = zeros_TE.to(scores_TA.dtype).scatter(1, ids_TA, scores_TA)
        all_map = funcol.wait_tensor(funcol.all_gather_tensor(map_TE.int(), 0, group)).bool()
        all_probs = gathered(probs_TE, self.group)
        all_x = gathered(x, self.group)
        local_map = all_map[:, self.own]
        local_probs = all_probs[:, self.own]
        counts_L = local_map.sum(0)
        num_rows = int(local_map.sum().item())
        order = torch.argsort(local_map.T.reshape(-1).int(), descending=True, stable=True)
        flat_R = order[:num_rows]
        token_R = flat_R % all_x.shape[0]
        probs_R = local_probs.T.reshape(-1).index_select(0, flat_R)
        offs_L = counts_L.cumsum(0).to(torch.int32)
        out_RH = self.experts(all_x.index_select(0, token_R), offs_L)
        out_RH = (out_RH * probs_R.unsqueeze(-1)).to(x.dtype)
        index_RH = token_R.unsqueeze(1).expand(-1, x.shape[1])
        y = torch.zeros_like(all_x).scatter_add(0, index_RH, out_RH)
        return reduce_scattered(y, self.group)


class GatherReduceScatter(_FusedGateUp):
    """vLLM's and SGLang's all-gather and reduce-scatter: ids of other ranks' experts become strays
    that sort behind all others."""

    def routed(self, x: Tensor, scores_TA: Tensor, ids_TA: Tensor) -> Tensor:
        group = dist.group.WORLD if self.group is None else self.group
        all_x = gathered(x, self.group)
        all_scores = gathered(scores_TA, self.group)
        all_ids = funcol.wait_tensor(funcol.all_gather_tensor(ids_TA, 0, group))
        first = self.own.start
        is_mine = (all_ids >= first) & (all_ids < first + self.num_local_experts)
        local = torch.where(is_mine, all_ids - first, self.num_local_experts)
        flat = local.reshape(-1)
        order = torch.argsort(flat, stable=True)
        token = order // self.top_k
        counts = torch.zeros(self.num_local_experts + 1, dtype=torch.int64).scatter_add(
            0, flat, torch.ones_like(flat)
        )
        offs_L = counts[:-1].cumsum(0).to(torch.int32)
        mine = is_mine.reshape(-1)[order].unsqueeze(1)
        rows = torch.where(mine, all_x[token], 0.0)
        out = torch.where(mine, self.experts(rows, offs_L), 0.0)
        weight = torch.where(mine, all_scores.reshape(-1)[order].unsqueeze(1), 0.0)
        y = torch.zeros_like(all_x).index_add(0, token, (out * weight).to(x.dtype))
        return reduce_scattered(y, self.group)


class DeepSpeedCapacity(_FusedGateUp):
    """DeepSpeed's capacity layer: every expert has C slots, tokens beyond them are dropped."""

    capacity_factor = 1.0

    def capacity(self, num_tokens: int) -> int:
        return max(4, int(self.capacity_factor * num_tokens * self.top_k / self.num_experts))

    def routed(self, x: Tensor, scores_TA: Tensor, ids_TA: Tensor) -> Tensor:
        num_tokens, hidden = x.shape
        capacity = self.capacity(num_tokens)
        # first choices go first, so they are the last to be dropped
        ids_AT = ids_TA.t()
        mask = F.one_hot(ids_AT.reshape(-1), self.num_experts)
        place = ((mask.cumsum(0) - 1) * mask).sum(-1)
        slots = torch.where(
            place < capacity, ids_AT.reshape(-1) * capacity + place, self.num_experts * capacity
        )
        token = torch.arange(num_tokens).repeat(self.top_k)
        source = torch.full((self.num_experts * capacity + 1,), num_tokens).scatter(0, slots, token)
        padded = torch.cat([x, x.new_zeros(1, hidden)])
        dispatched = padded.index_select(0, source[:-1]).view(self.num_experts, capacity, hidden)
        back = self.experts_of_all(even_all_to_all(dispatched, self.group), capacity)
        rows = torch.cat(
            [even_all_to_all(back, self.group).view(-1, hidden), x.new_zeros(1, hidden)]
        )
        taken = rows.index_select(0, slots).view(self.top_k, num_tokens, hidden)
        return (taken * scores_TA.t().unsqueeze(-1)).sum(0).to(x.dtype)

    def experts_of_all(self, rows: Tensor, capacity: int) -> Tensor:
        """[P * L, C, H] -> the same: every local expert on the rows that all ranks sent it."""
        rows_PLCH = rows.view(self.ep_size, self.num_local_experts, capacity, -1)
        out = []
        for expert, chunk in enumerate(rows_PLCH.chunk(self.num_local_experts, dim=1)):
            gate, up = (chunk @ self.w_in_LHN[expert]).chunk(2, dim=-1)
            out.append((self.activation(gate) * up) @ self.w_out_LIH[expert])
        return torch.cat(out, dim=1).reshape(self.num_experts, capacity, -1)


class GShard(DeepSpeedCapacity):
    """GShard's einsums: one-hot tensors [T, E, C] dispatch and combine."""

    def routed(self, x: Tensor, scores_TA: Tensor, ids_TA: Tensor) -> Tensor:
        num_tokens, hidden = x.shape
        capacity = self.capacity(num_tokens)
        combine = x.new_zeros(num_tokens, self.num_experts, capacity, dtype=torch.float32)
        before = torch.zeros(self.num_experts, dtype=torch.int64)
        for choice in range(self.top_k):
            mask = F.one_hot(ids_TA[:, choice], self.num_experts)
            place = mask.cumsum(0) - 1 + before
            before = before + mask.sum(0)
            kept = mask * (place < capacity)
            slot = F.one_hot(((place * kept).sum(-1)).clamp(max=capacity - 1), capacity)
            weight = scores_TA[:, choice : choice + 1] * kept
            combine = combine + weight.unsqueeze(-1) * slot.unsqueeze(1)
        dispatch = (combine != 0).to(x.dtype)
        dispatched = torch.einsum("tec,th->ech", dispatch, x)
        back = self.experts_of_all(even_all_to_all(dispatched, self.group), capacity)
        returned = even_all_to_all(back, self.group).view(self.num_experts, capacity, hidden)
        return torch.einsum("tec,ech->th", combine.to(x.dtype), returned)


class Tutel(DeepSpeedCapacity):
    """Tutel's layout: capacity slots, batched matmuls over [L, P * C, H]."""

    def experts_of_all(self, rows: Tensor, capacity: int) -> Tensor:
        rows_PLCH = rows.view(self.ep_size, self.num_local_experts, capacity, -1)
        rows_LRH = rows_PLCH.permute(1, 0, 2, 3).reshape(self.num_local_experts, -1, rows.shape[-1])
        gate, up = torch.matmul(rows_LRH, self.w_in_LHN).chunk(2, dim=-1)
        out = torch.matmul(self.activation(gate) * up, self.w_out_LIH)
        out = out.view(self.num_local_experts, self.ep_size, capacity, -1).permute(1, 0, 2, 3)
        return out.reshape(self.num_experts, capacity, -1)


class FairseqBase(_FusedGateUp):
    """fairseq's `BaseLayer`: one expert a rank, top-1, plain matrices."""

    def routed(self, x: Tensor, scores_TA: Tensor, ids_TA: Tensor) -> Tensor:
        assert self.top_k == self.num_local_experts == 1
        order_S = torch.argsort(ids_TA.view(-1), stable=True)
        counts_E = torch.histc(
            ids_TA.view(-1).float(), self.num_experts, 0, self.num_experts - 1
        ).long()
        group = dist.group.WORLD if self.group is None else self.group
        received_P = funcol.wait_tensor(funcol.all_to_all_single(counts_E, None, None, group))
        send, receive = counts_E.tolist(), received_P.tolist()
        rows_RH = all_to_all_rows(x[order_S], receive, send, self.group)
        gate, up = (rows_RH @ self.w_in_LHN[0]).chunk(2, dim=-1)
        out_RH = (self.activation(gate) * up) @ self.w_out_LIH[0]
        out_SH = all_to_all_rows(out_RH, send, receive, self.group)
        return out_SH[torch.argsort(order_S)] * scores_TA.to(x.dtype)


class TitanPadded(_FusedGateUp):
    """torchtitan until March 2026: every expert's rows are padded to a multiple of 8, an expert
    without rows to 8; -1 in the permutation picks a row of zeros that is appended."""

    align = 8

    def routed(self, x: Tensor, scores_TA: Tensor, ids_TA: Tensor) -> Tensor:
        counts_E = torch.histc(
            ids_TA.view(-1).float(), self.num_experts, 0, self.num_experts - 1
        ).long()
        order_S = torch.argsort(ids_TA.view(-1), stable=True)
        group = dist.group.WORLD if self.group is None else self.group
        with torch.no_grad():
            received_PL = funcol.wait_tensor(
                funcol.all_to_all_single(counts_E.view(self.ep_size, -1), None, None, group)
            )
            send = counts_E.view(self.ep_size, -1).sum(1).tolist()
            receive = received_PL.sum(1).tolist()
        rows_RH = all_to_all_rows(x[order_S // self.top_k], receive, send, self.group)
        perm, offs_L = self.padded_order(received_PL, rows_RH.shape[0])
        padded = torch.vstack((rows_RH, rows_RH.new_zeros(1, rows_RH.shape[1])))
        out = self.experts(padded[perm], offs_L)
        unpadded = out.new_zeros(padded.shape)
        unpadded[perm] = out
        out_SH = all_to_all_rows(unpadded[:-1], send, receive, self.group)
        back_SH = torch.zeros_like(out_SH)
        back_SH[order_S] = out_SH
        back_TAH = back_SH.view(-1, self.top_k, x.shape[1]).float()
        return torch.bmm(scores_TA.unsqueeze(1), back_TAH).squeeze(1).to(x.dtype)

    def padded_order(self, received_PL: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """(received row of every padded row or -1, where each expert's padded rows end)."""
        total_L = received_PL.sum(0)
        padded_L = ((total_L + self.align - 1) // self.align * self.align).clamp(min=self.align)
        ends_L = padded_L.cumsum(0)
        starts_E = received_PL.reshape(-1).cumsum(0) - received_PL.reshape(-1)
        # where the rows of (rank, expert) begin among the expert's
        inner_PL = received_PL.cumsum(0) - received_PL
        first_E = (inner_PL + (ends_L - padded_L)).reshape(-1)
        segment_R = torch.arange(self.num_experts).repeat_interleave(
            received_PL.reshape(-1), output_size=num_rows
        )
        place_R = first_E[segment_R] + torch.arange(num_rows) - starts_E[segment_R]
        room = num_rows + self.num_local_experts * self.align
        room = (room + self.align - 1) // self.align * self.align
        perm = torch.full((room,), -1).scatter(0, place_R, torch.arange(num_rows))
        return perm, ends_L.to(torch.int32)


class MegaBlocks(_FusedGateUp):
    """MegaBlocks' dropless layer with the grouped MLP: received rows are sorted by the remainder of
    their expert's number, and the weights multiply where the tokens came from."""

    def routed(self, x: Tensor, scores_TA: Tensor, ids_TA: Tensor) -> Tensor:
        sorted_S, order_S = torch.sort(ids_TA.reshape(-1))
        counts_E = torch.histc(sorted_S.float(), self.num_experts, 0, self.num_experts - 1).long()
        group = dist.group.WORLD if self.group is None else self.group
        received_E = funcol.wait_tensor(funcol.all_to_all_single(counts_E, None, None, group))
        send = counts_E.view(self.ep_size, -1).sum(-1).tolist()
        receive = received_E.view(self.ep_size, -1).sum(-1).tolist()
        rows_RH = all_to_all_rows(
            x.index_select(0, order_S // self.top_k), receive, send, self.group
        )
        local_E = torch.remainder(torch.arange(self.num_experts), self.num_local_experts)
        expert_R = local_E.repeat_interleave(received_E, output_size=rows_RH.shape[0])
        _, order_R = torch.sort(expert_R)
        offs_L = received_E.view(self.ep_size, -1).sum(0).cumsum(0).to(torch.int32)
        out_RH = self.experts(rows_RH.index_select(0, order_R), offs_L)
        unsorted_RH = torch.zeros_like(out_RH).index_copy(0, order_R, out_RH)
        out_SH = all_to_all_rows(unsorted_RH, send, receive, self.group)
        weight_S1 = scores_TA.reshape(-1).index_select(0, order_S).unsqueeze(1)
        return torch.zeros_like(x).index_add(
            0, order_S // self.top_k, (out_SH * weight_S1).to(x.dtype)
        )
