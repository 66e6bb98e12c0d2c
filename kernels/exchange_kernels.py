"""How tokens reach the ranks of their experts in an all-to-all layer, over symmetric memory.

    publish_tokens     copy this rank's tokens, ids and weights where peers can read them; tell them
    receive_routing    wait for the peers; which of their slots belong to experts of this rank
    pull_tokens        (inside layer0) fetch the tokens behind those slots, each once
    fetch_tokens       the same for a backward that needs no layer0

What goes back is in `exchange_sums`, and for the gradients of routing weights in `grad_routing`.

Peers go by *turn*: turn 0 is this rank, turn r is group rank ``(me + r) % P``. Every rank starts
with another peer, so no link is everyone's first choice. Slots are numbered by turn, then token,
then choice: ``(turn * C + token) * A + choice``, C the capacity in tokens.

Why one buffer of each kind is enough, although calls follow each other: a rank ends its call with
`sum_own`, which waits for every peer's sums; a peer sends those after it has fetched all the tokens
it wanted. So when a rank publishes again, nobody reads its old tokens; and a peer sends its next
sums only after it has seen this rank publish again, when the old ones have been read.

Legend: T tokens, C capacity in tokens, A experts per token, P ranks, L local experts, H model dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from comet_compile.kernels.stamps import FETCHES, IDLES, IN_LAYER0, IN_PUBLISH, OTHERWISE, stamp
from comet_compile.kernels.sync import (
    ROUTING_OF_PEER,
    TOKENS_OF_PEER,
    count_in,
    signal,
    wait,
)

_ROUTING = tl.constexpr(ROUTING_OF_PEER)
_TOKENS = tl.constexpr(TOKENS_OF_PEER)


@triton.jit
def peer_pointer(peers_ptr, rank, offset, DTYPE: tl.constexpr):
    """Return a pointer to byte `offset` of the symmetric buffer of group rank `rank`.

    `peers_ptr` is the address of the table of the buffers' addresses, an integer.
    """
    table = peers_ptr.to(tl.int64).to(tl.pointer_type(tl.int64))
    address = tl.load(table + rank) + offset
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def publish_tokens_kernel(
    x_ptr,  # [T, H], rows stride_x apart
    ids_ptr,  # [T, A]
    weights_ptr,  # [T, A] or None
    grad_ptr,  # [T, H], rows stride_grad apart, or None
    tokens_ptr,  # [P, C, H] symmetric, turn 0 is written
    grads_ptr,  # the same for grad, or None
    ids_out_ptr,  # [C, A] int32 symmetric
    weights_out_ptr,  # [C, A] float32 symmetric
    num_tokens_ptr,  # [1] int32 symmetric
    peers_ptr,
    ready_offset,  # of [P] int32 flags, by source rank
    done_ptr,  # [1] int32, CTAs of this launch that are done
    epoch_ptr,  # [1] int32, calls that have ended
    num_tokens,
    stride_x,
    stride_grad,
    me,
    trace_ptr,  # `stamps`, or None
    A: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Grid: any number of programs, each taking every num_programs-th block of BT tokens."""
    pid = tl.program_id(0)
    stamp(trace_ptr, IN_PUBLISH, OTHERWISE, pid, CLOCK)
    for block in tl.range(pid, tl.cdiv(num_tokens, BT), tl.num_programs(0)):
        token = block * BT + tl.arange(0, BT)
        is_token = token < num_tokens
        for start in range(0, H, BH):
            cols = start + tl.arange(0, BH)
            mask = is_token[:, None] & (cols < H)[None, :]
            rows = token[:, None].to(tl.int64)
            values = tl.load(x_ptr + rows * stride_x + cols[None, :], mask=mask)
            tl.store(tokens_ptr + rows * H + cols[None, :], values, mask=mask)
            if grad_ptr is not None:
                values = tl.load(grad_ptr + rows * stride_grad + cols[None, :], mask=mask)
                tl.store(grads_ptr + rows * H + cols[None, :], values, mask=mask)
        for choice in range(A):
            ids = tl.load(ids_ptr + token * A + choice, mask=is_token, other=-1)
            # compared before narrowing: a stray id of 2**32 would come out as expert 0
            ids = tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)
            tl.store(ids_out_ptr + token * A + choice, ids, mask=is_token)
            if weights_ptr is not None:
                weights = tl.load(weights_ptr + token * A + choice, mask=is_token, other=0.0)
                tl.store(
                    weights_out_ptr + token * A + choice, weights.to(tl.float32), mask=is_token
                )
    if pid == 0:
        tl.store(num_tokens_ptr, num_tokens)
    if count_in(done_ptr, "sys") == tl.num_programs(0) - 1:
        tl.store(done_ptr, 0)
        epoch = tl.load(epoch_ptr) + 1
        for turn in range(1, P):
            ready = peer_pointer(peers_ptr, (me + turn) % P, ready_offset, tl.int32)
            signal(ready + me, epoch, "sys")
    stamp(trace_ptr, IN_PUBLISH, IDLES, pid, CLOCK)


