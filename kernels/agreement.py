"""Ranks check that they run the same plan before they first exchange anything for it.

Two ranks that compiled different rewrites would wait for each other's collectives for ever. So at
the first use of a plan on a group every rank publishes it in the group's key-value store (not
through a collective: that is what may hang), reads its peers' and compares. The n-th first use on
a group is handshake n; a rank that is at another plan there is a mismatch, a rank that does not
come before the deadline is named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from comet_compile.errors import PeerTimeoutError, PlanMismatchError

_POLL_SECONDS = (0.0005, 0.05)
_MAX_REMEMBERED = 4096


@dataclasses.dataclass
class _GroupState:
    """What this process has agreed on with one group."""

    agreed: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    num_handshakes: int = 0
    known: dict[Hashable, list[Any]] = dataclasses.field(default_factory=dict)
    seconds: float | None = None


class Agreements:
    """The plans agreed on so far, by process group; a group that is destroyed is forgotten."""

    def __init__(self) -> None:
        self._groups: weakref.WeakKeyDictionary[dist.ProcessGroup, _GroupState] = (
            weakref.WeakKeyDictionary()
        )
        self._timeout: float | None = None

    def set_timeout(self, seconds: float | None) -> None:
        """Wait this long for peers; None takes COMET_AGREEMENT_TIMEOUT, else the group's own."""
        self._timeout = seconds

    def agree(self, plan: Mapping[str, Any], group: dist.ProcessGroup) -> None:
        """Return once every rank of `group` is known to run `plan`, raise if one does not.

        `plan` is plain JSON data made of facts that every rank shares. After the first time this
        is one look-up.
        """
        self.gather(plan, None, group)

    def gather(self, plan: Mapping[str, Any], offer: object, group: dist.ProcessGroup) -> list[Any]:
        """`agree` on `plan`, and return what each rank offered with it the first time.

        An offer is plain JSON data that may differ by rank: what a rank can do, say, so that all
        ranks can draw one conclusion from the same list.
        """
        if group.size() == 1 or _is_fake(group):
            return [offer] * group.size()
        state = self._groups.get(group)
        if state is None:
            state = self._groups[group] = _GroupState()
        text = json.dumps(plan, sort_keys=True)
        if text not in state.agreed:
            number = state.num_handshakes
            state.num_handshakes += 1
            state.agreed[text] = _handshake(text, offer, number, group, self.seconds(group))
        return state.agreed[text]

    def recall(self, call: Hashable, group: dist.ProcessGroup) -> list[Any] | None:
        """Return what was remembered for `call`, whose plan need then not be written out."""
        state = self._groups.get(group)
        return None if state is None else state.known.get(call)

    def remember(self, call: Hashable, group: dist.ProcessGroup, offers: list[Any]) -> None:
        """Keep the offers of the plan that `call` stands for."""
        if group in self._groups:
            known = self._groups[group].known
            if len(known) >= _MAX_REMEMBERED:
                known.clear()
            known[call] = offers

    def num_handshakes(self, group: dist.ProcessGroup) -> int:
        """How many plans this process has put to `group` so far."""
        return self._groups[group].num_handshakes if group in self._groups else 0

    def seconds(self, group: dist.ProcessGroup) -> float:
        """How long to wait for the peers of `group`."""
        if self._timeout is not None:
            return self._timeout
        variable = os.environ.get("COMET_AGREEMENT_TIMEOUT", "").strip()
        if variable:
            return float(variable)
        state = self._groups.get(group)
        if state is None:
            return _group_seconds(group)
        if state.seconds is None:  # asking the group takes as long as a small GEMM
            state.seconds = _group_seconds(group)
        return state.seconds


# A mutable global because the op has no other place to keep it: ops are functions, and what was
# agreed belongs to the process groups, which are process-wide themselves.
AGREEMENTS = Agreements()


def _handshake(
    text: str, offer: object, number: int, group: dist.ProcessGroup, seconds: float
) -> list[Any]:
    members = dist.get_process_group_ranks(group)
    store = dist.PrefixStore(_key_prefix(members, number), group.get_group_store())
    rank = group.rank()
    store.set(str(rank), json.dumps([text, offer]))

    missing = list(range(group.size()))
    deadline = time.monotonic() + seconds
    pause, longest_pause = _POLL_SECONDS
    while True:
        # Polled, not store.wait(): a waiting client keeps the connection that NCCL's watchdog
        # shares with it locked.
        missing = [peer for peer in missing if not store.check([str(peer)])]
        if not missing:
            break
        if time.monotonic() > deadline:
            raise PeerTimeoutError(
                f"rank {rank} of process group {group.group_name!r} waited {seconds:g} s at comet "
                f"handshake {number}, and group ranks {missing} (global ranks "
                f"{[members[peer] for peer in missing]}) did not come; allowed: every rank of the "
                "group reaches the layer. Look for an earlier error on those ranks, a rank that "
                "skips the layer, or raise COMET_AGREEMENT_TIMEOUT if they are still compiling. "
                f"Plan of this rank: {text}"
            )
        time.sleep(pause)
        pause = min(pause * 2, longest_pause)

    values = store.multi_get([str(peer) for peer in range(group.size())])
    texts, offers = zip(*(json.loads(value) for value in values), strict=True)
    if any(other != texts[0] for other in texts):
        raise PlanMismatchError(_describe_mismatch(texts, number, group))
    return list(offers)


def _describe_mismatch(texts: Sequence[str], number: int, group: dist.ProcessGroup) -> str:
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks_of.setdefault(text, []).append(rank)
    plans = [json.loads(text) for text in ranks_of]
    keys = sorted({key for plan in plans for key in plan})
    differing = [key for key in keys if len({json.dumps(plan.get(key)) for plan in plans}) > 1]
    listed = "\n".join(f"  ranks {ranks}: {text}" for text, ranks in ranks_of.items())
    return (
        f"ranks of process group {group.group_name!r} run different plans at comet handshake "
        f"{number}; they differ in {', '.join(differing)}:\n{listed}\n"
        "Every rank has to compile the same layers in the same order: check that model, dtype, "
        "expert counts and comet options are the same on all ranks."
    )


def _key_prefix(members: list[int], number: int) -> str:
    # The group's store has a prefix of its own; the members keep apart disjoint groups that were
    # given the same name on different ranks.
    digest = hashlib.sha256(repr(members).encode()).hexdigest()[:16]
    return f"comet/agreement/{digest}/{number}"


def _is_fake(group: dist.ProcessGroup) -> bool:
    return dist.get_backend(group) == "fake"


def _group_seconds(group: dist.ProcessGroup) -> float:
    """The timeout of the group's collectives, torch's default where a backend hides it."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout.total_seconds()
    return default_pg_timeout.total_seconds()
