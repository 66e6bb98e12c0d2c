"""Machines that ``comet doctor --measure`` has measured: a file for each kind of GPU.

It lies beside the tables of tuned plans (`tuned`), and COMET_TUNED=0 switches it off with them::

    {"format": 1,
     "device": {"name": "NVIDIA H100 80GB HBM3", "num_sms": 132, "capability": [9, 0]},
     "versions": {"comet_compile": "0.1.0", "torch": "2.11.0", "triton": "3.6.0"},
     "machine": {"gemm_tf": 5.48, ..., "pull_gb": [[8, 85.0], [16, 161.0]]},
     "ranks": 2, "median_error": 0.031, "date": "...", "command": "comet doctor --measure"}

What a run on one GPU cannot measure, what lies between GPUs, is not in it: the cost model then
takes an H100's. A file that cannot be used is named in a warning, and does not count. Ranks of a
group use it only if all have the same, as with tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import warnings
from pathlib import Path
from typing import Any

from comet_compile.errors import CometWarning
from comet_compile.kernels import tuned
from comet_compile.kernels.cost_model import H100, Machine
from comet_compile.kernels.plan import Device
from comet_compile.kernels.tuned import TableError
from comet_compile.tuned_folder import tuned_folder

FORMAT = 1
LINKS = ("pull_gb", "push_gb")
NUMBERS = tuple(
    field.name
    for field in dataclasses.fields(Machine)
    if field.name not in ("name", "device", "host_us", *LINKS)
)


def machine_path(device: Device) -> Path:
    """Return where the file of a device is, or would be.

    Raises ImportError without platformdirs.
    """
    return tuned_folder() / f"machine-{tuned.file_name(device)}"


def read_machine(path: Path, device: Device) -> Machine:
    """Return the machine of a file; raises TableError."""
    document = tuned.load_json(path)
    if document.get("format") != FORMAT:
        raise TableError(f"its format is {document.get('format')!r}, this version reads {FORMAT}")
    tuned.check_provenance(document, device)
    measured = document.get("machine")
    if not isinstance(measured, dict) or not set(measured) <= {*NUMBERS, *LINKS}:
        raise TableError("it is not as `comet doctor --measure` writes it")
    values: dict[str, Any] = {}
    for name, value in measured.items():
        if name in LINKS:
            rates = _rates(value)
            if rates is None:
                raise TableError(f"its {name} are no rates by a growing number of CTAs")
            values[name] = rates
        elif _is_positive(value):
            values[name] = float(value)
        else:
            raise TableError(f"its {name} is {value!r}; allowed: a number above 0")
    return dataclasses.replace(H100, name=device.name, device=device, **values)


@functools.cache
def measured_machine(device: Device) -> Machine | None:
    """Return what was measured of a device, None if nothing was. The file is read once."""
    if os.environ.get(tuned.VARIABLE, "").strip().lower() in tuned.OFF:
        return None
    with contextlib.suppress(ImportError):
        path = machine_path(device)
        if path.exists():
            try:
                return read_machine(path, device)
            except TableError as error:
                message = f"comet: the measured machine in {path} is not used: {error}"
                warnings.warn(message, CometWarning, stacklevel=2)
    return None


def digest(device: Device) -> str:
    """Return a short name of what was measured: equal where it is the same."""
    return hashlib.sha256(repr(measured_machine(device)).encode()).hexdigest()[:16]


def machine_of(device: Device, *, use_file: bool = True) -> Machine | None:
    """Return what is known of a device: what was measured on it, else an H100's; None if nothing.

    `use_file` says that all ranks have measured the same.
    """
    found = measured_machine(device) if use_file else None
    if found is not None:
        return found
    # by its name: an H800 has as many multiprocessors and other links, an H200 other memory
    same = (device.name, device.num_sms) == (H100.device.name, H100.device.num_sms)
    return H100 if same else None


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and value is not True and 0 < value < math.inf


def _rates(value: object) -> tuple[tuple[int, float], ...] | None:
    if not isinstance(value, list) or not value:
        return None
    rates: list[tuple[int, float]] = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_positive, pair)):
            return None
        if rates and pair[0] <= rates[-1][0]:
            return None
        rates.append((int(pair[0]), float(pair[1])))
    return tuple(rates)