@triton.jit
def receive_routing_kernel(
    peers_ptr,
    ids_offset,
    weights_offset,
    num_tokens_offset,
    ready_ptr,  # [P] int32 symmetric, by source rank
    ids_S_ptr,  # [P * C * A] int32, local expert or L
    weights_S_ptr,  # [P * C * A] float32 or None
    num_tokens_P_ptr,  # [P] int32, by turn
    hist_ptr,  # [NB, E_P]
    counters_ptr,  # [num_counters] int32, set to zero
    num_counters,
    epoch_ptr,
    abort_ptr,
    message_ptr,
    deadline,
    me,
    blocks_per_turn,
    C,
    A: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    E_P: tl.constexpr,
    COUNTERS_P: tl.constexpr,
    BLOCK: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Grid: (blocks of slots of a turn, P). Also counts the slots of each expert in its block."""
    turn = tl.program_id(1)
    source = (me + turn) % P
    epoch = tl.load(epoch_ptr) + 1
    if turn > 0:
        wait(
            ready_ptr + source,
            epoch,
            abort_ptr,
            message_ptr,
            deadline,
            _ROUTING,
            source,
            epoch,
            "sys",
            CLOCK,
        )
    num_tokens = tl.load(peer_pointer(peers_ptr, source, num_tokens_offset, tl.int32))
    num_tokens = tl.where(tl.load(abort_ptr) != 0, 0, num_tokens)
    if tl.program_id(0) == 0:
        tl.store(num_tokens_P_ptr + turn, num_tokens)
        if turn == 0:
            counter = tl.arange(0, COUNTERS_P)
            tl.store(counters_ptr + counter, tl.zeros_like(counter), mask=counter < num_counters)

    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_slot = offs < num_tokens * A
    ids = tl.load(
        peer_pointer(peers_ptr, source, ids_offset, tl.int32) + offs, mask=is_slot, other=-1
    )
    local = ids - me * L
    local = tl.where((ids >= 0) & (local >= 0) & (local < L), local, L)
    slot = turn * C * A + offs
    in_turn = offs < C * A
    tl.store(ids_S_ptr + slot, local, mask=in_turn)
    if weights_S_ptr is not None:
        weights = peer_pointer(peers_ptr, source, weights_offset, tl.float32) + offs
        tl.store(weights_S_ptr + slot, tl.load(weights, mask=is_slot, other=0.0), mask=in_turn)
    block = turn * blocks_per_turn + tl.program_id(0)
    tl.store(hist_ptr + block * E_P + tl.arange(0, E_P), tl.histogram(local, E_P))


@triton.jit
def pull_tokens(
    pid,
    num_programs,
    peers_ptr,
    tokens_offset,
    tokens_ptr,  # [P, C, H] symmetric, turns 1.. are written
    ids_S_ptr,
    num_tokens_P_ptr,
    fetched_ptr,  # [P] int32, blocks fetched of each turn; None: nobody waits for them
    me,
    C,
    trace_ptr,
    A: tl.constexpr,
    L: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    ROWS: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Fetch, turn by turn, the peers' tokens that an expert here wants, in blocks of BT.

    ROWS tokens are in flight at a time. Counts each block in `fetched`, in whatever order the
    programs finish.
    """
    cols = tl.arange(0, BH)
    for turn in range(1, P):
        stamp(trace_ptr, IN_LAYER0, FETCHES, turn, CLOCK)
        num_tokens = tl.load(num_tokens_P_ptr + turn)
        source = peer_pointer(
            peers_ptr, (me + turn) % P, tokens_offset, tokens_ptr.dtype.element_ty
        )
        landing = tokens_ptr + tl.full((), H, tl.int64) * C * turn
        for block in tl.range(pid, tl.cdiv(num_tokens, BT), num_programs):
            for first in range(0, BT, ROWS):
                token = block * BT + first + tl.arange(0, ROWS)
                is_token = token < num_tokens
                wanted = tl.zeros((ROWS,), tl.int32)
                for choice in tl.static_range(A):
                    slot = (turn * C + token) * A + choice
                    local = tl.load(ids_S_ptr + slot, mask=is_token, other=L)
                    wanted |= (local < L).to(tl.int32)
                mask = (wanted != 0)[:, None] & (cols < H)[None, :]
                offs = token[:, None].to(tl.int64) * H + cols[None, :]
                tl.store(landing + offs, tl.load(source + offs, mask=mask), mask=mask)
            if fetched_ptr is not None:
                count_in(fetched_ptr + turn, "gpu")


@triton.jit
def fetch_tokens_kernel(
    tokens_ptr,  # [P, C, H] symmetric, or None
    tokens_offset,
    grads_ptr,  # the same, the gradients of y
    grads_offset,
    peers_ptr,
    ids_S_ptr,
    num_tokens_P_ptr,
    me,
    C,
    A: tl.constexpr,
    L: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Fetch the gradients of the peers' tokens, and the tokens. Grid: any number of programs."""
    pid, num_programs = tl.program_id(0), tl.num_programs(0)
    pull_tokens(
        pid, num_programs, peers_ptr, grads_offset, grads_ptr, ids_S_ptr, num_tokens_P_ptr, None,
        me, C, None, A, L, H, P, BT, BH, ROWS, False,
    )  # fmt: skip
    if tokens_ptr is not None:
        pull_tokens(
            pid, num_programs, peers_ptr, tokens_offset, tokens_ptr, ids_S_ptr, num_tokens_P_ptr,
            None, me, C, None, A, L, H, P, BT, BH, ROWS, False,
        )  # fmt: skip


@triton.jit
def wait_for_turns(
    first,
    last,
    num_tokens_P_ptr,
    fetched_ptr,
    epoch_ptr,
    abort_ptr,
    message_ptr,
    deadline,
    me,
    P: tl.constexpr,
    BT: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Wait until all tokens of turns first .. last - 1 are here."""
    for turn in range(first, last):
        wait(
            fetched_ptr + turn,
            tl.cdiv(tl.load(num_tokens_P_ptr + turn), BT),
            abort_ptr,
            message_ptr,
            deadline,
            _TOKENS,
            (me + turn) % P,
            tl.load(epoch_ptr) + 1,
            "gpu",
            CLOCK,
        )
