"""Writing tables of tuned plans: whole or not at all, by one process at a time.

What a table is, and how it is read, says `kernels.tuned`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from comet_compile._version import __version__
from comet_compile.kernels import tuned
from comet_compile.kernels.plan import Device
from comet_compile.tuning_search import Search

_LOCK_SECONDS = 60.0


def entry_of(search: Search, *, complete: bool) -> dict[str, Any]:
    """Return what a table says of a search, finished or interrupted."""
    return {
        "shape": dataclasses.asdict(search.shape),
        "direction": search.direction,
        "changes": search.best,
        "us": {
            "rule": round(search.measured_rule, 1),
            "tuned": round(search.measured_best, 1),
        },
        "tried": search.num_tried,
        "complete": complete,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["comet", *sys.argv[1:]]),
    }


def entries_in(path: Path, device: Device) -> list[dict[str, Any]]:
    """Return the entries of a table that can be gone on with: none if it cannot be used."""
    try:
        tuned.Table.read(path, device)
    except tuned.TableError:
        return []
    entries: list[dict[str, Any]] = tuned.load(path)["entries"]
    return entries


def add_entry(
    path: Path, device: Device, entry: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Put an entry into a table, in the place of the one for its shape and direction.

    A file there that is no table for this device and Triton is kept, under another name, and
    `say` is told. Raises OSError, and TimeoutError if another process does not let go of the file.
    """
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            _set_aside(path, device, say)
            kept = [one for one in entries_in(path, device) if _key(one) != _key(entry)]
            entries = sorted([*kept, entry], key=lambda one: json.dumps(_key(one)))
            write_whole(path, {**head(device), "entries": entries})
    except filelock.Timeout as error:
        raise TimeoutError(
            f"another process has held {path}.lock for {_LOCK_SECONDS:g} s; if none is tuning, "
            "delete it"
        ) from error


def _set_aside(path: Path, device: Device, say: Callable[[str], None]) -> None:
    if not path.exists():
        return
    try:
        tuned.Table.read(path, device)
    except tuned.TableError as error:
        aside = path.with_name(f"{path.name}.old")
        os.replace(path, aside)
        say(f"{path} could not be gone on with: {error}. It is {aside.name} now.")


def head(device: Device) -> dict[str, Any]:
    """Return what every file of measured numbers begins with."""
    return {
        "format": tuned.FORMAT,
        "device": tuned.describe(device),
        "versions": {
            "comet_compile": __version__,
            "torch": torch.__version__,
            "triton": tuned.TRITON,
        },
    }


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["direction"], sorted(entry["shape"].items())


def write_whole(path: Path, document: dict[str, Any]) -> None:
    """Write JSON so that a reader finds the old file or the new one. Raises OSError."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(document, indent=1) + "\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
