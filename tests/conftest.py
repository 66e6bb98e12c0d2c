"""The `slow` marker, and a garbage collector that does not count what stays."""

from __future__ import annotations

import gc
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


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is still frozen at exit, nanobind calls leaked
