"""Tokens to the ranks that hold their experts and sums back, in chunks, through torch.distributed.

A token's row crosses to a rank once, however many of its experts live there, with its ids and
weights beside it; what comes back is one row, summed over those experts. So the receiver solves a
local routed layer, and the home rank adds at most P rows per token.

Every rank cuts its tokens in the same number of slices. One all-gather tells all ranks how many
rows every slice sends to every rank; from it they merge slices into chunks by the same rule, and
know all sizes of all chunks. All ranks, also one without a token, then issue the same collectives
in the same order.

Legend: T tokens, A experts per token, L local experts, P ranks of the group, C chunks, Tc tokens
of a chunk, R rows received, H model dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from comet_compile.kernels.routing import sum_by_token

NUM_SLICES = 8

# Below this, an exchange takes the same time however little it moves: NCCL all_to_all_single took
# 0.071 / 0.077 / 0.175 ms for 1 / 16 / 64 MiB (2 x H100 NVLink, NCCL 2.28.9, 2026-11), so smaller
# chunks would only add launches.
MIN_CHUNK_BYTES = 16 * 2**20


def choose_num_chunks(exchange_bytes: int) -> int:
    """Return in how many chunks to move `exchange_bytes`, the most that any rank receives."""
    num_chunks = 1
    while num_chunks < NUM_SLICES and exchange_bytes // (2 * num_chunks) >= MIN_CHUNK_BYTES:
        num_chunks *= 2
    return num_chunks


@dataclasses.dataclass(frozen=True, eq=False)
class Pending:
    """A collective in flight; `wait` returns its result."""

    work: Any
    result: Tensor
    # The source must outlive the collective that reads it.
    source: Tensor

    def wait(self) -> Tensor:
        """Return the result. On CUDA the current stream waits, the host does not."""
        self.work.wait()
        return self.result


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """One chunk of this rank's tokens and what it exchanges for them.

    `sends_TP` [Tc, P] marks which ranks a token goes to. Sent rows are ordered by (rank, token).
    """

    first_token: int
    num_tokens: int
    sends_TP: Tensor
    send_rows: list[int]
    recv_rows: list[int]
    recv_slots: int
    group: dist.ProcessGroup

    @property
    def tokens(self) -> slice:
        """The chunk's tokens as a slice of [T, ...] tensors."""
        return slice(self.first_token, self.first_token + self.num_tokens)

    @functools.cached_property
    def sent_flat(self) -> Tensor:
        """[rows sent], ``rank * Tc + token`` of each sent row."""
        # A stable sort, because torch.nonzero reads the device.
        unsent = (~self.sends_TP).t().reshape(-1).to(torch.uint8)
        return torch.argsort(unsent, stable=True)[: sum(self.send_rows)]

    @functools.cached_property
    def sent_token(self) -> Tensor:
        """[rows sent], the token of each sent row, counted from the chunk's first."""
        return self.sent_flat % max(self.num_tokens, 1)

    def start_dispatch(self, rows: Tensor) -> Pending:
        """Send the chunk's part of `rows` [T, ...]; the result is [R, ...] by (rank, token)."""
        source = rows[self.tokens].index_select(0, self.sent_token)
        return _start_all_to_all(source, self.send_rows, self.recv_rows, self.group)

    def start_return(self, rows: Tensor) -> Pending:
        """Send `rows` [R, ...] back; the result is [rows sent, ...] by (rank, token)."""
        return _start_all_to_all(rows, self.recv_rows, self.send_rows, self.group)

    def sum_returned(self, rows: Tensor) -> Tensor:
        """Sum returned rows [rows sent, H] over the ranks: [Tc, H], accumulated in float32."""
        num_ranks = len(self.send_rows)
        # Numbered like slots, token first, so that each token adds its ranks in rank order.
        slot = self.sent_token * num_ranks + self.sent_flat // max(self.num_tokens, 1)
        return sum_by_token(rows, slot, self.num_tokens, num_ranks)

    def take_returned(self, columns: Tensor, dest_TA: Tensor) -> Tensor:
        """Pick each slot's value [Tc, A] from the row its rank returned, [rows sent, A].

        `dest_TA` [Tc, A] is the rank of each slot, P for none; those come out zero.
        """
        num_ranks = len(self.send_rows)
        if columns.shape[0] == 0:
            return columns.new_zeros(dest_TA.shape)
        row_of_flat = torch.zeros(
            num_ranks * self.num_tokens, dtype=torch.int64, device=columns.device
        )
        row_of_flat[self.sent_flat] = torch.arange(columns.shape[0], device=columns.device)
        has_rank = dest_TA < num_ranks
        token_T1 = torch.arange(self.num_tokens, device=columns.device).unsqueeze(1)
        flat_TA = dest_TA.clamp(max=num_ranks - 1) * self.num_tokens + token_T1
        # gather along dim 0 keeps the column: slot a of a token is column a of its row
        return columns.gather(0, row_of_flat[flat_TA]).masked_fill(~has_rank, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """The chunks of one routed layer call; `dest_TA` is the rank of each slot, P for none."""

    chunks: list[Chunk]
    dest_TA: Tensor


def plan_exchange(
    ids_TA: Tensor, num_local_experts: int, row_bytes: int, group: dist.ProcessGroup
) -> Exchange:
    """Agree with the group on chunks and sizes: one all-gather and one read by the host.

    `row_bytes` is what one row of a token costs on the way out, the same on every rank.
    """
    num_ranks, rank = group.size(), group.rank()
    num_tokens = ids_TA.shape[0]
    dest_TA = _destination_ranks(ids_TA, num_local_experts, num_ranks)
    slots_TP = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.int64, device=ids_TA.device)
    slots_TP.scatter_add_(1, dest_TA, torch.ones_like(dest_TA))
    slots_TP = slots_TP[:, :num_ranks]
    sends_TP = slots_TP > 0

    bounds = [s * num_tokens // NUM_SLICES for s in range(NUM_SLICES + 1)]
    # nested as source, slice, destination, then rows and slots
    counts = _all_gather_counts(torch.stack((sends_TP.long(), slots_TP), dim=2), bounds, group)
    busiest_rows = max(
        sum(counts[src][s][dst][0] for src in range(num_ranks) for s in range(NUM_SLICES))
        for dst in range(num_ranks)
    )
    num_chunks = choose_num_chunks(busiest_rows * row_bytes)
    per_chunk = NUM_SLICES // num_chunks

    def total(source: int, chunk: int, destination: int, kind: int) -> int:
        slices = range(chunk * per_chunk, (chunk + 1) * per_chunk)
        return sum(counts[source][s][destination][kind] for s in slices)

    chunks = []
    for c in range(num_chunks):
        first, last = bounds[c * per_chunk], bounds[(c + 1) * per_chunk]
        chunks.append(
            Chunk(
                first_token=first,
                num_tokens=last - first,
                sends_TP=sends_TP[first:last],
                send_rows=[total(rank, c, peer, 0) for peer in range(num_ranks)],
                recv_rows=[total(peer, c, rank, 0) for peer in range(num_ranks)],
                recv_slots=sum(total(peer, c, rank, 1) for peer in range(num_ranks)),
                group=group,
            )
        )
    return Exchange(chunks, dest_TA)


@dataclasses.dataclass(frozen=True)
class RoutingCodec:
    """Ids and weights of a token as one row of bytes, so that they cross in one exchange."""

    num_local_experts: int
    top_k: int
    weights_dtype: torch.dtype | None

    def pack(self, ids_TA: Tensor, weights_TA: Tensor | None) -> Tensor:
        """Return [T, bytes]. Ids stay global: the receiver knows its own first expert."""
        parts = [_reinterpret(ids_TA, torch.uint8)]
        if weights_TA is not None:
            parts.append(_reinterpret(weights_TA, torch.uint8))
        return torch.cat(parts, dim=1)

    def unpack(
        self, packed: Tensor, ids_dtype: torch.dtype, rank: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return (local ids [R, A], weights [R, A]); ids of other ranks fall out of range."""
        id_bytes = self.top_k * ids_dtype.itemsize
        ids = _reinterpret(packed[:, :id_bytes], ids_dtype) - rank * self.num_local_experts
        if self.weights_dtype is None:
            return ids, None
        return ids, _reinterpret(packed[:, id_bytes:], self.weights_dtype)


def _reinterpret(rows: Tensor, dtype: torch.dtype) -> Tensor:
    # Not contiguous(): it keeps any stride of a dim of size 1, and view looks at those too.
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)


def _destination_ranks(ids_TA: Tensor, num_local_experts: int, num_ranks: int) -> Tensor:
    has_expert = (ids_TA >= 0) & (ids_TA < num_local_experts * num_ranks)
    return torch.where(has_expert, ids_TA // num_local_experts, num_ranks).to(torch.int64)


def _all_gather_counts(
    counts_TP2: Tensor, bounds: list[int], group: dist.ProcessGroup
) -> list[list[list[list[int]]]]:
    """Return nested lists [source P][slice][destination P][rows, slots]."""
    running = torch.nn.functional.pad(counts_TP2.cumsum(0), (0, 0, 0, 0, 1, 0))
    mine = running[bounds].diff(dim=0)
    gathered = torch.empty(group.size(), *mine.shape, dtype=mine.dtype, device=mine.device)
    dist.all_gather(list(gathered.unbind(0)), mine, group=group)
    return gathered.tolist()


def _start_all_to_all(
    source: Tensor, send_rows: list[int], recv_rows: list[int], group: dist.ProcessGroup
) -> Pending:
    source = source.contiguous()
    result = source.new_empty(sum(recv_rows), *source.shape[1:])
    work = dist.all_to_all_single(result, source, recv_rows, send_rows, group=group, async_op=True)
    return Pending(work, result, source)
