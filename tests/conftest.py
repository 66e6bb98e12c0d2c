"""The `slow` marker, and what keeps pytest from slowing down what it tests."""

from __future__ import annotations

import gc
import logging
import os

import garbage
import pytest

SLOW = "COMET_SLOW_TESTS"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"slow: only runs where {SLOW} is set")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(SLOW):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason=f"slow; set {SLOW}=1"))


def pytest_collection_finish() -> None:
    garbage.freeze_what_stays()
    # Loggers that do not propagate get pytest's handlers. With any, torch prints every graph of
    # every compilation into this one, in 7 % of the time of a test that compiles.
    logging.getLogger("torch.__trace").propagate = True


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is still frozen at exit, nanobind calls leaked
