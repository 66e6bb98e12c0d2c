"""A fused forward between ranks, played through CTA by CTA: who multiplies, fetches, waits, sends.

`cost_model` adds up phases of the busiest rank. Here the CTAs of every rank take their tiles in the
order in which the kernels do, each as soon as it is free and its tokens are there:

- layer0: the first `num_fetchers` CTAs fetch, rank by rank (turn by turn). The others begin with
  the tiles that lead, in the order of turns; what is left goes to all, every num_sms-th tile to
  one, once all turns have come.
- layer1: peers' tiles, then own ones (the kernel mixes all but a last part), every num_sms-th to
  one CTA. A CTA without tiles takes
  sending tasks, one by one, from when the peers' tiles are done.
- sums: when all peers have sent.

Durations are those of the cost model: a tile's is its GEMM's time divided by what a CTA does of it.
All ranks have the same links; what a switch could not carry at once is not modelled.

Legend: P ranks, T tokens of a rank; times in microseconds from the call's start.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterable, Iterator

from comet_compile.kernels.cost_model import (
    USUAL_FETCHERS,
    Load,
    Machine,
    gemm_us,
    plan_of,
    predict,
    rate_at,
)

FETCH, MULTIPLY, WAIT, SEND, OTHER = "fetch", "multiply", "wait", "send", "other"
KINDS = (MULTIPLY, FETCH, SEND, WAIT, OTHER)


@dataclasses.dataclass(frozen=True)
class Span:
    """What one CTA of one rank does for a while; `cta` is None for all of a rank's."""

    rank: int
    cta: int | None
    kind: str
    name: str
    begin: float
    end: float


@dataclasses.dataclass(frozen=True)
class Schedule:
    """All that happens in a call."""

    spans: list[Span]
    num_ctas: int

    @property
    def total_us(self) -> float:
        """When the last rank ends."""
        return max(span.end for span in self.spans)

    def shares(self, rank: int) -> dict[str, float]:
        """Return which part of its CTAs' time a rank spends on what; the rest they idle."""
        whole = self.total_us * self.num_ctas
        found = dict.fromkeys(KINDS, 0.0)
        for span in self.spans:
            if span.rank == rank:
                ctas = self.num_ctas if span.cta is None else 1
                found[span.kind] += ctas * (span.end - span.begin) / whole
        return found


def simulate(
    load: Load,
    machine: Machine,
    num_fetchers: int = USUAL_FETCHERS,
    lead0: float | None = None,
) -> Schedule:
    """Play a forward through.

    `lead0`: the part of layer0's tiles that lead; by default as many as last while others fetch.
    """
    ranks = range(load.ranks)
    before = {phase.name: phase.us for phase in predict(load, machine)}
    ready = before["top-k"] + before["publish"] + before["tables"]
    spans = [Span(rank, None, OTHER, "top-k, publish, tables", 0.0, ready) for rank in ranks]
    sent = []
    for rank in ranks:
        one = _Rank(load, machine, rank, num_fetchers, lead0)
        spans += one.layer0(ready)
        spans += one.layer1()
        sent.append(one.now)
    # a rank's sums need what all others sent it
    for rank in ranks:
        begin = max(sent)
        if begin > sent[rank]:
            spans.append(Span(rank, None, WAIT, "peers' sums", sent[rank], begin))
        spans.append(Span(rank, None, OTHER, "sums", begin, begin + before["sums"]))
    return Schedule(spans, machine.device.num_sms)


def overlap_of(spans: Iterable[Span], rank: int, num_ctas: int) -> float:
    """Return which part of a rank's communication is hidden, 1 if there is none.

    At a moment in which some of its CTAs fetch or send, as much is hidden as of the others
    multiply: all of them, and the links cost nothing but the CTAs they were given.
    """
    changes: list[tuple[float, int, int]] = []
    for span in spans:
        if span.rank != rank or span.kind not in (FETCH, SEND, MULTIPLY):
            continue
        moves, multiplies = (0, 1) if span.kind == MULTIPLY else (1, 0)
        changes += [(span.begin, moves, multiplies), (span.end, -moves, -multiplies)]
    moving = multiplying = 0
    before = total = hidden = 0.0
    for time, moves, multiplies in sorted(changes):
        if moving:
            total += time - before
            hidden += (time - before) * multiplying / max(1, num_ctas - moving)
        before, moving, multiplying = time, moving + moves, multiplying + multiplies
    return hidden / total if total else 1.0


