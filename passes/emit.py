"""Put new nodes into a graph, with their fake values and the book-keeping of what they replace."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from comet_compile.passes.graph_view import val

aten = torch.ops.aten

# what a new node inherits from the node whose place it takes
_INHERITED = (
    "stack_trace",
    "nn_module_stack",
    "seq_nr",
    "partitioner_tag",
    "custom",
    "ac_graph_id",
)


class Emitter:
    """Inserts nodes with their fake values at one place of the graph."""

    def __init__(self, graph: fx.Graph, before: fx.Node, like: fx.Node) -> None:
        self.graph, self.before, self.like = graph, before, like

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        set_value(node, self.like)
        inherit(node, self.like)
        return node

    def view(self, node: fx.Node, shape: list[Any]) -> fx.Node:
        if not val(node).is_contiguous():
            node = self.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.call(aten.view.default, node, shape)


def inherit(node: fx.Node, source: fx.Node) -> None:
    """Copy the book-keeping of `source`, so that partitioner and debuggers see its successor."""
    for key in (*_INHERITED, "recompute"):
        if key in source.meta:
            node.meta[key] = source.meta[key]


def set_value(node: fx.Node, like: fx.Node | None = None) -> None:
    """Run the node on the fake values of its arguments, under their fake mode.

    `like` is a node of the same mode, for one without arguments.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), val)
    nodes = [*node.all_input_nodes, *([] if like is None else [like])]
    mode = next(v.fake_mode for n in nodes if hasattr(v := val(n), "fake_mode"))
    with mode:
        node.meta["val"] = node.target(*args, **kwargs)


def getters(node: fx.Node, count: int) -> list[fx.Node]:
    found: list[fx.Node] = []
    for index in range(count):
        found.append(getter(node, index, found[-1] if found else node))
    return found


def getter(node: fx.Node, index: int, after: fx.Node) -> fx.Node:
    """One output of `node`, placed behind `after`."""
    with node.graph.inserting_after(after):
        getter = node.graph.call_function(operator.getitem, (node, index))
    getter.meta["val"] = val(node)[index]
    inherit(getter, node)
    return getter


def same_shape(a: Iterable[Any], b: Iterable[Any]) -> bool:
    return all(str(m) == str(n) for m, n in zip(a, b, strict=True))


def refresh_values(root: fx.Node) -> None:
    """Recompute the fake values that follow from `root`: sizes known on the host only are gone."""
    changed = {root}
    node = root.next
    while node.op != "output":
        if node.op == "call_function" and changed & set(node.all_input_nodes):
            old = val(node)
            set_value(node)
            if str(old) != str(val(node)):
                changed.add(node)
        node = node.next
