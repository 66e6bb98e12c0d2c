"""Find candidate MoE layers in a joint graph, by dataflow from the expert GEMMs.

Contract: reads the graph, changes nothing, and proves nothing. It proposes; `prove.py` disposes.

Steps
1. Expert GEMMs: `aten._grouped_mm` of rows with a stack of matrices, or `aten.bmm` whose one
   operand was gathered from a stack by index (one matrix per row).
2. Pairs: the GEMMs whose results reach another GEMM's rows through row-local operations are its
   in-projections (one, or two for separate gate and up).
3. Boundaries: tokens `x` are looked for up the rows of the in-projection, the output `y` down the
   rows of the out-projection, expert ids and routing weights among the values that cut the region
   off from the rest of the graph. Every cut that closes the region is a candidate, the widest
   first, so that as much as can be proven is replaced.

Node names, positions and the spelling of the index arithmetic play no part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
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
    is_value,
    nearest_ancestors,
    numel,
    positions,
    ratio,
    same_size,
    val,
)
from comet_compile.passes.reasons import Rejection, RejectReason

aten = torch.ops.aten
prims = torch.ops.prims
c10d = torch.ops._c10d_functional

# how many cuts are tried for one layer, and how far up from its output ids and weights are sought
_MAX_CANDIDATES = 48
_MAX_REACH = 400
_MAX_TOP_K = 128


@dataclasses.dataclass(frozen=True)
class ExpertGemm:
    """One product of rows with a stack of expert matrices.

    `stack` is [L, K, N], or [L, N, K] if `transposed` (one matrix per expert either way).
    """

    node: fx.Node
    rows: fx.Node
    stack: fx.Node
    transposed: bool

    @property
    def num_experts(self) -> int:
        return int(val(self.stack).shape[0])

    @property
    def in_features(self) -> int:
        return int(val(self.stack).shape[2 if self.transposed else 1])

    @property
    def out_features(self) -> int:
        return int(val(self.stack).shape[1 if self.transposed else 2])


@dataclasses.dataclass(frozen=True)
class ExpertPair:
    """The in-projections (one, or gate and up apart) and the out-projection of one layer."""

    ins: tuple[ExpertGemm, ...]
    out: ExpertGemm

    @property
    def stacks(self) -> tuple[fx.Node, ...]:
        return (*(gemm.stack for gemm in self.ins), self.out.stack)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A region cut out of the graph: its inputs, its output and the nodes in between.

    `nodes` are in graph order and hold the boundary nodes too; `biases` are the [L, columns]
    tables that rows pick a line of. `top_k` is the number of ids per token.
    """

    pair: ExpertPair
    x: fx.Node
    ids: fx.Node
    weights: fx.Node | None
    y: fx.Node
    biases: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    top_k: int

    def __str__(self) -> str:
        return f"{self.y.name} = moe({self.x.name}, {self.ids.name}, {self.weights})"

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        weights = () if self.weights is None else (self.weights,)
        return (self.x, self.ids, *weights, *self.pair.stacks, *self.biases)


# -- expert GEMMs and their pairs -------------------------------------------------------------


def find_pairs(
    graph: fx.Graph, backward: set[fx.Node]
) -> tuple[list[ExpertPair], list[tuple[fx.Node, Rejection]]]:
    """The expert layers of the forward part, and the GEMMs that belong to none."""
    gemms: dict[fx.Node, ExpertGemm] = {}
    refused: list[tuple[fx.Node, Rejection]] = []
    for node in graph.nodes:
        if node in backward or node.op != "call_function":
            continue
        if "_scaled_grouped_mm" in str(node.target):
            detail = f"{node.name} multiplies in a scaled 8-bit format"
            refused.append((node, Rejection(RejectReason.UNSUPPORTED_DTYPE, detail)))
        gemm = _expert_gemm(node)
        if gemm is not None:
            gemms[node] = gemm
    pairs, used = [], set()
    for node, gemm in gemms.items():
        sources = _row_local_sources(gemm.rows, gemms)
        if not sources:
            continue
        pair = ExpertPair(tuple(gemms[s] for s in sources), gemm)
        pairs.append(pair)
        used |= {node, *sources}
    for node in gemms:
        if node not in used:
            detail = f"{node.name} neither feeds nor follows another expert GEMM"
            refused.append((node, Rejection(RejectReason.UNPAIRED_GEMM, detail)))
    return pairs, refused


def _expert_gemm(node: fx.Node) -> ExpertGemm | None:
    if node.target is aten._grouped_mm.default:
        rows, stack = node.args[0], node.args[1]
        if val(rows).ndim == 2 and val(stack).ndim == 3:
            return ExpertGemm(node, rows, stack, transposed=False)
        return None
    if node.target is aten.bmm.default:
        left, right = node.args
        for operand, other, on_left in ((left, right, True), (right, left, False)):
            gathered = _gathered_stack(operand)
            if gathered is not None:
                stack, flipped = gathered
                # left [S, N, K] @ column, or row @ right [S, K, N]
                return ExpertGemm(node, other, stack, transposed=on_left != flipped)
    return None


