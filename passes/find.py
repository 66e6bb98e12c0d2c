"""Find candidate MoE layers in a joint graph, by dataflow from the expert GEMMs.

Contract: reads the graph, changes nothing, and proves nothing. It proposes; `prove.py` disposes.

The pairs of expert GEMMs come from `expert_gemms.py`. Around each, tokens `x` are looked for up the
rows of the in-projection, the output `y` down the rows of the out-projection (`row_chains.py`),
expert ids and routing weights among the values that cut the region off from the rest of the graph.
Every cut that closes the region is a candidate, the widest first, so that as much as can be proven
is replaced.

Node names, positions and the spelling of the index arithmetic play no part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from comet_compile.passes.graph_view import (
    ancestors,
    dependents,
    is_collective,
    is_float,
    is_integer,
    is_known_size,
    is_tensor,
    nearest_ancestors,
    numel,
    positions,
    ratio,
    same_size,
    val,
)
from comet_compile.passes.products import table_row
from comet_compile.passes.ranges import interval
from comet_compile.passes.reasons import Rejection, RejectReason
from comet_compile.passes.region import Candidate, ExpertPair, Kept
from comet_compile.passes.row_chains import added_table, output_chain, token_chain
from comet_compile.passes.scores import scores_from

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

# how many cuts are tried for one layer, and how far up from its output ids and weights are sought
_MAX_CANDIDATES = 48
_MAX_REACH = 400
_REACH_PER_EXPERT = 48  # where each expert's part of the layer is nodes of its own
_MAX_TOP_K = 128


def candidates(
    pair: ExpertPair, graph: fx.Graph, backward: set[fx.Node]
) -> Iterator[Candidate | Rejection]:
    """Regions around `pair`, the widest first; if there is none, one Rejection that says why."""
    order = positions(graph)
    outputs = output_chain(pair, backward, order)
    tokens = token_chain(pair)
    proposed = 0
    best: Rejection | None = None
    seen_shape = False
    for y in outputs:
        for x in tokens:
            if not _may_be_as_many(numel(val(y).shape[:-1]), numel(val(x).shape[:-1])):
                continue
            seen_shape = True
            for found in _cuts(pair, x, y, order):
                if isinstance(found, Rejection):
                    best = best or found
                    continue
                yield found
                proposed += 1
                if proposed == _MAX_CANDIDATES:
                    return
    if proposed:
        return
    if not tokens:
        detail = f"{pair.ins[0].rows[0].name} cannot be followed to [T, {pair.ins[0].in_features}]"
        yield Rejection(RejectReason.NO_TOKENS, detail)
    elif not outputs or not seen_shape:
        detail = f"{pair.out.node.name} reaches no value of the tokens' number of rows"
        yield Rejection(RejectReason.NO_OUTPUT, detail)
    else:
        detail = f"no integer tensor cuts off the routing of {pair.out.node.name}"
        yield best or Rejection(RejectReason.NO_EXPERT_IDS, detail)


def is_routed(pair: ExpertPair, graph: fx.Graph, backward: set[fx.Node]) -> bool:
    """Whether there is a candidate at all, or something else that looks like expert ids.

    Of GEMMs with whole stacks alone, many models have some that are no experts.
    """
    if any(isinstance(found, Candidate) for found in candidates(pair, graph, backward)):
        return True
    stops = {*token_chain(pair), *pair.stacks}
    order = positions(graph)
    chain = output_chain(pair, backward, order)
    last = pair.out.nodes[-1]
    users = [user for user in last.users if user in order and user not in backward]
    roots = chain[:1] or [last, *users]
    around = {n for root in roots for n in nearest_ancestors(root, order, stops, _reach(pair))}
    bounds = [interval(node) for node in around if is_integer(node)]
    return any(low >= 0 and high < pair.out.num_experts for low, high in bounds)


def _may_be_as_many(num_rows: Any, num_tokens: Any) -> bool:
    """Whether an output of `num_rows` may hold one row per token.

    The number of rows that come back from other ranks is known at run time; adding or multiplying
    them with a value per token settles it, except for one token, which broadcasts.
    """
    if same_size(num_rows, num_tokens):
        return True
    return same_size(num_tokens, 1) and not isinstance(num_rows, int)


def _cuts(
    pair: ExpertPair, x: fx.Node, y: fx.Node, order: dict[fx.Node, int]
) -> Iterator[Candidate | Rejection]:
    """Choices of (ids, weights) that close the region between `x` and `y`."""
    stops = {x, *pair.stacks}
    latest = nearest_ancestors(y, order, stops, _reach(pair))
    num_tokens = numel(val(x).shape[:-1])
    slots: dict[fx.Node, int] = {}
    for node in latest[1:]:
        if is_tensor(node) and val(node).ndim > 0 and (is_integer(node) or is_float(node)):
            per_token = ratio(numel(val(node).shape), num_tokens)
            if per_token is not None and 1 <= per_token <= _MAX_TOP_K:
                slots[node] = per_token
    choices: list[fx.Node | None] = [None, *(n for n in slots if is_float(n))]
    experts, within = pair.out.num_experts, set(latest)
    for ids in (n for n in slots if is_integer(n)):
        # weights that follow from the ids were permuted by them: no longer one per slot
        permuted = dependents([ids], reversed(latest))
        looked_up = _looked_up(ids, permuted)
        # scores that the ids were chosen from are no weights either: a cut there hides the router
        chosen_from = ancestors([ids], stop=lambda n: n not in within)
        for weights in choices:
            if weights is not None and (
                slots[weights] != slots[ids]
                or weights in permuted - looked_up
                or weights in chosen_from
            ):
                continue
            cut = stops | {ids} | ({weights} if weights is not None else set())
            closed = _close(y, cut, pair)
            if isinstance(closed, Rejection):
                yield closed
                continue
            if closed is None or not cut <= closed.nodes:
                continue
            if any(n.target is c10d.reduce_scatter_tensor.default for n in closed.nodes):
                continue  # no form of the op scatters what it has reduced: behind y, it stays
            nodes = tuple(sorted(closed.nodes, key=order.__getitem__))
            for first in _first_ids(ids, closed.nodes):
                plain = Candidate(
                    pair, x, ids, weights, y, closed.biases, nodes, slots[ids], first=first
                )
                yield plain
            # rows of a capacity are blocks of one size, an expert's each
            if pair.dense and all(_is_table(n, slots[ids]) for n in (ids, weights) if n):
                follows_rows = dependents(stops, nodes)
                from_ids = permuted - follows_rows
                for kept in (
                    *_kept(nodes, from_ids, num_tokens, slots[ids]),
                    *_held(nodes, from_ids, num_tokens, ids),
                ):
                    yield dataclasses.replace(plain, kept=kept)
        if not pair.dense:
            continue
        for node in latest[1:]:
            if node not in permuted or not _scores_all(node, num_tokens, experts):
                continue
            scores = scores_from(node, ids, permuted, order)
            closed = _close(y, stops | {node}, pair)
            if scores is None or not isinstance(closed, _Closure):
                continue
            if stops | {node} <= closed.nodes:
                nodes = tuple(sorted(closed.nodes, key=order.__getitem__))
                yield Candidate(pair, x, ids, node, y, closed.biases, nodes, slots[ids], scores)


def _looked_up(ids: fx.Node, permuted: set[fx.Node]) -> set[fx.Node]:
    """Numbers looked up by the ids, and scaled: one per slot, as the ids are."""
    found: set[fx.Node] = set()
    reached = [n for n in ids.users if n.target is aten.gather.default and n.args[2] is ids]
    while reached:
        node = reached.pop()
        if node in permuted and node not in found and val(node).shape == val(ids).shape:
            found.add(node)
            reached += [user for user in node.users if _is_pointwise(user)]
    return found


def _is_pointwise(node: fx.Node) -> bool:
    is_op = isinstance(node.target, torch._ops.OpOverload)
    is_cast = node.target is torch.ops.prims.convert_element_type.default
    return is_cast or (is_op and torch.Tag.pointwise in node.target.tags)


def _reach(pair: ExpertPair) -> int:
    """How many nodes up from the output ids and weights are sought."""
    return _MAX_REACH + (_REACH_PER_EXPERT * pair.out.num_experts if pair.out.is_loop else 0)


def _is_table(node: fx.Node, top_k: int) -> bool:
    """Whether `node` is [T, top_k]."""
    return val(node).ndim == 2 and same_size(val(node).shape[1], top_k)


def _kept(
    nodes: Sequence[fx.Node], follows_ids: set[fx.Node], num_tokens: Any, top_k: int
) -> Iterator[Kept]:
    """Bools that may tell for each slot whether its expert has room, in any order of the slots."""
    for node in nodes:
        if node not in follows_ids or not is_tensor(node) or val(node).dtype != torch.bool:
            continue
        if ratio(numel(val(node).shape), num_tokens) != top_k:
            continue
        if val(node).ndim != 2 or _is_table(node, top_k) or top_k == 1:
            yield Kept(node, "TA")
        if top_k > 1 and not (val(node).ndim == 2 and _is_table(node, top_k)):
            yield Kept(node, "AT")


def _held(
    nodes: Sequence[fx.Node], follows_ids: set[fx.Node], num_tokens: Any, ids: fx.Node
) -> Iterator[Kept]:
    """One-hot tensors [T, E, C] that may tell in which place an expert holds a token.

    Bools if there are any: tokens are dispatched with them, and a weight may vanish in its dtype.
    """
    low, high = interval(ids)
    found = []
    for node in nodes:
        if node not in follows_ids or not is_tensor(node) or val(node).ndim != 3:
            continue
        num_rows, num_experts, _ = val(node).shape
        is_indexed = isinstance(num_experts, int) and low >= 0 and high < num_experts
        if is_indexed and same_size(num_rows, num_tokens):
            found.append(node)
    bools = [node for node in found if val(node).dtype == torch.bool]
    for node in bools or found[-1:]:
        yield Kept(node, "TEC")


def _first_ids(ids: fx.Node, nodes: set[fx.Node]) -> list[int]:
    """Numbers that the region's experts may be counted from: 0, and what it subtracts from `ids`,
    which are then those of the experts of all ranks.

    Between ranks just 0: there a proof holds for all of them, and the other number is one's own.
    """
    found = [0]
    if any(is_collective(n) and n.target is not c10d.wait_tensor.default for n in nodes):
        return found
    for user in ids.users:
        if user not in nodes or user.target is not aten.sub.Tensor or user.args[0] is not ids:
            continue
        if isinstance(user.args[1], int) and user.args[1] > 0:
            found.append(user.args[1])
    return found


def _scores_all(node: fx.Node, num_tokens: Any, num_experts: int) -> bool:
    """Whether `node` may hold a score of each expert for each token: floats [T, E]."""
    if not is_float(node) or val(node).ndim != 2:
        return False
    return same_size(val(node).shape[0], num_tokens) and same_size(val(node).shape[1], num_experts)


@dataclasses.dataclass(frozen=True)
class _Closure:
    nodes: set[fx.Node]
    biases: tuple[fx.Node, ...]


def _close(y: fx.Node, cut: set[fx.Node], pair: ExpertPair) -> _Closure | Rejection | None:
    """Everything between `cut` and `y`; None if the region depends on a graph input beyond it.

    Tables [L, columns] that rows index by expert are inputs too: biases. So are those that are
    added to an expert's whole block of rows, and those of which a loop takes a line. A number that
    enters the graph as a 0-d tensor is the one input that no cut can leave outside.
    """
    biases: list[fx.Node] = []
    numbers: list[fx.Node] = []
    nodes: set[fx.Node] = set()
    stack = [y]
    while stack:
        node = stack.pop()
        if node in nodes:
            continue
        nodes.add(node)
        if node in cut or is_known_size(node):
            continue
        if node.op == "get_attr" or (node.op == "placeholder" and is_tensor(node)):
            if node.op == "placeholder" and val(node).ndim == 0 and is_float(node):
                numbers.append(node)
                continue
            return None
        if pair.out.is_loop:
            table = table_row(node, pair.out.num_experts)
        elif pair.dense:
            table = added_table(node, pair.out.num_experts)
        else:
            table = _bias_table(node, pair.out.num_experts, cut)
        if table is not None:
            if table not in biases:
                biases.append(table)
            nodes.add(table)
            cut = cut | {table}
        stack.extend(node.all_input_nodes)
    if numbers:
        detail = f"{numbers[0].name} is a number that enters the graph as an input"
        return Rejection(RejectReason.RUNTIME_NUMBER, detail)
    return _Closure(nodes, tuple(biases))


def _bias_table(node: fx.Node, num_experts: int, cut: set[fx.Node]) -> fx.Node | None:
    """The table [L, columns] that `node` picks lines of.

    Tokens and rows have that shape too where there are as many as experts: what follows from the
    region's inputs is no table.
    """
    if node.target is not aten.index.Tensor:
        return None
    table, indices = node.args
    if val(table).ndim != 2 or not is_float(table) or len(indices) != 1:
        return None
    size = val(table).shape[0]
    if not isinstance(size, int) or size != num_experts:
        return None
    follows = not cut.isdisjoint(ancestors([table], stop=cut.__contains__))
    return None if follows else table
