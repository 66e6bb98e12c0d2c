"""layer0 between ranks: fetch the peers' tokens and multiply those that are here, in one launch.

The first `num_fetchers` CTAs bring in tokens, turn by turn; all others compute tiles, those of own
tokens first, then in the order in which the tokens arrive. A CTA takes its next tile from a
counter, so the fetchers join in when they are done, and a tile that waits holds up nobody else.

A tile's waiting ends: fetchers have the lowest program ids, so they run when anyone runs, and they
wait for nobody (that the peers have published their tokens was waited for before the launch).

Legend: T tokens, C capacity in tokens, A experts per token, P ranks, L local experts, R tile rows,
M tiles, H model dim, I expert intermediate dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from comet_compile.kernels.exchange_kernels import pull_tokens, wait_for_turns
from comet_compile.kernels.layer0 import compute_tile, tile_of


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
    stride_bias,
    alpha,
    limit,
    order_M_ptr,
    turn_M_ptr,
    ticket_ptr,  # [1] int32, starts at 0
    peers_ptr,
    tokens_offset,
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
    """Grid: one program per multiprocessor, all of them resident at once."""
    pid = tl.program_id(0)
    if pid < num_fetchers:
        pull_tokens(
            pid, num_fetchers, peers_ptr, tokens_offset, tokens_ptr, ids_S_ptr, num_tokens_P_ptr,
            fetched_ptr, me, C, TOP_K, L, H, P, BT, BH, ROWS,
        )  # fmt: skip

    num_m = tl.load(num_tiles_ptr)
    num_n: tl.constexpr = (I + BN - 1) // BN
    arrived = 1  # turns whose tokens are here; a rank's own always are
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    while ticket < num_m * num_n:
        # asked for before the work, so that the answer is here after it
        following = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
        index, start_n = tile_of(ticket, num_m, num_n, GROUP_M, BN)
        tile_m = tl.load(order_M_ptr + index)
        turns = tl.load(turn_M_ptr + index) + 1
        wait_for_turns(
            arrived, turns, num_tokens_P_ptr, fetched_ptr, epoch_ptr, abort_ptr, message_ptr,
            deadline, me, P, BT, CLOCK,
        )  # fmt: skip
        arrived = tl.maximum(arrived, turns)
        compute_tile(
            tile_m, start_n, tokens_ptr, w_desc, h_desc, slot_R_ptr, expert_M_ptr,
            first_row_M_ptr, weights_ptr, first_bias_ptr, second_bias_ptr, None, H, stride_bias,
            alpha, limit, TOP_K, H, I, BM, BN, BK, MODE, K_CONTIGUOUS, SWAPPED, KIND, GATED,
            UP_FIRST, CLAMP, SCALE,
        )  # fmt: skip
        ticket = following
