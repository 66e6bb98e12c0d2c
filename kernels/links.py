"""Which process groups the fused exchange can serve, found out once per group by all its ranks.

A group qualifies if its ranks sit on one machine, each with a GPU of its own whose memory the
others can map. The ranks tell each other what they know through the group's store, so all come to
one verdict; none is left waiting by another's refusal.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from comet_compile.errors import CometWarning
from comet_compile.kernels.agreement import AGREEMENTS
from comet_compile.kernels.board import Board

log = logging.getLogger(__name__)

MAX_RANKS = 64
_TRIED_BYTES = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
    """What a group's fused calls share on the host; `why_not` says why there are none."""

    board: Board | None
    why_not: str | None
    same_tables: bool = True
    """Whether all ranks have the same tuned plans; if not, none of them uses any."""


# What is found out belongs to the process groups, which are process-wide themselves.
_links: weakref.WeakKeyDictionary[dist.ProcessGroup, Link] = weakref.WeakKeyDictionary()


def link_of(group: dist.ProcessGroup, device: torch.device) -> Link:
    """Return the group's link, found out with its ranks at the first call."""
    link = _links.get(group)
    if link is None:
        link = _links[group] = _connect(group, device)
        if link.why_not is not None and group.rank() == 0:
            log.info(
                "comet: layers of process group %r run the portable path: %s",
                group.group_name,
                link.why_not,
            )
    return link


def _connect(group: dist.ProcessGroup, device: torch.device) -> Link:
    offers = AGREEMENTS.gather({"link": "where are the ranks?"}, _offer(device), group)
    reason = _why_not(offers)
    if reason is not None:
        return Link(None, reason)
    # The first rank makes the board; each says whether it could open it.
    path = Board.create(group.size()) if group.rank() == 0 else ""
    path = AGREEMENTS.gather({"link": "the board"}, path, group)[0]
    board, error = None, ""
    try:
        board = Board(path, group.rank(), group.size())
    except OSError as failure:
        error = f"rank {group.rank()} cannot map {path}: {failure}"
    errors = AGREEMENTS.gather({"link": "opened?"}, error, group)
    if group.rank() == 0:
        os.unlink(path)
    failed = [text for text in errors if text]
    if failed:
        return Link(None, failed[0])
    # Whether the GPUs can map each other's memory, only trying tells.
    errors = AGREEMENTS.gather({"link": "mapped?"}, _try_symmetric_memory(group, device), group)
    failed = [text for text in errors if text]
    if failed:
        return Link(None, failed[0])
    digests = AGREEMENTS.gather({"link": "which tuned plans?"}, _tables(device), group)
    differing = [rank for rank, one in enumerate(digests) if one != digests[0]]
    if differing and group.rank() == 0:
        warnings.warn(
            f"comet: group ranks {differing} have other tuned plans than group rank 0, or have "
            "measured another machine, so this group uses neither; give all ranks the same files, "
            "or switch both off by COMET_TUNED=0",
            CometWarning,
            stacklevel=2,
        )
    return Link(board, None, same_tables=not differing)


def _try_symmetric_memory(group: dist.ProcessGroup, device: torch.device) -> str:
    """Return why the ranks have no symmetric memory, "" if they do."""
    from comet_compile.kernels.workspace import workspace_for

    try:
        workspace_for(_TRIED_BYTES, group, device)
    except Exception as failure:  # what a driver or a container forbids comes in many types
        log.debug("comet: no symmetric memory", exc_info=True)
        return f"rank {group.rank()} has no symmetric memory: {type(failure).__name__}: {failure}"
    return ""


def _offer(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "machine": _machine(),
        "gpu": str(properties.uuid),
        "capability": [properties.major, properties.minor],
        "sms": properties.multi_processor_count,
    }


def _tables(device: torch.device) -> str:
    from comet_compile.kernels import exchange_plan, machine_file, tuned

    here = exchange_plan.read_device(device.index or 0)
    return tuned.digest(here) + machine_file.digest(here)


def _why_not(offers: list[Any]) -> str | None:
    if len(offers) > MAX_RANKS:
        return f"{len(offers)} ranks, the kernels serve {MAX_RANKS}"
    for rank, offer in enumerate(offers):
        if offer["machine"] != offers[0]["machine"]:
            return f"group rank {rank} is on another machine than group rank 0"
        for name in ("capability", "sms"):
            if offer[name] != offers[0][name]:
                return f"group rank {rank} has another kind of GPU than group rank 0"
    shared = len({offer["gpu"] for offer in offers}) < len(offers)
    if shared and os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "0") != "1":
        return "ranks share a GPU"
    return None


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename
