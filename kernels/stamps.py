"""Stamps of what every CTA of a call does when: the opt-in build of the kernels between ranks.

A kernel that is given a trace notes, at each change, what its CTA does from then on, and the GPU's
global timer. Without one `trace_ptr` is None, and nothing of it is compiled.

A trace is int64 memory: lanes and capacity, then for each lane, which is a CTA, the number of its
stamps and `capacity` pairs (code, time). A kernel with more CTAs than there are lanes has only the
first ones noted; a stamp that finds no room is counted and lost.

Example, one lane with room for 3, whose CTA multiplies layer0's tile 7 and waits for turn 1:

    [1, 3,   2,   code(LAYER0, MULTIPLY, 7), 1000,   code(LAYER0, WAIT, 1), 1450,   0, 0]
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

HEADER = 2
STAGES = LAYER0, LAYER1, SUMS, PUBLISH = range(4)
ACTIONS = MULTIPLY, FETCH, SEND, WAIT, OTHER, IDLE = range(6)

# what a kernel's constants are called inside it
IN_LAYER0, IN_LAYER1, IN_SUMS, IN_PUBLISH = (tl.constexpr(stage) for stage in STAGES)
MULTIPLIES, FETCHES, SENDS, WAITS, OTHERWISE, IDLES = (tl.constexpr(one) for one in ACTIONS)


@triton.jit
def stamp(trace_ptr, STAGE: tl.constexpr, ACTION: tl.constexpr, value, CLOCK: tl.constexpr):
    """Note that from now on this CTA does ACTION, for tile, turn or block `value`.

    Without a clock, in Triton's interpreter, the time is the number of the lane's stamps so far.
    """
    if trace_ptr is not None:
        lane, capacity = tl.program_id(0), tl.load(trace_ptr + 1)
        if lane < tl.load(trace_ptr):
            lane_ptr = trace_ptr + 2 + lane * (1 + 2 * capacity)
            count = tl.load(lane_ptr)
            if count < capacity:
                # `value` may be a constant, which the sum makes a tensor of
                code = tl.full((), STAGE * 8 + ACTION << 32, tl.int64) + value
                tl.store(lane_ptr + 1 + 2 * count, code)
                now = count
                if CLOCK:
                    now = globaltimer()
                tl.store(lane_ptr + 2 + 2 * count, now)
            tl.store(lane_ptr, count + 1)
