"""Follow rows up from the in-projection to the tokens, and down from the out-projection to y.

On their way rows are moved between orders and ranks, masked, scaled and summed; what else happens
to them ends the chain.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from comet_compile.passes.graph_view import (
    is_float,
    is_tensor,
    is_value,
    numel,
    same_size,
    stored,
    val,
    widens,
)
from comet_compile.passes.region import ExpertPair

aten = torch.ops.aten
prims = torch.ops.prims
c10d = torch.ops._c10d_functional

SHAPES = {
    aten.view,
    aten.reshape,
    aten.expand,
    aten.clone,
    aten.permute,
    aten.unsqueeze,
    aten.squeeze,
}

_MOVES = SHAPES | {
    aten.index,
    aten.index_select,
    aten.gather,
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


# what writes rows into others, and which operand they are
_WRITES = {
    aten.index_put: 2,
    aten.index_copy: 3,
    aten.index_add: 3,
    aten.scatter: 3,
    aten.scatter_add: 3,
}


def _is_constant(node: Any) -> bool:
    return isinstance(node, fx.Node) and not node.all_input_nodes and node.op == "call_function"


def token_chain(pair: ExpertPair) -> list[fx.Node]:
    """Where the rows of the in-projection come from: [.., H] values, matrices first, then from
    the outside in."""
    chain: list[fx.Node] = []
    features = pair.ins[0].in_features
    dtypes: set[torch.dtype] = set()
    for node in upwards(pair.ins[0].rows[0]):
        if is_float(node):
            dtypes.add(val(node).dtype)
            fits = val(node).ndim >= 2 and same_size(val(node).shape[-1], features)
            # the op takes tokens in the rows' dtype: widened before they are moved, not behind
            if fits and all(widens(val(node).dtype, dtype) for dtype in dtypes):
                chain.append(node)
    chain.reverse()
    if pair.dense and pair.out.num_experts > 1 and not pair.out.is_loop:
        # the tokens are as many as the rows of one expert
        rows = numel(val(pair.ins[0].rows[0]).shape)
        chain = [n for n in chain if not same_size(numel(val(n).shape), rows)]
    return sorted(chain, key=lambda n: val(n).ndim != 2)


def upwards(rows: fx.Node) -> list[fx.Node]:
    """`rows` and what they were before they were moved, masked or scaled, nearest first."""
    found = [rows]
    while (source := _main_source(found[-1])) is not None:
        found.append(source)
    return found


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
    if packet in _WRITES:
        return node.args[_WRITES[packet]]
    if packet in (aten.bmm, aten.mm):
        return _picked_rows(node)
    return None


def _picked_rows(node: fx.Node) -> fx.Node | None:
    """The rows that a one-hot matrix picks from: an einsum over tokens."""
    picks, rows = node.args
    is_one = val(node).ndim == 2 or _is_one(val(node).shape[0])
    return rows if is_one and _is_one_hot(picks) else None


def _is_one_hot(node: fx.Node) -> bool:
    """Whether `node` may be bools, or integers, as numbers to multiply with."""
    while getattr(node.target, "overloadpacket", None) in SHAPES:
        node = node.args[0]
    is_cast = node.target is prims.convert_element_type.default
    return is_cast and not val(node.args[0]).is_floating_point()


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
    aten.mean,
    aten.sum,
    aten.add,
    aten.cat,
    aten.bmm,
    aten.mm,
    c10d.all_reduce,
    c10d.reduce_scatter_tensor,
}


def output_chain(
    pair: ExpertPair, backward: set[fx.Node], order: Mapping[fx.Node, int]
) -> list[fx.Node]:
    """Where the rows of the out-projection go: [.., H] values, matrices first, widest first."""
    features = pair.out.out_features
    chain: list[fx.Node] = []
    node = _meeting(pair.out.nodes, backward, order)
    while node is not None:
        if is_float(node) and val(node).ndim >= 2 and same_size(val(node).shape[-1], features):
            chain.append(node)
        users = _forward_users(node, backward)
        if users is None or len(users) != 1 or not _combines(users[0]):
            break
        if users[0].target is aten.mm.default and users[0].args[1] is not node:
            break  # a projection behind the layer
        if users[0].target is aten.add.Tensor and not _adds_bias(users[0], node, pair):
            break
        node = users[0]
    chain.reverse()
    return sorted(chain, key=lambda n: val(n).ndim != 2)


def _meeting(
    nodes: Sequence[fx.Node], backward: set[fx.Node], order: Mapping[fx.Node, int]
) -> fx.Node | None:
    """The first value that the rows of all of `nodes` have gone into; None if they part."""
    heap = [(order[node], node) for node in nodes]
    heapq.heapify(heap)
    seen = set(nodes)
    while len(heap) > 1:
        _, node = heapq.heappop(heap)
        users = _forward_users(node, backward)
        if not users or not all(map(_combines, users)):
            return None
        for user in users:
            if user not in seen:
                seen.add(user)
                heapq.heappush(heap, (order[user], user))
    return heap[0][1]


def _combines(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in _COMBINES


def _forward_users(node: fx.Node, backward: set[fx.Node]) -> list[fx.Node] | None:
    """What the forward makes of a value; None if it leaves the graph."""
    if any(u.op == "output" for u in node.users):
        return None
    # a size read off the value is no use of it
    return [u for u in node.users if is_value(u) and not _serves_backward(u, backward)]


def _serves_backward(node: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether a value belongs to the backward, or is a view or copy made for it alone."""
    while node not in backward:
        moves = getattr(node.target, "overloadpacket", None) in _MOVES
        if not moves or len(node.users) != 1:
            return False
        (node,) = node.users
    return True


def _adds_bias(node: fx.Node, rows: fx.Node, pair: ExpertPair) -> bool:
    if pair.dense and added_table(node, pair.out.num_experts) is not None:
        return True
    others = [n for n in node.args[:2] if isinstance(n, fx.Node) and n is not rows]
    return all(_is_constant(n) or n.target in (aten.index.Tensor, aten.mul.Tensor) for n in others)


def added_table(node: fx.Node, num_experts: int) -> fx.Node | None:
    """The table [L, columns] of the graph's inputs of which `node` adds a line to each expert's
    rows."""
    if node.target is not aten.add.Tensor:
        return None
    for operand in node.args[:2]:
        if not isinstance(operand, fx.Node) or stored(operand) is None:
            continue
        table = operand
        while is_float(table) and val(table).ndim != 2 and table.op == "call_function":
            table = table.args[0]
        if is_float(table) and val(table).ndim == 2 and same_size(val(table).shape[0], num_experts):
            return table
    return None
