"""A garbage collector that does not count what stays.

Imported ahead of torch, this stops it until `freeze_what_stays`: nothing that modules make goes
away, and to look through it takes a quarter of the time of the imports.
"""

from __future__ import annotations

import gc
import os

gc.disable()
# Dynamo collects what a compilation leaves right after it, in 2 % of the time of a test
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")


def freeze_what_stays() -> None:
    """Leave what is imported by now out of all collections.

    It is hundreds of thousands of objects, which the collector would look through again and again,
    in 9 % of the time of a test that compiles.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 20, 20)
