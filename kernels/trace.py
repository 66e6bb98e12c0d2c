"""Traces of calls between ranks: their memory, the clocks of the ranks' GPUs, and what they tell.

The kernels' side is `stamps`. The timers of two GPUs differ, so before ranks' stamps are laid side
by side, `clock_offsets` plays ping-pong over symmetric memory: rank 0 notes when it has called and
when it was answered, its peer when it was called. In the round that took least, the peer was called
half way between; what its timer shows more is its offset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from comet_compile.kernels import schedule, stamps
from comet_compile.kernels.exchange_kernels import peer_pointer
from comet_compile.kernels.launch import full_grid, launch
from comet_compile.kernels.schedule import Schedule, Span
from comet_compile.kernels.sync import CLOCK_OF_PEER, signal, wait
from comet_compile.kernels.workspace import Workspace

_ROUNDS = 32
_PHASE = tl.constexpr(CLOCK_OF_PEER)

_KINDS = {
    stamps.MULTIPLY: schedule.MULTIPLY,
    stamps.FETCH: schedule.FETCH,
    stamps.SEND: schedule.SEND,
    stamps.WAIT: schedule.WAIT,
    stamps.OTHER: schedule.OTHER,
}
_NAMES = {
    (stamps.PUBLISH, stamps.OTHER): "publish",
    (stamps.LAYER0, stamps.FETCH): "fetch the tokens of turn {}",
    (stamps.LAYER0, stamps.WAIT): "wait for the tokens of turn {}",
    (stamps.LAYER0, stamps.MULTIPLY): "layer0, tile {}",
    (stamps.LAYER1, stamps.MULTIPLY): "layer1, tile {}",
    (stamps.LAYER1, stamps.WAIT): "wait for the rows of all CTAs",
    (stamps.LAYER1, stamps.SEND): "send block {}",
    (stamps.SUMS, stamps.WAIT): "wait for the sums of rank {}",
    (stamps.SUMS, stamps.OTHER): "add up own tokens",
}


def new_trace(num_lanes: int, capacity: int, device: torch.device | str) -> Tensor:
    """Return an empty trace of `num_lanes` CTAs with room for `capacity` stamps each."""
    trace = torch.zeros(
        stamps.HEADER + num_lanes * (1 + 2 * capacity), dtype=torch.int64, device=device
    )
    trace[0], trace[1] = num_lanes, capacity
    return trace


def spans_of(trace: Tensor, rank: int, offset_ns: int = 0) -> tuple[list[Span], int]:
    """Return what the CTAs of a rank did, in microseconds of its timer, and how many stamps found
    no room.

    `offset_ns` is subtracted from the times. A span begins with a stamp and ends with the next one
    of its lane; idling is none.
    """
    values = trace.tolist()
    num_lanes, capacity = values[: stamps.HEADER]
    spans, lost = [], 0
    for lane in range(num_lanes):
        first = stamps.HEADER + lane * (1 + 2 * capacity)
        count = values[first]
        lost += max(0, count - capacity)
        pairs = values[first + 1 : first + 1 + 2 * min(count, capacity)]
        codes, times = pairs[::2], [(time - offset_ns) / 1e3 for time in pairs[1::2]]
        for code, begin, end in zip(codes, times, times[1:], strict=False):
            stage, action, value = code >> 35, code >> 32 & 7, code & 0xFFFFFFFF
            if action != stamps.IDLE:
                name = _NAMES[stage, action].format(value)
                spans.append(Span(rank, lane, _KINDS[action], name, begin, end))
    return spans, lost


def schedule_of(traces: Sequence[Tensor], offsets_ns: Sequence[int]) -> tuple[Schedule, int]:
    """Return the schedule of all ranks, from the moment when the first of them began, and how many
    stamps are missing in it."""
    spans: list[Span] = []
    lost = 0
    for rank, (trace, offset) in enumerate(zip(traces, offsets_ns, strict=True)):
        found, more = spans_of(trace, rank, offset)
        spans += found
        lost += more
    begin = min((span.begin for span in spans), default=0.0)
    moved = [
        Span(one.rank, one.cta, one.kind, one.name, one.begin - begin, one.end - begin)
        for one in spans
    ]
    return Schedule(moved, int(traces[0][0])), lost


def clock_offsets(workspace: Workspace, group: dist.ProcessGroup, deadline: float) -> list[int]:
    """Return by how many nanoseconds every rank's timer is ahead of rank 0's; all ranks call it.

    As good as the way there is as long as the way back, which between GPUs of one machine it is.
    """
    device, rank = workspace.buffer.device, workspace.rank
    times = torch.zeros(workspace.num_ranks, _ROUNDS, 2, dtype=torch.int64, device=device)
    for peer in range(1, workspace.num_ranks):
        if rank in (0, peer):
            launch(
                ping_pong_kernel,
                full_grid(1),
                times[peer],
                workspace.peers,
                workspace.CLOCK,
                workspace.flags(workspace.CLOCK),
                workspace.abort,
                workspace.message,
                int(deadline * 1e9),
                # flags only grow, and rank 0 has one for all its peers
                2 * _ROUNDS * (workspace.num_ranks * workspace.clocks_read + peer),
                peer if rank == 0 else 0,
                ROUNDS=_ROUNDS,
                CALLS=rank == 0,
                num_warps=1,
            )
    workspace.clocks_read += 1
    torch.cuda.synchronize(device)
    workspace.check()
    gathered: list[list[list[list[int]]]] = [[] for _ in range(workspace.num_ranks)]
    dist.all_gather_object(gathered, times.tolist(), group=group)
    return [
        0 if peer == 0 else offset_of(gathered[0][peer], [here for here, _ in gathered[peer][peer]])
        for peer in range(workspace.num_ranks)
    ]


def offset_of(calls: Sequence[Sequence[int]], seen: Sequence[int]) -> int:
    """Return by how much a timer is ahead, from (called, answered) of the other timer and what it
    showed when it was called, round by round."""
    (called, answered), here = min(
        zip(calls, seen, strict=True), key=lambda one: one[0][1] - one[0][0]
    )
    return here - (called + answered) // 2


@triton.jit
def ping_pong_kernel(
    times_ptr,  # [ROUNDS, 2] int64
    peers_ptr,
    flag_offset,
    flag_ptr,
    abort_ptr,
    message_ptr,
    deadline,
    base,
    peer,
    ROUNDS: tl.constexpr,
    CALLS: tl.constexpr,
):
    """Grid: one program. CALLS: note when the peer was called and when it has answered; else when
    this rank was called."""
    other = peer_pointer(peers_ptr, peer, flag_offset, tl.int32)
    for turn in range(ROUNDS):
        mine = base + 2 * turn + (2 if CALLS else 1)
        if CALLS:
            tl.store(times_ptr + 2 * turn, globaltimer())
            signal(other, mine - 1, "sys")
        wait(flag_ptr, mine, abort_ptr, message_ptr, deadline, _PHASE, peer, base, "sys", True)
        if CALLS:
            tl.store(times_ptr + 2 * turn + 1, globaltimer())
        else:
            tl.store(times_ptr + 2 * turn, globaltimer())
            signal(other, mine + 1, "sys")
