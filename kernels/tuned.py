"""Plans that were measured: tables of changes to what `choose_plan` and `plan_exchange` plan.

A table is a JSON file that ``comet tune`` writes, for one kind of GPU and one Triton::

    {"format": 1,
     "device": {"name": "NVIDIA H100 80GB HBM3", "num_sms": 132, "capability": [9, 0]},
     "versions": {"comet_compile": "0.1.0", "torch": "2.11.0", "triton": "3.6.0"},
     "entries": [{"shape": {"ranks": 1, "tokens": 4096, ...}, "direction": "forward",
                  "changes": {"layer0.group_m": 16}, "us": {"rule": 812.3, "tuned": 790.1},
                  "complete": true, "date": "2026-11-26 18:00 UTC", "command": "comet tune ..."}]}

Tables are looked up in this order: the file that COMET_TUNED names, the one in the user's cache
directory, those shipped in the package. COMET_TUNED=0 switches all of them off. A file that cannot
be used (broken, from another device or Triton, with changes that no kernel can run) is named in a
warning, and the next source is asked; without any, the plan is the rule's. A shipped table that
cannot be used, being of another Triton, is nobody's mistake and passed over in silence. A process
reads a file once. Ranks of a group use tables only if all have the same (`digest`, see `links`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import triton

from comet_compile.errors import CometWarning
from comet_compile.kernels.plan import Device, Plan
from comet_compile.kernels.plan_changes import PlanChangeError, change
from comet_compile.tuned_folder import tuned_folder

log = logging.getLogger(__name__)

FORMAT = 1
TRITON = triton.__version__
VARIABLE = "COMET_TUNED"
OFF = ("0", "off")


class TableError(Exception):
    """A file is no table for this device; the message says why."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a plan depends on and the host knows. `tokens` per rank are rounded (`bucket`)."""

    ranks: int
    tokens: int
    top_k: int
    experts: int  # of one rank
    hidden: int
    inter: int
    gated: bool
    interleaved: bool
    itemsize: int

    def __str__(self) -> str:
        ranks = f" a rank, {self.ranks} ranks" if self.ranks > 1 else ""
        sizes = f"{self.experts} experts of {self.hidden} x {self.inter}, top-{self.top_k}"
        return f"{sizes}, {self.tokens} tokens{ranks}"


def bucket(tokens: int) -> int:
    """Return the power of 2 nearest to a number of tokens, by ratio; 1 for none.

    >>> [bucket(n) for n in (0, 1, 5, 6, 4096, 5000, 6000)]
    [1, 1, 4, 8, 4096, 4096, 8192]
    """
    return int(2 ** round(math.log2(max(1, tokens))))


@dataclasses.dataclass(frozen=True)
class Table:
    """The changes of one file, by shape: those of both directions together."""

    path: Path
    changes: dict[Shape, dict[str, Any]]

    @classmethod
    def read(cls, path: Path, device: Device) -> Table:
        """Read a file; raises TableError."""
        document = load(path)
        check_provenance(document, device)
        changes: dict[Shape, dict[str, Any]] = {}
        for number, entry in enumerate(document["entries"]):
            try:
                # what `comet tune` goes on with must be there too
                _ = entry["direction"], entry["complete"]
                changes.setdefault(Shape(**entry["shape"]), {}).update(changes_of(entry))
            except (AttributeError, KeyError, TypeError) as error:
                raise TableError(f"entry {number} is not as `comet tune` writes it") from error
        return cls(path, changes)


def apply(plan: Any, shape: Shape, device: Device) -> Any:
    """Return `plan` (a `Plan` or an `ExchangePlan`) with what the tables say of this shape.

    The `source` of its GEMMs then names the file.
    """
    for table in tables(device):
        changes = table.changes.get(shape)
        if changes is None:
            continue
        try:
            found = change(plan, changes, gated=shape.gated, device=device)
        except PlanChangeError as error:
            _warn(f"{table.path}: what it says of {shape} is not used: {error}")
            continue
        source = f"planned by {_name(table.path, device)}"
        if isinstance(found, Plan):
            return dataclasses.replace(found, source=source)
        return dataclasses.replace(found, gemms=dataclasses.replace(found.gemms, source=source))
    return plan


def _name(path: Path, device: Device) -> str:
    """How reports name a table: a shipped one by its place in the package, wherever that lies."""
    if path != shipped_file(device):
        return str(path)
    return "/".join(path.parts[-3:])


def digest(device: Device) -> str:
    """Return a short name of all that the tables say: equal where they say the same."""
    said = [
        [dataclasses.asdict(shape), sorted(changes.items())]
        for table in tables(device)
        for shape, changes in table.changes.items()
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


@functools.cache
def tables(device: Device) -> tuple[Table, ...]:
    """Return the tables for a device, in the order in which they are asked.

    Variable and files are read once: what ranks have agreed on holds as long as they live.
    """
    named = os.environ.get(VARIABLE, "").strip()
    if named.lower() in OFF:
        return ()
    paths = [Path(named)] if named else []
    kept = [shipped_file(device)]
    # a machine without network may have the package without what it depends on
    with contextlib.suppress(ImportError):
        kept.insert(0, cached_file(device))
    paths += [path for path in kept if path.exists()]
    found = []
    for path in paths:
        try:
            found.append(Table.read(path, device))
        except TableError as error:
            if path == kept[-1]:
                log.debug("comet: the shipped plans in %s are not used: %s", path, error)
            else:
                _warn(f"the tuned plans in {path} are not used: {error}")
    return tuple(found)


def cached_file(device: Device) -> Path:
    """Return where this user's table of a device is, or would be."""
    return tuned_folder() / file_name(device)


def shipped_file(device: Device) -> Path:
    """Return where the package's table of a device is, if it has one."""
    import comet_compile

    return Path(comet_compile.__file__).parent / "tuned" / file_name(device)


def file_name(device: Device) -> str:
    """``nvidia-h100-80gb-hbm3.json``."""
    return re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-") + ".json"


def load(path: Path) -> dict[str, Any]:
    """Return a table's document; raises TableError."""
    document = load_json(path)
    if not isinstance(document.get("entries"), list):
        raise TableError("it has no entries, so `comet tune` has not written it")
    if document.get("format") != FORMAT:
        raise TableError(f"its format is {document.get('format')!r}, this version reads {FORMAT}")
    return document


def load_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises TableError."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise TableError(f"it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise TableError(f"it is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise TableError("it holds no object, so comet has not written it")
    return document


def check_provenance(document: dict[str, Any], device: Device) -> None:
    """Raise TableError if a document was measured on another device or with another Triton."""
    if document.get("device") != describe(device):
        raise TableError(f"it is for {document.get('device')}, this is {describe(device)}")
    versions = document.get("versions")
    measured = str(versions.get("triton")) if isinstance(versions, dict) else "unknown"
    # another Triton compiles to other registers and other schedules
    if measured.split(".")[:2] != TRITON.split(".")[:2]:
        raise TableError(f"it was measured with Triton {measured}, this is {TRITON}; measure again")


def describe(device: Device) -> dict[str, Any]:
    """Return what a table says of its device."""
    return {
        "name": device.name,
        "num_sms": device.num_sms,
        "capability": list(device.capability),
    }


def changes_of(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the changes of an entry, as `plan_changes.change` takes them."""
    return {
        str(name): tuple(value) if isinstance(value, list) else value
        for name, value in entry["changes"].items()
    }


def _warn(message: str) -> None:
    warnings.warn(f"comet: {message}", CometWarning, stacklevel=2)
