"""A board on which the ranks of one machine tell each other how many tokens they have.

The fused exchange lays out its buffers for the most tokens that any rank has, and that must be the
same number on all ranks before anything is launched. Ranks of one machine share host memory: each
posts one number per call and reads its peers', in a few microseconds, without asking a device.

Post n of a rank waits for nobody; reading post n waits for all posts n. A rank that has read the
posts n may post n + 1, and n + 2 only when all have posted n + 1, so have read n: two places for
each rank are enough. A number and its call's number lie in one 64-bit word, stored at once.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time

from comet_compile.errors import PeerTimeoutError

_VALUE_BITS = 32
# a word: the call in the upper half (never 0), the value in the lower
_MAX_CALL = 2**31


class Board:
    """The posts of a group's ranks, in a file that all of them have mapped."""

    def __init__(self, path: str, rank: int, num_ranks: int) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 2 * num_ranks * 8)
        words = memoryview(self._map).cast("Q")
        self._words = words[:num_ranks], words[num_ranks:]
        self._rank, self._call = rank, 0

    @staticmethod
    def create(num_ranks: int) -> str:
        """Make an empty board and return its path; unlink it once all ranks have opened it."""
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        descriptor, path = tempfile.mkstemp(prefix="comet-", dir=folder)
        os.write(descriptor, bytes(2 * num_ranks * 8))
        os.close(descriptor)
        return path

    def exchange(self, value: int, seconds: float) -> list[int]:
        """Post `value` (0 <= value < 2**32) and return all ranks' values of this call."""
        self._call = self._call % _MAX_CALL + 1
        words = self._words[self._call % 2]
        words[self._rank] = self._call << _VALUE_BITS | value
        deadline, rounds = None, 0
        while True:
            seen = words.tolist()
            missing = [rank for rank, word in enumerate(seen) if word >> _VALUE_BITS != self._call]
            if not missing:
                return [word & (1 << _VALUE_BITS) - 1 for word in seen]
            rounds += 1
            if rounds < 100:
                continue
            time.sleep(0.0 if rounds < 10_000 else 0.001)
            if deadline is None:
                deadline = time.monotonic() + seconds
            elif time.monotonic() > deadline:
                raise PeerTimeoutError(
                    f"group rank {self._rank} waited {seconds:g} s at call {self._call} of the "
                    f"fused layers, and group ranks {missing} did not come; allowed: every rank of "
                    "the group reaches the layer. Look for an earlier error on those ranks, a rank "
                    "that skips the layer, or raise COMET_AGREEMENT_TIMEOUT."
                )
