"""layer1 where every rank has every token: multiply, and all-reduce the sums, in one launch.

    y[t] = sum over ranks, sum over their rows r of t: weight * (h[r] @ w_out[e] + b_out[e])

The columns of y go in blocks, and a block takes four steps, each of them beside the next one of the
block in front of it:

    multiply   this rank's tiles with these columns
    push       for every token of another rank: this rank's sum, into the memory of its *owner*
    reduce     for every token that this rank owns: its own sum and the peers', to all ranks
    collect    the sums that the owners sent, into y

    step      0          1          2          3          4       (2 blocks)
    block 0   multiply   push       reduce     collect
    block 1              multiply   push       reduce     collect

All CTAs do all of it: those set apart to send lack more for tiles than they save (`exchange_plan`).
To tell a peer, a CTA waits until its stores are there, so only the tiles of other CTAs hide them.
It is about as fast as NCCL's all-reduce behind the layer (benchmarks/results/all_reduce_h100.json).
A token has one owner, who alone adds up, in float32 and in the order of turns, and rounds once: all
ranks get the same bits, in every run.

Rank r owns the O tokens from r * O on. Turns are those of `exchange_kernels`: the peer of turn k is
group rank ``(me + k) % P``.

Why one buffer of each kind is enough: a rank writes to a peer only after that has begun the same
call (READY), so has ended the one before; and it ends a call only with all owners' sums, when all
have read what it pushed. Who has given up waiting writes to no peer any more: that may still be in
the call before.

Legend: T tokens, A experts per token, S = T*A slots, O tokens of an owner, P ranks, R tile rows, M
tiles, L experts, H model dim, I expert intermediate dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from comet_compile.kernels.exchange_kernels import peer_pointer
from comet_compile.kernels.exchange_sums import sum_of_tokens
from comet_compile.kernels.layer0 import tile_of
from comet_compile.kernels.layer1 import multiply_tile
from comet_compile.kernels.sync import (
    ENTRY_OF_PEER,
    OWN_ROWS,
    PARTS_OF_PEER,
    SUMS_OF_OWNER,
    count_in,
    finish_bulk_stores,
    signal,
    wait,
)

MORE_STEPS = 3  # after the last block's tiles

_MORE = tl.constexpr(MORE_STEPS)
_ENTRY = tl.constexpr(ENTRY_OF_PEER)
_PARTS = tl.constexpr(PARTS_OF_PEER)
_ROWS = tl.constexpr(OWN_ROWS)
_SUMS = tl.constexpr(SUMS_OF_OWNER)


@triton.jit
def gemm_all_reduce_kernel(
    h_desc,  # [R, I]
    w_desc,  # [1, L, H, I] or [1, L, I, H]
    rows_desc,  # [R, H]
    rows_ptr,  # the same memory
    expert_M_ptr,
    num_tiles_ptr,
    bias_ptr,  # [L, H], experts stride_bias apart, or None
    stride_bias,
    row_S_ptr,
    weights_S_ptr,  # [S] or None
    out_ptr,  # [T, H]
    peers_ptr,
    parts_offset,  # of [P, O, H] symmetric, by turn
    sums_offset,  # of [T, H] symmetric
    ready_offset,  # of [P] int32 flags, by source rank
    parts_flags,  # offset of [NUM_BLOCKS, P] int32 flags, by source rank; likewise
    sums_flags,
    counters_ptr,  # [3 * NUM_BLOCKS + 1] int32, 0 before and after a call
    epoch_ptr,
    abort_ptr,
    message_ptr,
    deadline,
    num_tokens,
    num_owned,  # O
    me,
    first_step,
    end_step,
    A: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLAT: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    PRODUCT: tl.constexpr,
    BULK: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Grid: one program per multiprocessor. WIDTH columns, a multiple of BN and of BH, are a block.

    Steps 0 .. NUM_BLOCKS + MORE_STEPS are one launch; a test, in whose interpreter no program can
    wait for a later one, launches them one by one.
    """
    pid, num_programs = tl.program_id(0), tl.num_programs(0)
    epoch = tl.load(epoch_ptr) + 1
    num_m = tl.load(num_tiles_ptr)
    done_ptr, pushed_ptr = counters_ptr, counters_ptr + NUM_BLOCKS
    reduced_ptr, ended_ptr = counters_ptr + 2 * NUM_BLOCKS, counters_ptr + 3 * NUM_BLOCKS
    if (pid == 0) & (first_step == 0):
        for turn in range(1, P):
            ready = peer_pointer(peers_ptr, (me + turn) % P, ready_offset, tl.int32)
            signal(ready + me, epoch, "sys")
    for step in range(first_step, end_step):
        if step < NUM_BLOCKS:
            num_n = tl.cdiv(tl.minimum(WIDTH, H - step * WIDTH), BN)
            # who had one tile fewer of the block before begins
            before = step * num_m * (WIDTH // BN) % num_programs
            first = (pid + num_programs - before) % num_programs
            for tile in tl.range(first, num_m * num_n, num_programs, flatten=FLAT):
                tile_m, start_n = tile_of(tile, num_m, num_n, GROUP_M, BN)
                start_n += step * WIDTH
                acc = multiply_tile(
                    tile_m, start_n, h_desc, w_desc, None, expert_M_ptr, bias_ptr, stride_bias, I,
                    H, BM, BN, BK, K_CONTIGUOUS,
                )  # fmt: skip
                rows_desc.store([tile_m * BM, start_n], acc.to(rows_desc.dtype))
            finish_bulk_stores(BULK)
            count_in(done_ptr + step, "gpu")
        block = step - 1
        if (block >= 0) & (block < NUM_BLOCKS):
            wait(
                done_ptr + block, num_programs, abort_ptr, message_ptr, deadline, _ROWS, me, epoch,
                "gpu", CLOCK,
            )  # fmt: skip
            if block == 0:
                _wait_for_peers(
                    ready_offset, peers_ptr, abort_ptr, message_ptr, deadline, _ENTRY, me, epoch, P,
                    CLOCK,
                )  # fmt: skip
            _push_parts(
                block, rows_ptr, row_S_ptr, weights_S_ptr, peers_ptr, parts_offset, abort_ptr,
                out_ptr.dtype.element_ty, num_tokens, num_owned, me, A, H, WIDTH, P, BT, BH,
                PRODUCT,
            )  # fmt: skip
            _tell_peers(
                pushed_ptr + block, parts_flags + block * P * 4, peers_ptr, abort_ptr, me, epoch, P
            )
        block = step - 2
        if (block >= 0) & (block < NUM_BLOCKS):
            _wait_for_peers(
                parts_flags + block * P * 4, peers_ptr, abort_ptr, message_ptr, deadline, _PARTS,
                me, epoch, P, CLOCK,
            )  # fmt: skip
            _reduce_own(
                block, rows_ptr, row_S_ptr, weights_S_ptr, out_ptr, peers_ptr, parts_offset,
                sums_offset, abort_ptr, num_tokens, num_owned, me, A, H, WIDTH, P, BT, BH, PRODUCT,
            )  # fmt: skip
            _tell_peers(
                reduced_ptr + block, sums_flags + block * P * 4, peers_ptr, abort_ptr, me, epoch, P
            )
        block = step - 3
        if block >= 0:
            _wait_for_peers(
                sums_flags + block * P * 4, peers_ptr, abort_ptr, message_ptr, deadline, _SUMS, me,
                epoch, P, CLOCK,
            )  # fmt: skip
            _collect_sums(
                block, out_ptr, peers_ptr, sums_offset, abort_ptr, num_tokens, num_owned, me, H,
                WIDTH, P, BT, BH,
            )  # fmt: skip
    if end_step == NUM_BLOCKS + _MORE:  # noqa: SIM102, the second counts
        if count_in(ended_ptr, "gpu") == num_programs - 1:
            for counter in range(3 * NUM_BLOCKS + 1):
                tl.store(counters_ptr + counter, 0)
            tl.store(epoch_ptr, epoch)


@triton.jit
def _wait_for_peers(
    flags_offset,
    peers_ptr,
    abort_ptr,
    message_ptr,
    deadline,
    PHASE: tl.constexpr,
    me,
    epoch,
    P: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Return once every peer's flag here has reached this call."""
    flags = peer_pointer(peers_ptr, me, flags_offset, tl.int32)
    for turn in range(1, P):
        peer = (me + turn) % P
        wait(
            flags + peer, epoch, abort_ptr, message_ptr, deadline, PHASE, peer, epoch, "sys", CLOCK
        )


@triton.jit
def _is_lost(abort_ptr):
    """Return whether a wait of this rank was in vain, by this call or an earlier one."""
    return tl.atomic_add(abort_ptr, 0, sem="relaxed", scope="gpu") != 0


@triton.jit
def _tell_peers(count_ptr, flags_offset, peers_ptr, abort_ptr, me, epoch, P: tl.constexpr):
    """Set this rank's flag at every peer, once all CTAs have stored what it stands for."""
    if count_in(count_ptr, "sys") == tl.num_programs(0) - 1:  # noqa: SIM102, as in sync.wait
        # What was summed after a wait in vain is garbage: the peers shall wait in vain too.
        if not _is_lost(abort_ptr):
            for turn in range(1, P):
                flags = peer_pointer(peers_ptr, (me + turn) % P, flags_offset, tl.int32)
                signal(flags + me, epoch, "sys")


@triton.jit
def _push_parts(
    column_block,
    rows_ptr,
    row_S_ptr,
    weights_S_ptr,
    peers_ptr,
    parts_offset,
    abort_ptr,
    DTYPE: tl.constexpr,
    num_tokens,
    num_owned,
    me,
    A: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Send this rank's sums of the peers' tokens; peers take turns, so that no link waits."""
    num_tasks = tl.where(_is_lost(abort_ptr), 0, (P - 1) * tl.cdiv(num_owned, BT))
    for task in tl.range(tl.program_id(0), num_tasks, tl.num_programs(0), num_stages=1):
        turn = 1 + task % (P - 1)
        owner = (me + turn) % P
        index = task // (P - 1) * BT + tl.arange(0, BT)
        token = owner * num_owned + index
        is_token = (index < num_owned) & (token < num_tokens)
        # this rank is the owner's turn P - turn
        parts = peer_pointer(peers_ptr, owner, parts_offset, DTYPE)
        place = ((P - turn) * num_owned + index)[:, None].to(tl.int64) * H
        for start in tl.range(0, WIDTH, BH, num_stages=1):
            cols = column_block * WIDTH + start + tl.arange(0, BH)
            total, _ = sum_of_tokens(
                token, is_token, rows_ptr, row_S_ptr, weights_S_ptr, cols, A, H, PRODUCT, BT, BH
            )
            mask = is_token[:, None] & (cols < H)[None, :]
            tl.store(parts + place + cols[None, :], total.to(DTYPE), mask=mask)


@triton.jit
def _reduce_own(
    column_block,
    rows_ptr,
    row_S_ptr,
    weights_S_ptr,
    out_ptr,
    peers_ptr,
    parts_offset,
    sums_offset,
    abort_ptr,
    num_tokens,
    num_owned,
    me,
    A: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """Add up this rank's tokens, into its y and for all peers."""
    dtype = out_ptr.dtype.element_ty
    parts = peer_pointer(peers_ptr, me, parts_offset, dtype)
    is_lost = _is_lost(abort_ptr)
    end_turn = tl.where(is_lost, 1, P)
    num_tasks = tl.cdiv(num_owned, BT)
    for task in tl.range(tl.program_id(0), num_tasks, tl.num_programs(0), num_stages=1):
        index = task * BT + tl.arange(0, BT)
        token = me * num_owned + index
        is_token = (index < num_owned) & (token < num_tokens)
        place = token[:, None].to(tl.int64) * H
        for start in tl.range(0, WIDTH, BH, num_stages=1):
            cols = column_block * WIDTH + start + tl.arange(0, BH)
            mask = is_token[:, None] & (cols < H)[None, :]
            total, _ = sum_of_tokens(
                token, is_token, rows_ptr, row_S_ptr, weights_S_ptr, cols, A, H, PRODUCT, BT, BH
            )
            for turn in range(1, P):
                part = (turn * num_owned + index)[:, None].to(tl.int64) * H + cols[None, :]
                total += tl.load(parts + part, mask=mask, other=0.0).to(tl.float32)
            result = tl.where(is_lost, float("nan"), total).to(dtype)
            tl.store(out_ptr + place + cols[None, :], result, mask=mask)
            for turn in range(1, end_turn):
                sums = peer_pointer(peers_ptr, (me + turn) % P, sums_offset, dtype)
                tl.store(sums + place + cols[None, :], result, mask=mask)


@triton.jit
def _collect_sums(
    column_block,
    out_ptr,
    peers_ptr,
    sums_offset,
    abort_ptr,
    num_tokens,
    num_owned,
    me,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    """Copy the owners' sums to y, which the peers cannot reach."""
    dtype = out_ptr.dtype.element_ty
    sums = peer_pointer(peers_ptr, me, sums_offset, dtype)
    is_lost = _is_lost(abort_ptr)
    num_tasks = (P - 1) * tl.cdiv(num_owned, BT)
    for task in tl.range(tl.program_id(0), num_tasks, tl.num_programs(0), num_stages=1):
        owner = (me + 1 + task % (P - 1)) % P
        index = task // (P - 1) * BT + tl.arange(0, BT)
        token = owner * num_owned + index
        is_token = (index < num_owned) & (token < num_tokens)
        for start in tl.range(0, WIDTH, BH, num_stages=1):
            cols = column_block * WIDTH + start + tl.arange(0, BH)
            mask = is_token[:, None] & (cols < H)[None, :]
            place = token[:, None].to(tl.int64) * H + cols[None, :]
            values = tl.load(sums + place, mask=mask, other=0.0)
            values = tl.where(is_lost, float("nan"), values)
            tl.store(out_ptr + place, values.to(dtype), mask=mask)