def _gathered_stack(operand: fx.Node) -> tuple[fx.Node, bool] | None:
    """(stack, whether its matrices are flipped) if `operand` is stack[ids]."""
    flipped = False
    while operand.target in (aten.permute.default, aten.clone.default):
        if operand.target is aten.permute.default:
            if list(operand.args[1]) not in ([0, 2, 1], [0, 1, 2]):
                return None
            flipped ^= list(operand.args[1]) == [0, 2, 1]
        operand = operand.args[0]
    if operand.target is not aten.index.Tensor or len(operand.args[1]) != 1:
        return None
    stack, (index,) = operand.args
    if val(stack).ndim == 3 and is_float(stack) and index is not None and is_integer(index):
        return stack, flipped
    return None


_ROW_LOCAL = {
    aten.split,
    aten.split_with_sizes,
    aten.slice,
    aten.cat,
    aten.view,
    aten.reshape,
    aten.squeeze,
    aten.unsqueeze,
    aten.clone,
    aten.permute,
    prims.convert_element_type,
    aten._to_copy,
}


def _is_row_local(node: fx.Node) -> bool:
    target = node.target
    if target is getattr and node.op == "call_function":
        return False
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.pointwise in target.tags or target.overloadpacket in _ROW_LOCAL
    return node.op == "call_function" and getattr(target, "__name__", "") == "getitem"


def _row_local_sources(rows: fx.Node, gemms: dict[fx.Node, ExpertGemm]) -> list[fx.Node]:
    """The nearest expert GEMMs that `rows` come from without leaving their rows."""
    reached = ancestors([rows], stop=lambda n: n in gemms or not _is_row_local(n))
    return [node for node in gemms if node in reached]


# -- boundaries -------------------------------------------------------------------------------


def candidates(
    pair: ExpertPair, graph: fx.Graph, backward: set[fx.Node]
) -> Iterator[Candidate | Rejection]:
    """Regions around `pair`, the widest first; if there is none, one Rejection that says why."""
    order = positions(graph)
    outputs = _output_chain(pair, backward)
    tokens = _token_chain(pair)
    proposed = 0
    best: Rejection | None = None
    seen_shape = False
    for y in outputs:
        for x in tokens:
            if not same_size(numel(val(x).shape[:-1]), numel(val(y).shape[:-1])):
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
        detail = f"{pair.ins[0].rows.name} cannot be followed to [T, {pair.ins[0].in_features}]"
        yield Rejection(RejectReason.NO_TOKENS, detail)
    elif not outputs or not seen_shape:
        detail = f"{pair.out.node.name} reaches no value of the tokens' number of rows"
        yield Rejection(RejectReason.NO_OUTPUT, detail)
    else:
        detail = f"no integer tensor cuts off the routing of {pair.out.node.name}"
        yield best or Rejection(RejectReason.NO_EXPERT_IDS, detail)


_MOVES = {
    aten.index,
    aten.index_select,
    aten.gather,
    aten.view,
    aten.reshape,
    aten.expand,
    aten.clone,
    aten.permute,
    aten.unsqueeze,
    aten.squeeze,
    aten.slice,
    aten.select,
    aten.split,
    aten.split_with_sizes,
    aten.repeat,
    aten.constant_pad_nd,
    prims.convert_element_type,
    aten._to_copy,
    c10d.wait_tensor,
    c10d.all_to_all_single,
    c10d.all_gather_into_tensor,
}


def _is_constant(node: Any) -> bool:
    return isinstance(node, fx.Node) and not node.all_input_nodes and node.op == "call_function"


def _token_chain(pair: ExpertPair) -> list[fx.Node]:
    """Where the rows of the in-projection come from: [.., H] values, matrices first, then from
    the outside in."""
    chain: list[fx.Node] = []
    node: fx.Node | None = pair.ins[0].rows
    features = pair.ins[0].in_features
    while node is not None:
        if is_float(node) and val(node).ndim >= 2 and same_size(val(node).shape[-1], features):
            chain.append(node)
        node = _main_source(node)
    dtype = val(pair.ins[0].rows).dtype
    chain = [node for node in reversed(chain) if val(node).dtype == dtype]
    return sorted(chain, key=lambda n: val(n).ndim != 2)


def _main_source(node: fx.Node) -> fx.Node | None:
    """The operand that carries the rows on, if `node` only moves, masks or scales rows."""
    if node.op != "call_function":
        return None
    packet = getattr(node.target, "overloadpacket", node.target)
    if packet in _MOVES or getattr(node.target, "__name__", "") == "getitem":
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    if packet is aten.cat:
        rows = [n for n in node.args[0] if not _is_constant(n)]
        return rows[0] if rows else None
    if packet is aten.where:
        rows = [n for n in node.args[1:] if isinstance(n, fx.Node) and not _is_constant(n)]
        return rows[0] if len(rows) == 1 else None
    if packet is aten.mul:
        return _scaled_rows(node)
    return None


