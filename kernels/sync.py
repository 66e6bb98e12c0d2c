"""Flags between the CTAs of a launch and between the ranks of a group, and waits that end.

A flag is an int32 that only grows; who waits names the value it needs. Flags between ranks hold the
number of the call (its *epoch*), so a replay, a retry or a late peer is never taken for this call.

Memory order. `signal` releases and `wait` acquires, at the scope in which the flag's readers live
(the GPU, or the system for a peer's memory). Both run on one thread of the CTA: the barrier in
front of a signal collects the stores of the other threads, and the one that Triton puts behind a
scalar atomic hands what was acquired to them.

A wait that outlives its deadline sets `abort` and leaves a message for the host; from then on no
wait of this rank waits, and the call's result is filled with NaN. The message is written to
memory of the host, which reads it without asking the device (`workspace.Workspace.check`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

ROUTING_OF_PEER, TOKENS_OF_PEER, PARTS_OF_PEER, OWN_ROWS = range(1, 5)
ENTRY_OF_PEER, SUMS_OF_OWNER, CLOCK_OF_PEER = range(5, 8)
PHASES = {
    ROUTING_OF_PEER: "dispatch: the tokens and routing of the peer",
    TOKENS_OF_PEER: "layer0: the peer's tokens, fetched by this rank",
    OWN_ROWS: "layer1: this rank's own rows",
    PARTS_OF_PEER: "combine: the peer's sums for this rank's tokens",
    ENTRY_OF_PEER: "all-reduce: the peer's entry into the call",
    SUMS_OF_OWNER: "all-reduce: the sums over all ranks of the peer's tokens",
    CLOCK_OF_PEER: "trace: the peer's timer, to compare with",
}

MESSAGE_FIELDS = 4  # phase, peer, epoch, value seen

PATIENCE = tl.constexpr(32)

# Without a clock (in Triton's interpreter) a deadline counts rounds of the loop.
_ROUNDS = 1000


@triton.jit
def signal(flag_ptr, value, SCOPE: tl.constexpr):
    """Set a flag that only this CTA sets, once all of the CTA's stores are done."""
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, value, sem="release", scope=SCOPE)


@triton.jit
def count_in(counter_ptr, SCOPE: tl.constexpr):
    """Add 1 for this CTA, its stores done, and return what was there before.

    Both a release and an acquire: the last to count in has everything that the others stored.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope=SCOPE)


@triton.jit
def wait(
    flag_ptr,
    value,
    abort_ptr,
    message_ptr,
    deadline,
    phase,
    peer,
    epoch,
    SCOPE: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Return once the flag has reached `value`, or `deadline` nanoseconds have passed."""
    seen = tl.atomic_add(flag_ptr, 0, sem="acquire", scope=SCOPE)
    if seen < value:
        aborted = tl.atomic_add(abort_ptr, 0, sem="relaxed", scope="gpu")
        waited = tl.full((), 0, tl.int64)
        if CLOCK:
            start = globaltimer()
        while (seen < value) & (waited < deadline) & (aborted == 0):
            seen = tl.atomic_add(flag_ptr, 0, sem="acquire", scope=SCOPE)
            aborted = tl.atomic_add(abort_ptr, 0, sem="relaxed", scope="gpu")
            if CLOCK:
                waited = globaltimer() - start
            else:
                waited += 1
        if (seen < value) & (aborted == 0):  # noqa: SIM102, not to be evaluated otherwise
            if tl.atomic_xchg(abort_ptr, 1, sem="relaxed", scope="gpu") == 0:
                tl.store(message_ptr + 1, peer)
                tl.store(message_ptr + 2, epoch)
                tl.store(message_ptr + 3, seen)
                tl.debug_barrier()
                tl.atomic_xchg(message_ptr, phase, sem="release", scope="sys")


@triton.jit
def finish_bulk_stores(BULK: tl.constexpr):
    """Wait until the tiles that the copy engine stores for this CTA are in memory.

    A descriptor's store returns when its source has been read. BULK: whether it is the copy engine
    that stores (from sm_90 on); a CTA's own stores need nothing but the barrier of a signal.
    """
    if BULK:
        tl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def keep_pace(arrive_ptr, index, num_tiles, GROUP_M: tl.constexpr, patience, first_group=0):
    """Give the CTAs with the GROUP_M tiles beside tile `index` a moment to begin theirs.

    They multiply with the same matrix. Begun together, they read a box of it from memory once, all
    but the first from L2; a few boxes apart, each reads it for itself, the memory becomes the limit
    and nothing brings them together again. This is a hint, not a barrier: who has looked 20 times
    goes on, and who has done so in vain PATIENCE times in a row (another kernel may hold the
    multiprocessors that the others need) goes on at once until it finds all others begun. Returns
    the patience left.

    `arrive_ptr`: a counter, 0 before the launch, for each GROUP_M tiles, theirs from `first_group`
    on; None: nobody waits.
    """
    if arrive_ptr is not None:
        counter = arrive_ptr + first_group + index // GROUP_M
        expected = tl.minimum(GROUP_M, num_tiles - index // GROUP_M * GROUP_M)
        seen = tl.atomic_add(counter, 1, sem="relaxed") + 1
        rounds = tl.where(patience > 0, 0, 20)
        while (seen < expected) & (rounds < 20):
            seen = tl.atomic_add(counter, 0, sem="relaxed")
            rounds += 1
        patience = tl.where(seen < expected, tl.maximum(patience - 1, 0), PATIENCE)
    return patience


@triton.jit
def keep_pace_in_parts(arrive_ptr, tile, split, num_tiles, GROUP_M: tl.constexpr, patience):
    """`keep_pace` where the first `split` tiles are shared out first, then the others."""
    if tile < split:
        patience = keep_pace(arrive_ptr, tile, split, GROUP_M, patience)
    else:
        first_group = tl.cdiv(split, GROUP_M)
        patience = keep_pace(
            arrive_ptr, tile - split, num_tiles - split, GROUP_M, patience, first_group
        )
    return patience
