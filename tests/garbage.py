"""A garbage collector that does not count what stays."""

from __future__ import annotations

import gc


def freeze_what_stays() -> None:
    """Leave what is imported by now out of all collections.

    It is hundreds of thousands of objects, which the collector would look through again and again,
    in 9 % of the time of a test that compiles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
