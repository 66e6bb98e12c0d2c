"""Symmetric memory of a process group: one workspace, shared by all layers that run on it.

A layer's buffers lie one behind the other in one allocation; their offsets follow from sizes that
all ranks share, so a rank finds its peer's buffer at its own offset. A workspace grows when a layer
first needs more, on all ranks at once, and never shrinks; an outgrown one is kept, since a CUDA
graph may still use it.

Legend: C capacity in tokens, A experts per token, P ranks, H model dim.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from comet_compile.errors import PeerTimeoutError
from comet_compile.kernels.sync import MESSAGE_FIELDS, PHASES

_ALIGNMENT = 256


@dataclasses.dataclass(frozen=True)
class Layout:
    """Byte offsets of a layer's symmetric buffers, the same on every rank."""

    tokens: int  # [P, C, H], turn 0 is the rank's own
    sums: int  # [P, C, H], by turn
    ids: int  # [C, A] int32
    weights: int  # [C, A] float32
    grads: int  # [P, C, H], as `tokens`; only in a backward, as `scores`
    scores: int  # [P, C, A] float32, by turn
    num_bytes: int

    @classmethod
    def of(
        cls,
        capacity: int,
        top_k: int,
        hidden: int,
        num_ranks: int,
        itemsize: int,
        *,
        backward: bool = False,
    ) -> Layout:
        """Return the offsets for a layer."""
        rows = num_ranks * capacity * hidden * itemsize
        table = capacity * top_k * 4
        sums = _aligned(_FLAGS_BYTES + rows)
        ids = _aligned(sums + rows)
        weights = _aligned(ids + table)
        grads = _aligned(weights + table)
        scores = _aligned(grads + (rows if backward else 0))
        end = _aligned(scores + (num_ranks * table if backward else 0))
        return cls(_FLAGS_BYTES, sums, ids, weights, grads, scores, end)


