"""layer1 between ranks: multiply, and send every peer the sums of its tokens, in one launch.

Tiles are computed in layer1's order of `tile_order.order_by_turn`, from its end backwards: expert
by expert, and last some tiles of this rank's own tokens. When only those are left, the first
`num_senders` CTAs turn to sending; the others compute them, then help to send. So sums travel while
tiles are computed, and what of the sending is left at the end is done by all.

A CTA that has computed its share of the tiles that peers wait for, and whose stores are in memory
(the copy engine's included), counts in `done` with a release; who sends has waited for all CTAs to
do so, and acquires. That waiting ends: until then no CTA waits for anything.

Tiles are shared out beforehand and not drawn from a counter: a draw holds up the CTA, and Triton
lets the copy engine store a tile beside the next one's products in counted loops only.

Legend: C capacity in tokens, A experts per token, P ranks, L local experts, R tile rows, M tiles, H
model dim, I expert intermediate dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from comet_compile.kernels.exchange_sums import push_sums
from comet_compile.kernels.layer0 import tile_in_parts
from comet_compile.kernels.layer1 import multiply_tile
from comet_compile.kernels.stamps import IDLES, IN_LAYER1, MULTIPLIES, stamp
from comet_compile.kernels.sync import count_in, finish_bulk_stores


@triton.jit
def gemm_combine_kernel(
    h_desc,  # [R, I]
    w_desc,  # [1, L, H, I] or [1, L, I, H]
    second_desc,  # the same, or None: the rows [R, 2I] are those of the first and of the second
    rows_desc,  # [R, H]
    rows_ptr,  # the same memory
    expert_M_ptr,
    num_tiles_ptr,
    bias_ptr,  # [L, H], experts stride_bias apart, or None
    stride_bias,
    tile_M_ptr,
    lead_ptr,  # [1] int32, tiles that may come after the sending has begun
    row_S_ptr,
    weights_S_ptr,  # [P * C * A] or None
    num_tokens_P_ptr,
    peers_ptr,
    sums_offset,
    arrived_offset,
    task_P_ptr,  # [P] int32, starts at 0, like the two below
    done_ptr,  # [1] int32
    sent_ptr,
    epoch_ptr,
    abort_ptr,
    message_ptr,
    deadline,
    me,
    num_senders,
    C,
    trace_ptr,  # `stamps`, or None
    A: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLAT: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    STEPS: tl.constexpr,
    PRODUCT: tl.constexpr,
    BULK: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Grid: one program per multiprocessor.

    Example with 3 CTAs, 1 of them a sender, and the tiles 0 .. 5 and 6 7 8, the last three of own
    tokens: the sender computes 0 3 and sends; the others compute 1 4 6 8 and 2 5 7, then send.
    """
    pid, num_programs = tl.program_id(0), tl.num_programs(0)
    num_m = tl.load(num_tiles_ptr)
    num_n: tl.constexpr = (H + BN - 1) // BN
    first = num_m - tl.load(lead_ptr)
    split, num_tiles = first * num_n, num_m * num_n
    is_sender = pid < num_senders
    for part in range(2):
        start, stop, step = pid, split, num_programs
        if part == 1:
            # senders have none of these: their start is behind the end
            start = tl.where(is_sender, num_tiles, split + pid - num_senders)
            stop, step = num_tiles, num_programs - num_senders
        for tile in tl.range(start, stop, step, flatten=FLAT):
            stamp(trace_ptr, IN_LAYER1, MULTIPLIES, tile, CLOCK)
            index, start_n = tile_in_parts(tile, first, num_m, num_n, GROUP_M, BN)
            tile_m = tl.load(tile_M_ptr + num_m - 1 - index)
            acc = multiply_tile(
                tile_m, start_n, h_desc, w_desc, second_desc, expert_M_ptr, bias_ptr, stride_bias,
                I, H, BM, BN, BK, K_CONTIGUOUS,
            )  # fmt: skip
            rows_desc.store([tile_m * BM, start_n], acc.to(rows_desc.dtype))
        if part == 0:
            finish_bulk_stores(BULK)
            count_in(done_ptr, "gpu")
    push_sums(
        rows_ptr, row_S_ptr, weights_S_ptr, num_tokens_P_ptr, peers_ptr, sums_offset,
        arrived_offset, task_P_ptr, done_ptr, sent_ptr, epoch_ptr, abort_ptr, message_ptr, deadline,
        me, C, trace_ptr, A, H, P, BT, BH, STEPS, PRODUCT, CLOCK,
    )  # fmt: skip
    stamp(trace_ptr, IN_LAYER1, IDLES, num_tiles, CLOCK)
