"""What a compiled graph leaves on disk (``COMET_DUMP``) and in PyTorch's structured trace.

A dump is an extra: where it cannot be written the compilation goes on, and a warning says so.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from comet_compile.records import GraphRecord
from comet_compile.report import (
    advice_for,
    graph_to_dict,
    plain,
    region_to_dict,
    summary_line,
)

__all__ = ["is_tracing", "sink", "trace_artifacts", "write_dump"]

log = logging.getLogger(__name__)

_MAX_NAMES = 100_000


def sink(directory: str | None) -> Callable[[GraphRecord], None] | None:
    """Return what to do with each graph's record, None if nobody would read it."""
    if directory is None and not is_tracing():
        return None

    def keep(record: GraphRecord) -> None:
        trace_artifacts(record)
        if directory is not None:
            write_dump(directory, record)

    return keep


def write_dump(directory: str | os.PathLike[str], record: GraphRecord) -> Path | None:
    """Write `record` into a new folder of `directory` and return it, None if that failed.

    The folder is named after rank, graph and kind (``rank0_graph3_training``, then ``..._2`` if
    another process or an earlier run has that name) and holds ``before.txt``, ``after.txt``,
    ``plan.json`` and, if there are refusals, ``rejected.txt``. It appears whole or not at all.
    """
    root = Path(directory)
    kind = re.sub(r"[^A-Za-z0-9-]+", "-", record.kind)
    stem = f"rank{_rank()}_graph{record.graph_id}_{kind}"
    # not tempfile.mkdtemp: its 0700 would hide the dump from everybody but its owner
    staging = root / f".{stem}_{uuid.uuid4().hex}"
    try:
        staging.mkdir(parents=True)
        try:
            for name, text in _files(record).items():
                (staging / name).write_text(text, encoding="utf-8")
            return _claim(staging, root, stem)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        log.warning("comet: could not write the dump of graph %s: %s", record.graph_id, error)
        return None


def trace_artifacts(record: GraphRecord) -> None:
    """Add graph texts and report to the structured trace that tlparse reads, if one is written."""
    from torch._logging import trace_structured

    artifacts = {
        "comet_before": ("string", lambda: record.before_text),
        "comet_after": ("string", lambda: record.after_text),
        "comet_report": ("json", lambda: _report_json(record)),
    }
    for name, (encoding, make_payload) in artifacts.items():
        metadata: Callable[[], dict[str, str]] = functools.partial(
            dict, name=name, encoding=encoding
        )
        trace_structured("artifact", metadata_fn=metadata, payload_fn=make_payload)


def is_tracing() -> bool:
    """Whether a structured trace is being written, so that texts made for it have a reader."""
    from torch._logging._internal import trace_log

    return bool(trace_log.handlers)


def _claim(staging: Path, root: Path, stem: str) -> Path:
    """Rename `staging` to the first free name; the rename is what two processes race for."""
    for number in range(1, _MAX_NAMES):
        final = root / (stem if number == 1 else f"{stem}_{number}")
        if final.exists():
            continue
        try:
            return staging.rename(final)
        except OSError:
            # taken since: renaming onto a folder with files in it fails and changes nothing
            if not final.exists():
                raise
    raise FileExistsError(f"{root} already holds {_MAX_NAMES - 1} dumps of {stem}")


def _files(record: GraphRecord) -> Mapping[str, str]:
    files = {
        "before.txt": record.before_text,
        "after.txt": record.after_text,
        "plan.json": _report_json(record),
    }
    rejected = _rejected_text(record)
    return {**files, "rejected.txt": rejected} if rejected else files


def _report_json(record: GraphRecord) -> str:
    document = {
        "summary": summary_line(record.regions, 1),
        "graph": graph_to_dict(record),
        "regions": [region_to_dict(region) for region in record.regions],
    }
    return json.dumps(plain(document), indent=2)


def _rejected_text(record: GraphRecord) -> str:
    """Return one paragraph per refused region: where, why, and what to change."""
    paragraphs = []
    for region in record.regions:
        if region.status != "rejected":
            continue
        lines = [region.name, f"  where: {region.where}", f"  {region.reason}: {region.detail}"]
        if advice := advice_for(region.reason):
            lines.append(f"  to change: {advice}")
        paragraphs.append("\n".join(lines) + "\n")
    return "\n".join(paragraphs)


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
