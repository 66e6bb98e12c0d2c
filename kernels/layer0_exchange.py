"""layer0 between ranks: fetch the peers' tokens and multiply those that are here, in one launch.

The first `num_fetchers` CTAs bring in tokens, turn by turn. Meanwhile the others compute the tiles
that lead, of own tokens; the rest is shared out to all, expert by expert, so that an expert's
matrices are read once (`tile_order.order_by_turn`, whose lead is to last as long as the fetching).

A tile's waiting ends: fetchers have the lowest program ids, so they run when anyone runs, and they
wait for nobody (that the peers have published their tokens was waited for before the launch).

Legend: T tokens, C capacity in tokens, A experts per token, P ranks, L local experts, R tile rows,
M tiles, H model dim, I expert intermediate dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from comet_compile.kernels.exchange_kernels import pull_tokens, wait_for_turns
from comet_compile.kernels.layer0 import compute_tile, tile_in_parts
from comet_compile.kernels.stamps import IDLES, IN_LAYER0, MULTIPLIES, WAITS, stamp
from comet_compile.kernels.sync import PATIENCE, keep_pace_in_parts


@triton.jit
def dispatch_gemm_act_kernel(
    tokens_ptr,  # [P, C, H] symmetric
    w_desc,
    h_desc,
    slot_R_ptr,
    expert_M_ptr,
    first_row_M_ptr,
    num_tiles_ptr,
    weights_ptr,  # [P * C * A] or None
    first_bias_ptr,
    second_bias_ptr,
    saved_ptr,  # [num_saved, N] or None
    num_saved,
    arrive_ptr,
    stride_bias,
    alpha,
    limit,
    tile_M_ptr,  # [M] the tiles in the order in which they are computed
    turn_M_ptr,
    lead_ptr,  # [1] int32, tiles that come in the order of their turns
    peers_ptr,
    tokens_offset,
    grads_ptr,  # [P, C, H] symmetric, fetched after the tokens, or None
    grads_offset,
    ids_S_ptr,
    num_tokens_P_ptr,
    fetched_ptr,
    epoch_ptr,
    abort_ptr,
    message_ptr,
    deadline,
    me,
    num_fetchers,
    C,
    trace_ptr,  # `stamps`, or None
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr,
    MODE: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
    SWAPPED: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    UP_FIRST: tl.constexpr,
    CLAMP: tl.constexpr,
    SCALE: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
    ROWS: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Grid: one program per multiprocessor.

    Example with 3 CTAs, 1 of them a fetcher, and tiles 0 1 2 that lead, 3 .. 8 that do not: the
    fetcher fetches and computes 3 6; the others compute 0 2 4 7 and 1 5 8.
    """
    pid, num_programs = tl.program_id(0), tl.num_programs(0)
    is_fetcher = pid < num_fetchers
    if is_fetcher:
        pull_tokens(
            pid, num_fetchers, peers_ptr, tokens_offset, tokens_ptr, ids_S_ptr, num_tokens_P_ptr,
            fetched_ptr, me, C, trace_ptr, TOP_K, L, H, P, BT, BH, ROWS, CLOCK,
        )  # fmt: skip
        if grads_ptr is not None:
            pull_tokens(
                pid, num_fetchers, peers_ptr, grads_offset, grads_ptr, ids_S_ptr, num_tokens_P_ptr,
                None, me, C, trace_ptr, TOP_K, L, H, P, BT, BH, ROWS, CLOCK,
            )  # fmt: skip

    num_m, first = tl.load(num_tiles_ptr), tl.load(lead_ptr)
    num_n: tl.constexpr = (I + BN - 1) // BN
    split, num_tiles = first * num_n, num_m * num_n
    arrived = 1  # turns whose tokens are here; a rank's own always are
    patience = PATIENCE
    for part in range(2):
        # fetchers have none of the tiles that lead: their start is behind the end
        start = tl.where(is_fetcher, split, pid - num_fetchers)
        stop, step = split, num_programs - num_fetchers
        if part == 1:
            start, stop, step = split + pid, num_tiles, num_programs
        for tile in tl.range(start, stop, step):
            index, start_n = tile_in_parts(tile, first, num_m, num_n, GROUP_M, BN)
            patience = keep_pace_in_parts(arrive_ptr, tile, split, num_tiles, GROUP_M, patience)
            tile_m = tl.load(tile_M_ptr + index)
            turns = tl.load(turn_M_ptr + index) + 1
            if trace_ptr is not None:  # noqa: SIM102, else it is asked without a trace, too
                if turns > arrived:
                    stamp(trace_ptr, IN_LAYER0, WAITS, turns - 1, CLOCK)
            wait_for_turns(
                arrived, turns, num_tokens_P_ptr, fetched_ptr, epoch_ptr, abort_ptr, message_ptr,
                deadline, me, P, BT, CLOCK,
            )  # fmt: skip
            arrived = tl.maximum(arrived, turns)
            stamp(trace_ptr, IN_LAYER0, MULTIPLIES, tile, CLOCK)
            compute_tile(
                tile_m, start_n, tokens_ptr, w_desc, h_desc, slot_R_ptr, expert_M_ptr,
                first_row_M_ptr, weights_ptr, first_bias_ptr, second_bias_ptr, saved_ptr, num_saved,
                H, stride_bias, alpha, limit, TOP_K, H, I, BM, BN, BK, MODE, K_CONTIGUOUS, SWAPPED,
                KIND, GATED, UP_FIRST, CLAMP, SCALE,
            )  # fmt: skip
    stamp(trace_ptr, IN_LAYER0, IDLES, num_tiles, CLOCK)