def _scaled_rows(node: fx.Node) -> fx.Node | None:
    """The rows operand of rows * scale, where scale is one number per row."""
    tensors = [n for n in node.args if isinstance(n, fx.Node) and is_tensor(n)]
    rows = [n for n in tensors if val(n).ndim >= 1 and not _is_one(val(n).shape[-1])]
    return rows[0] if len(tensors) == 2 and len(rows) == 1 else None


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


_COMBINES = _MOVES | {
    aten.index_put,
    aten.index_add,
    aten.scatter_add,
    aten.scatter,
    aten.where,
    aten.mul,
    aten.sum,
    aten.add,
    aten.cat,
    aten.bmm,
    c10d.all_reduce,
    c10d.reduce_scatter_tensor,
}


def _output_chain(pair: ExpertPair, backward: set[fx.Node]) -> list[fx.Node]:
    """Where the rows of the out-projection go: [.., H] values, matrices first, widest first."""
    features = pair.out.out_features
    chain: list[fx.Node] = []
    node: fx.Node = pair.out.node
    while True:
        if is_float(node) and val(node).ndim >= 2 and same_size(val(node).shape[-1], features):
            chain.append(node)
        # a size read off the value is no use of it
        users = [u for u in node.users if u not in backward and u.op != "output" and is_value(u)]
        if len(users) != 1 or any(u.op == "output" for u in node.users):
            break
        if getattr(users[0].target, "overloadpacket", None) not in _COMBINES:
            break
        if users[0].target is aten.add.Tensor and not _adds_bias(users[0], node):
            break
        node = users[0]
    chain.reverse()
    return sorted(chain, key=lambda n: val(n).ndim != 2)


def _adds_bias(node: fx.Node, rows: fx.Node) -> bool:
    others = [n for n in node.args[:2] if isinstance(n, fx.Node) and n is not rows]
    return all(_is_constant(n) or n.target in (aten.index.Tensor, aten.mul.Tensor) for n in others)


def _cuts(
    pair: ExpertPair, x: fx.Node, y: fx.Node, order: dict[fx.Node, int]
) -> Iterator[Candidate | Rejection]:
    """Choices of (ids, weights) that close the region between `x` and `y`."""
    stops = {x, *pair.stacks}
    latest = nearest_ancestors(y, order, stops, _MAX_REACH)
    num_tokens = numel(val(x).shape[:-1])
    slots: dict[fx.Node, int] = {}
    for node in latest[1:]:
        if is_tensor(node) and val(node).ndim > 0 and (is_integer(node) or is_float(node)):
            per_token = ratio(numel(val(node).shape), num_tokens)
            if per_token is not None and 1 <= per_token <= _MAX_TOP_K:
                slots[node] = per_token
    choices: list[fx.Node | None] = [None, *(n for n in slots if is_float(n))]
    experts = pair.out.num_experts
    # scores that the ids were chosen from are no routing weights: cutting there hides the router
    follows = {w: dependents([w], reversed(latest)) for w in choices if w is not None}
    for ids in (n for n in slots if is_integer(n)):
        # weights that follow from the ids were permuted by them: no longer one per slot
        permuted = dependents([ids], reversed(latest))
        for weights in choices:
            if weights is not None and (
                slots[weights] != slots[ids] or weights in permuted or ids in follows[weights]
            ):
                continue
            cut = stops | {ids} | ({weights} if weights is not None else set())
            closed = _close(y, cut, experts)
            if isinstance(closed, Rejection):
                yield closed
                continue
            if closed is None or not cut <= closed.nodes:
                continue
            nodes = tuple(sorted(closed.nodes, key=order.__getitem__))
            yield Candidate(pair, x, ids, weights, y, closed.biases, nodes, slots[ids])


@dataclasses.dataclass(frozen=True)
class _Closure:
    nodes: set[fx.Node]
    biases: tuple[fx.Node, ...]


def _close(y: fx.Node, cut: set[fx.Node], num_experts: int) -> _Closure | Rejection | None:
    """Everything between `cut` and `y`; None if the region depends on a graph input beyond it.

    Tables [L, columns] that rows index by expert are inputs too: biases. A number that enters the
    graph as a 0-d tensor is the one input that no cut can leave outside.
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
        table = _bias_table(node, num_experts)
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


def _bias_table(node: fx.Node, num_experts: int) -> fx.Node | None:
    if node.target is not aten.index.Tensor:
        return None
    table, indices = node.args
    if val(table).ndim != 2 or not is_float(table) or len(indices) != 1:
        return None
    size = val(table).shape[0]
    return table if isinstance(size, int) and size == num_experts else None


def collectives(candidate: Candidate) -> list[fx.Node]:
    """The collectives inside the region that do more than wait."""
    return [
        n for n in candidate.nodes if is_collective(n) and n.target is not c10d.wait_tensor.default
    ]