class _Rank:
    """One rank's CTAs; `now` is when the last kernel ended."""

    def __init__(
        self,
        load: Load,
        machine: Machine,
        rank: int,
        num_fetchers: int,
        lead0: float | None,
    ) -> None:
        self.load, self.machine, self.rank, self.now = load, machine, rank, 0.0
        self.num_ctas, self.num_fetchers = machine.device.num_sms, num_fetchers
        plan = plan_of(load, machine)
        rows = load.busiest_rows if rank == 0 or load.hot == 1 else self._other_rows()
        order = [(rank + turn) % load.ranks for turn in range(load.ranks)]
        tokens = [load.tokens[peer] for peer in order]
        parts = [one / max(1, sum(tokens)) for one in tokens]
        reached = 1 - (1 - 1 / load.ranks) ** load.top_k
        bytes_of_turn = [0.0] + [one * reached * 2 * load.hidden for one in tokens[1:]]
        rate = rate_at(machine.pull_gb, num_fetchers) * 1e3
        self.fetch_us = [one / rate for one in bytes_of_turn]
        busy = load.busy_experts
        time0, _ = gemm_us(
            plan.layer0, rows, busy, load.hidden, load.inter, 2, machine.gemm_tf, machine
        )
        time1, _ = gemm_us(
            plan.layer1, rows, busy, load.inter, load.hidden, 1, machine.row_gemm_tf, machine
        )
        row_tiles = max(1, round(rows / plan.block_m + 0.5 * busy))
        self.tiles0 = row_tiles * math.ceil(load.inter / plan.layer0.block_n)
        self.tiles1 = row_tiles * math.ceil(load.hidden / plan.layer1.block_n)
        self.tile0_us = time0 / math.ceil(self.tiles0 / self.num_ctas)
        self.tile1_us = time1 / math.ceil(self.tiles1 / self.num_ctas)
        hiding = sum(self.fetch_us) / max(time0, 1e-9)
        lead0 = min(1.0, hiding) if lead0 is None else lead0
        self.turns0 = self._turns(round(lead0 * self.tiles0), parts)
        self.own1 = round(parts[0] * self.tiles1)
        moved = sum(one * reached * 2 * load.hidden for one in tokens[1:])
        push = moved / (rate_at(machine.push_gb, self.num_ctas) * 1e3)
        reduced = rows * (1 - parts[0]) * 2 * load.hidden / (machine.memory_tb * 1e6)
        self.send_us = max(push, reduced)

    def _other_rows(self) -> float:
        """Rows of a rank without the hot expert."""
        slots = sum(self.load.tokens) * self.load.top_k
        return (slots - self.load.busiest_rows) / max(1, self.load.ranks - 1)

    def _turns(self, num_lead: int, parts: list[float]) -> list[int]:
        """Return of every tile of layer0 the last turn that it waits for."""
        leading: list[int] = []
        for turn, part in enumerate(parts):
            leading += [turn] * round(part * self.tiles0)
        leading = leading[:num_lead]
        return leading + [len(parts) - 1] * (self.tiles0 - len(leading))

    def layer0(self, begin: float) -> Iterator[Span]:
        """Yield what the CTAs do in layer0."""
        arrived, clock = [], begin
        for turn, us in enumerate(self.fetch_us):
            if us:
                for cta in range(self.num_fetchers):
                    yield self._span(cta, FETCH, f"turn {turn}", clock, clock + us)
            clock += us
            arrived.append(clock)
        free = [clock if c < self.num_fetchers else begin for c in range(self.num_ctas)]
        num_lead = next(
            (i for i, turn in enumerate(self.turns0) if turn == len(arrived) - 1), self.tiles0
        )
        for tile, turn in enumerate(self.turns0):
            if tile < num_lead:
                others = self.num_ctas - self.num_fetchers
                cta = self.num_fetchers + tile % others
            else:
                cta = (tile - num_lead) % self.num_ctas
            yield from self._tile(cta, free, arrived[turn], self.tile0_us, "layer0")
        self.now = max(free)

    def layer1(self) -> Iterator[Span]:
        """Yield what the CTAs do in layer1."""
        free = [self.now] * self.num_ctas
        peers = self.tiles1 - self.own1
        done = self.now
        for tile in range(self.tiles1):
            cta = tile % self.num_ctas
            yield from self._tile(cta, free, 0.0, self.tile1_us, "layer1")
            if tile < peers:
                done = max(done, free[cta])
        if self.send_us:
            queue = [(max(at, done), cta) for cta, at in enumerate(free)]
            for cta, at in enumerate(free):
                if at < done:
                    yield self._span(cta, WAIT, "peers' tiles", at, done)
            heapq.heapify(queue)
            num_tasks = 4 * self.num_ctas
            for _ in range(num_tasks):
                at, cta = heapq.heappop(queue)
                end = at + self.send_us * self.num_ctas / num_tasks
                yield self._span(cta, SEND, "sums to their owners", at, end)
                heapq.heappush(queue, (end, cta))
                free[cta] = end
        self.now = max(free)

    def _tile(
        self, cta: int, free: list[float], there: float, us: float, name: str
    ) -> Iterator[Span]:
        if there > free[cta]:
            yield self._span(cta, WAIT, "tokens", free[cta], there)
            free[cta] = there
        yield self._span(cta, MULTIPLY, name, free[cta], free[cta] + us)
        free[cta] += us

    def _span(self, cta: int, kind: str, name: str, begin: float, end: float) -> Span:
        return Span(self.rank, cta, kind, name, begin, end)
