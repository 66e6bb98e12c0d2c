"""Prove identical layers once: a structural signature of a piece of the graph.

Two pieces with equal signatures apply the same operations to inputs of the same shapes and dtypes,
so what was proven of one holds for the other, node by node in graph order.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from comet_compile.passes.graph_view import is_known_size, val


def signature(nodes: Sequence[fx.Node], inputs: Iterable[fx.Node]) -> Hashable:
    """A hashable description of `nodes` (in graph order); `inputs` among them count as leaves."""
    leaves = set(inputs)
    place = {node: i for i, node in enumerate(nodes)}

    def local(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return ("node", place.get(argument, -1))
        return str(argument)

    described: list[tuple[Any, ...]] = []
    for node in nodes:
        value = _described(val(node))
        if node in leaves or is_known_size(node) or node.op != "call_function":
            described.append((node.op if node not in leaves else "input", value))
            continue
        arguments = map_aggregate((node.args, node.kwargs), local)
        described.append((str(node.target), str(arguments), value))
    return tuple(described)


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return str([_described(v) for v in value])
    return str(value)
