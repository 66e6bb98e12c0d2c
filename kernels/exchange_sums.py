"""How the experts' results get back to the ranks of their tokens in an all-to-all layer.

    push_sums          (inside layer1) for every token of a peer: the sum over this rank's experts,
                       into the peer's memory
    sum_own            for every own token: this rank's sum and the peers', in float32

`grad_routing` has the same for the gradients of the routing weights: push_scores, sum_scores.
Turns, slots, and why one buffer of each kind is enough: `exchange_kernels`.

Legend: T tokens, C capacity in tokens, A experts per token, P ranks, L local experts, R tile rows,
H model dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from comet_compile.kernels.exchange_kernels import peer_pointer
from comet_compile.kernels.stamps import (
    IDLES,
    IN_LAYER1,
    IN_SUMS,
    OTHERWISE,
    SENDS,
    WAITS,
    stamp,
)
from comet_compile.kernels.sync import OWN_ROWS, PARTS_OF_PEER, count_in, signal, wait

_PARTS = tl.constexpr(PARTS_OF_PEER)
_ROWS = tl.constexpr(OWN_ROWS)


@triton.jit
def sum_of_tokens(
    token,  # [BT] turn * C + token
    is_token,
    rows_ptr,
    row_S_ptr,
    weights_S_ptr,
    cols,  # [BH]
    A: tl.constexpr,
    H: tl.constexpr,
    PRODUCT: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    """Return ([BT, BH] float32, which tokens any expert here has [BT]).

    All BT * A rows are in flight before the first sum.
    """
    total = tl.zeros((BT, BH), tl.float32)
    any_row = tl.full((BT,), -1, tl.int32)
    is_column = (cols < H)[None, :]
    for choice in tl.static_range(A):
        row = tl.load(row_S_ptr + token * A + choice, mask=is_token, other=-1)
        any_row = tl.maximum(any_row, row)
        is_row = row >= 0
        ptrs = rows_ptr + row[:, None].to(tl.int64) * H + cols[None, :]
        values = tl.load(ptrs, mask=is_row[:, None] & is_column, other=0.0)
        if weights_S_ptr is not None:
            # a weight beside a stray id may be anything, NaN included
            weight = tl.load(weights_S_ptr + token * A + choice, mask=is_row, other=0.0)
            values = values.to(PRODUCT) * weight.to(PRODUCT)[:, None]
        total += values.to(tl.float32)
    return total, any_row >= 0


@triton.jit
def push_sums(
    rows_ptr,  # [R, H]
    row_S_ptr,  # [P * C * A]
    weights_S_ptr,  # [P * C * A] or None
    num_tokens_P_ptr,
    peers_ptr,
    sums_offset,  # of [P, C, H], by the receiver's turn
    arrived_offset,  # of [P] int32 flags, by source rank
    task_P_ptr,  # [P] int32, blocks of each turn that a CTA has taken
    done_ptr,  # [1] int32, CTAs whose rows for the peers' tokens are in memory
    sent_ptr,  # [P] int32, blocks that have been sent
    epoch_ptr,
    abort_ptr,
    message_ptr,
    deadline,
    me,
    C,
    trace_ptr,
    A: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    STEPS: tl.constexpr,
    PRODUCT: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Send blocks of STEPS * BT tokens until all of them are taken.

    A token that no expert here wants is not sent: its owner knows which ranks it asked.
    """
    epoch = tl.load(epoch_ptr) + 1
    stamp(trace_ptr, IN_LAYER1, WAITS, me, CLOCK)
    if CLOCK:
        wait(
            done_ptr, tl.num_programs(0), abort_ptr, message_ptr, deadline, _ROWS, me, epoch,
            "gpu", CLOCK,
        )  # fmt: skip
    elif tl.load(done_ptr) < tl.num_programs(0):
        return  # in Triton's interpreter programs come one after another: the last one sends
    dtype = rows_ptr.dtype.element_ty
    BLOCK: tl.constexpr = STEPS * BT
    for turn in range(1, P):
        receiver = (me + turn) % P
        num_tokens = tl.load(num_tokens_P_ptr + turn)
        # one block also where there is no token: it carries the flag
        num_blocks = tl.maximum(1, tl.cdiv(num_tokens, BLOCK))
        # this rank is the receiver's turn P - turn
        sums = peer_pointer(peers_ptr, receiver, sums_offset, dtype)
        sums += (P - turn) * C * tl.full((), H, tl.int64)
        block = tl.atomic_add(task_P_ptr + turn, 1, sem="relaxed")
        while block < num_blocks:
            stamp(trace_ptr, IN_LAYER1, SENDS, block, CLOCK)
            following = tl.atomic_add(task_P_ptr + turn, 1, sem="relaxed")
            for step in range(STEPS):
                token = block * BLOCK + step * BT + tl.arange(0, BT)
                is_token = token < num_tokens
                for start in range(0, H, BH):
                    cols = start + tl.arange(0, BH)
                    total, is_here = sum_of_tokens(
                        turn * C + token, is_token, rows_ptr, row_S_ptr, weights_S_ptr, cols, A, H,
                        PRODUCT, BT, BH,
                    )  # fmt: skip
                    ptrs = sums + token[:, None].to(tl.int64) * H + cols[None, :]
                    mask = is_here[:, None] & (cols < H)[None, :]
                    tl.store(ptrs, total.to(dtype), mask=mask)
            if count_in(sent_ptr + turn, "sys") == num_blocks - 1:  # noqa: SIM102, as in sync.wait
                # What was summed after a wait in vain is garbage: the peer shall wait in vain too.
                if tl.atomic_add(abort_ptr, 0, sem="relaxed", scope="gpu") == 0:
                    arrived = peer_pointer(peers_ptr, receiver, arrived_offset, tl.int32)
                    signal(arrived + me, epoch, "sys")
            block = following


