"""The chosen inputs on which a region is interpreted.

A sample fixes the sizes of symbolic dimensions, the routing of every rank, and random numbers for
everything else. The routings separate look-alikes: random ones, experts without a token, all
tokens at the same experts, every expert in turn, a rank that receives nothing, ids repeated in a
row, ids out of range. Numbers are drawn from a seed that depends on the sample only, so every rank
of a job proves the same thing.

Legend: T tokens, A ids per token (top_k), L experts of one rank, P ranks, E experts that ids name
(L * P when tokens travel, else L).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from comet_compile.passes.graph_view import val

SENTINEL_HIGH = "ids_too_high"
SENTINEL_LOW = "ids_negative"
REPEATED = "ids_repeated"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One routing for every rank, at one choice of sizes.

    `ids` holds one [T, A] tensor per rank; `name` says what the routing is for.
    """

    name: str
    symbols: Mapping[Any, int]
    ids: tuple[torch.Tensor, ...]
    seed: int

    @property
    def num_tokens(self) -> int:
        return int(self.ids[0].shape[0])

    @property
    def may_be_impossible(self) -> bool:
        """Whether the graph may rule such ids out (by topk, a mask ...)."""
        return self.name in (SENTINEL_HIGH, SENTINEL_LOW, REPEATED)


def routings(
    num_tokens: int, top_k: int, num_experts: int, num_ranks: int, experts_per_rank: int
) -> Iterable[tuple[str, tuple[torch.Tensor, ...]]]:
    """(name, ids [T, A] of every rank), the most telling first."""

    def distinct(rank: int, allowed: torch.Tensor, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        if len(allowed) >= top_k:
            scores = torch.rand(num_tokens, len(allowed), generator=generator)
            return allowed[scores.topk(top_k, dim=1).indices]
        picks = torch.randint(len(allowed), (num_tokens, top_k), generator=generator)
        return allowed[picks]

    ranks = range(num_ranks)
    experts = torch.arange(num_experts)
    yield "random", tuple(distinct(r, experts, 1) for r in ranks)
    # the first, the last and every third expert get no token
    some = experts[(experts % 3 == 1) & (experts < num_experts - 1)]
    if len(some) >= top_k:
        yield "empty_experts", tuple(distinct(r, some, 2) for r in ranks)
    busy = experts[max(0, num_experts // 2 - top_k) :][:top_k]
    yield "same_experts", tuple(distinct(r, busy, 6) for r in ranks)
    if num_experts > experts_per_rank >= top_k:
        first = experts[:experts_per_rank]
        yield "one_rank_receives_all", tuple(distinct(r, first, 3) for r in ranks)
    if num_ranks > 1 and num_experts > experts_per_rank:
        # by chance, few tokens may exchange equal numbers of rows: here no two ranks do
        window = experts[: max(experts_per_rank, top_k)]
        yield (
            "to_the_next_rank",
            tuple(
                distinct(r, (window + (r + 1) * experts_per_rank) % num_experts, 7) for r in ranks
            ),
        )
    yield "second_random", tuple(distinct(r, experts, 4) for r in ranks)
    # random ids of few tokens miss experts, and a fault at one expert shows at its tokens only
    num_slots = num_tokens * top_k
    for last in range(num_experts - 1, -1, -max(num_slots, 1)):
        in_turn = last - torch.arange(num_slots).view(num_tokens, top_k)
        yield f"experts_up_to_{last}", tuple((in_turn + r) % num_experts for r in ranks)
    if top_k > 1:
        one = torch.full((num_tokens, top_k), num_experts // 2)
        yield REPEATED, tuple(one.clone() for _ in ranks)
    for name, sentinel in ((SENTINEL_HIGH, num_experts), (SENTINEL_LOW, -1)):
        masked = []
        for rank in ranks:
            ids = distinct(rank, experts, 5)
            generator = torch.Generator().manual_seed(7000 + rank)
            dropped = torch.rand(ids.shape, generator=generator) < 0.4
            masked.append(ids.masked_fill(dropped, sentinel))
        yield name, tuple(masked)


def free_symbols(nodes: Iterable[fx.Node]) -> list[Any]:
    """The backed size symbols that `nodes` depend on, by name."""
    found: dict[str, Any] = {}
    for node in nodes:
        value = val(node)
        sizes = value.shape if isinstance(value, torch.Tensor) else [value]
        for size in sizes:
            if isinstance(size, torch.SymInt):
                for symbol in size.node.expr.free_symbols:
                    if not _is_unbacked(size, symbol):
                        found[str(symbol)] = symbol
    return [found[name] for name in sorted(found)]


def _is_unbacked(size: torch.SymInt, symbol: Any) -> bool:
    return _hint(size.node.shape_env, symbol) is None


def _hint(shape_env: Any, symbol: Any) -> int | None:
    """The size that a symbol had when the graph was traced."""
    # torch 2.13 renamed var_to_val
    table = getattr(shape_env, "backed_var_to_val", None)
    if table is None:
        table = shape_env.var_to_val
    value = table.get(symbol)
    return None if value is None else int(value)


def size_choices(nodes: Iterable[fx.Node]) -> list[dict[Any, int]]:
    """Assignments of the region's size symbols: as traced, and one other that the guards allow."""
    nodes = list(nodes)
    symbols = free_symbols(nodes)
    if not symbols:
        return [{}]
    shape_env = _shape_env(nodes)
    traced = {symbol: _hint(shape_env, symbol) or 2 for symbol in symbols}
    choices = [traced]
    for shift in (1, 2, 8):
        other = {symbol: size + shift for symbol, size in traced.items()}
        if _allowed(shape_env, other):
            choices.append(other)
            break
    return choices


def _shape_env(nodes: Iterable[fx.Node]) -> Any:
    for node in nodes:
        value = val(node)
        for size in value.shape if isinstance(value, torch.Tensor) else [value]:
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    raise AssertionError("symbols without a shape environment")


def _allowed(shape_env: Any, sizes: Mapping[Any, int]) -> bool:
    """Whether `sizes` pass every guard that depends on them alone."""
    for guard in shape_env.guards:
        if guard.expr.free_symbols <= set(sizes) and not bool(guard.expr.subs(sizes)):
            return False
    ranges = shape_env.var_to_range
    return all(ranges[s].lower <= v <= ranges[s].upper for s, v in sizes.items() if s in ranges)