@dataclasses.dataclass(frozen=True)
class ReduceLayout:
    """`Layout` for a layer whose tokens all ranks have; O of them are a rank's to add up."""

    parts: int  # [P, O, H], by turn
    sums: int  # [T, H]
    num_bytes: int

    @classmethod
    def of(cls, num_tokens: int, hidden: int, num_ranks: int, itemsize: int) -> ReduceLayout:
        """Return the offsets for a layer; `itemsize` is that of its result."""
        owned = -(-num_tokens // num_ranks)
        sums = _aligned(_FLAGS_BYTES + num_ranks * owned * hidden * itemsize)
        return cls(_FLAGS_BYTES, sums, _aligned(sums + num_tokens * hidden * itemsize))


# In front of the layer's buffers: flags, which must outlive every layout.
_MAX_RANKS = 64
MAX_COLUMN_BLOCKS = 4  # of an all-reduce, which has flags for each
_READY, _ARRIVED, _SCORED, _PARTS = (4 * _MAX_RANKS * place for place in range(4))
_SUMS = _PARTS + 4 * _MAX_RANKS * MAX_COLUMN_BLOCKS
_NUM_TOKENS = _SUMS + 4 * _MAX_RANKS * MAX_COLUMN_BLOCKS
_CLOCK = _NUM_TOKENS + _ALIGNMENT // 2
_FLAGS_BYTES = _NUM_TOKENS + _ALIGNMENT


class Workspace:
    """A symmetric allocation of one group, with the flags and counters of its calls."""

    READY, ARRIVED, SCORED, NUM_TOKENS = _READY, _ARRIVED, _SCORED, _NUM_TOKENS
    PARTS, SUMS, CLOCK = _PARTS, _SUMS, _CLOCK
    trace: Tensor | None = None
    """Where the kernels of the calls to come note what they do (`stamps`)."""
    clocks_read = 0

    def __init__(self, num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> None:
        # NVLink multicast is neither used nor asked for.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        import torch.distributed._symmetric_memory as symm_mem

        self.num_bytes = num_bytes
        self.group_name = group.group_name
        self.rank, self.num_ranks = group.rank(), group.size()
        self.buffer = symm_mem.empty(num_bytes, dtype=torch.uint8, device=device)
        # Peers count their calls from 0 and read the flags: they are zero before anyone can see
        # them, since the rendezvous waits for all ranks.
        self.buffer[:_FLAGS_BYTES].zero_()
        torch.cuda.synchronize(device)
        self.handle = symm_mem.rendezvous(self.buffer, group.group_name)
        self.peers = self.handle.buffer_ptrs_dev
        self.make_counters(device)
        self._index, self._stream = self.buffer.device.index, torch.cuda.current_stream(device)
        # The kernels write it, the host reads it without asking the device.
        self.message = torch.zeros(MESSAGE_FIELDS, dtype=torch.int32, pin_memory=True)

    def make_counters(self, device: torch.device | str) -> None:
        """Make what this rank alone counts with, all zero.

        `counters` is zeroed again in every all-to-all call, by its first kernel that waits;
        `reduce_counters` by every call of the other form, when it ends.
        """
        num_ranks, num_reduce = self.num_ranks, 3 * MAX_COLUMN_BLOCKS + 1
        every = torch.zeros(5 + num_reduce + 1 + 3 * num_ranks, dtype=torch.int32, device=device)
        self.epoch, self.abort, self.published, self.summed, self.scored = every[:5].split(1)
        self.reduce_counters, self.counters = every[5 : 5 + num_reduce], every[5 + num_reduce :]
        self.done = self.counters[:1]
        self.fetched, self.tasks, self.sent = self.counters[1:].split(num_ranks)

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """All memory that the kernels of a call find at the same address every time."""
        return self.buffer, self.epoch, self.message

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a buffer of this rank."""
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        return self.buffer[offset : offset + size].view(dtype).view(shape)

    def flags(self, offset: int) -> Tensor:
        """Return [P] int32 flags of this rank."""
        return self.view(offset, (self.num_ranks,), torch.int32)

    def enter(self) -> None:
        """Put the call to come behind the last one, also if that ran on another stream."""
        # comparing these numbers takes a tenth of what comparing streams does
        if torch._C._cuda_getCurrentRawStream(self._index) == self._stream.cuda_stream:
            return
        if not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self.buffer.device)
            stream.wait_stream(self._stream)
            self._stream = stream

    @functools.cached_property
    def _words(self) -> Any:
        """The message as an array: to make one at every call takes longer than a small kernel."""
        return self.message.numpy()

    def check(self) -> None:
        """Raise if a kernel of an earlier call has given up waiting."""
        phase = int(self._words[0])
        if phase == 0:
            return
        _, peer, epoch, seen = self.message.tolist()
        raise PeerTimeoutError(
            f"rank {self.rank} of process group {self.group_name!r} gave up waiting for group rank "
            f"{peer} in call {epoch} of its fused layers, phase {PHASES[phase]} (flag at {seen}); "
            "the result of that call is NaN, and this group's fused layers cannot go on. Look for "
            "an earlier error on that rank, or a rank that skips a layer; COMET_AGREEMENT_TIMEOUT "
            "sets the seconds of the wait."
        )


# What is kept belongs to the process groups, which are process-wide themselves.
_workspaces: weakref.WeakKeyDictionary[dist.ProcessGroup, list[Workspace]] = (
    weakref.WeakKeyDictionary()
)


def workspace_for(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> Workspace:
    """Return the group's workspace, grown to `num_bytes` if need be.

    Growing is collective: all ranks ask for the same sizes in the same order.
    """
    kept = _workspaces.setdefault(group, [])
    if not kept or kept[-1].num_bytes < num_bytes:
        kept.append(Workspace(num_bytes, group, device))
    return kept[-1]


def raise_if_lost(group: dist.ProcessGroup) -> None:
    """Raise if a kernel of an earlier call of the group has given up waiting."""
    for workspace in _workspaces.get(group, ()):
        workspace.check()


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