@triton.jit
def sum_own_kernel(
    rows_ptr,
    row_S_ptr,
    weights_S_ptr,
    sums_ptr,  # [P, C, H] symmetric
    ids_ptr,  # [T, A] int32 symmetric, this rank's own
    arrived_ptr,  # [P] int32 symmetric, by source rank
    out_ptr,  # [T, H]
    done_ptr,  # [1] int32
    epoch_ptr,
    abort_ptr,
    message_ptr,
    deadline,
    num_tokens,
    me,
    C,
    trace_ptr,  # `stamps`, or None
    A: tl.constexpr,
    L: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    PRODUCT: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Grid: any number of programs, each taking every num_programs-th BT tokens. Ends the call.

    The sum of a token runs over turns in order, so it is the same from call to call.
    """
    epoch = tl.load(epoch_ptr) + 1
    for turn in range(1, P):
        source = (me + turn) % P
        stamp(trace_ptr, IN_SUMS, WAITS, source, CLOCK)
        wait(
            arrived_ptr + source,
            epoch,
            abort_ptr,
            message_ptr,
            deadline,
            _PARTS,
            source,
            epoch,
            "sys",
            CLOCK,
        )
    is_lost = tl.load(abort_ptr) != 0
    stamp(trace_ptr, IN_SUMS, OTHERWISE, tl.program_id(0), CLOCK)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_tokens, BT), tl.num_programs(0)):
        token = block * BT + tl.arange(0, BT)
        is_token = token < num_tokens
        rows = token[:, None].to(tl.int64) * H
        for start in range(0, H, BH):
            cols = start + tl.arange(0, BH)
            is_column = (cols < H)[None, :]
            total, _ = sum_of_tokens(
                token, is_token, rows_ptr, row_S_ptr, weights_S_ptr, cols, A, H, PRODUCT, BT, BH
            )
            for turn in range(1, P):
                first_expert = ((me + turn) % P) * L
                asked = tl.zeros((BT,), tl.int32)
                for choice in tl.static_range(A):
                    expert = tl.load(ids_ptr + token * A + choice, mask=is_token, other=-1)
                    expert -= first_expert
                    asked += (is_token & (expert >= 0) & (expert < L)).to(tl.int32)
                part = sums_ptr + turn * C * tl.full((), H, tl.int64) + rows + cols[None, :]
                mask = (asked > 0)[:, None] & is_column
                total += tl.load(part, mask=mask, other=0.0).to(tl.float32)
            total = tl.where(is_lost, float("nan"), total)
            tl.store(
                out_ptr + rows + cols[None, :],
                total.to(out_ptr.dtype.element_ty),
                mask=is_token[:, None] & is_column,
            )
    stamp(trace_ptr, IN_SUMS, IDLES, tl.program_id(0), CLOCK)
    if count_in(done_ptr, "gpu") == tl.num_programs(0) - 1:
        tl.store(done_ptr, 0)
        tl.store(epoch_ptr, epoch)
