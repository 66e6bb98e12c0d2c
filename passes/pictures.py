"""Pictures of the graph around a region, for the report: plain boxes and arrows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx

from comet_compile.passes.graph_view import ancestors, is_collective, is_float, positions, val
from comet_compile.records import GraphPicture, PictureNode, Role

_MAX_NODES = 60


def of_region(nodes: Sequence[fx.Node], inputs: Iterable[fx.Node], y: fx.Node) -> GraphPicture:
    """The region with its inputs; `nodes` are in graph order."""
    return _picture(nodes, set(inputs), {y})


def around_op(node: fx.Node, depth: int = 2) -> GraphPicture:
    """`node` with what leads to it and what follows, `depth` steps each way."""
    kept = {node}
    frontier = {node}
    for _ in range(depth):
        frontier = {s for n in frontier for s in n.all_input_nodes}
        kept |= frontier
    frontier = {node}
    for _ in range(depth):
        frontier = {u for n in frontier for u in n.users}
        kept |= frontier
    order = positions(node.graph)
    chosen = sorted(kept, key=order.__getitem__)[:_MAX_NODES]
    inputs = {n for n in chosen if not (ancestors([n]) - {n}) & set(chosen)}
    outputs = {n for n in chosen if n.op == "output" or not any(u in kept for u in n.users)}
    return _picture(chosen, inputs, outputs - inputs)


def _picture(nodes: Sequence[fx.Node], inputs: set[fx.Node], outputs: set[fx.Node]) -> GraphPicture:
    places = {node: i for i, node in enumerate(nodes)}
    edges = tuple(
        (places[source], i)
        for node, i in places.items()
        if node not in inputs
        for source in node.all_input_nodes
        if source in places
    )
    boxes = tuple(PictureNode(n.name, _op(n), _shape(n), _role(n, inputs, outputs)) for n in nodes)
    return GraphPicture(boxes, edges)


def _op(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}::{node.target.overloadpacket.__name__}"
    return getattr(node.target, "__name__", str(node.target))


def _shape(node: fx.Node) -> str:
    value = val(node)
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"{len(value)} outputs"
    return "" if value is None else str(value)


def _role(node: fx.Node, inputs: set[fx.Node], outputs: set[fx.Node]) -> Role:
    if getattr(node.target, "namespace", "") == "comet":
        return "comet"
    if node in inputs:
        return "input"
    if is_collective(node):
        return "comm"
    if node in outputs:
        return "output"
    return "compute" if is_float(node) else "index"
