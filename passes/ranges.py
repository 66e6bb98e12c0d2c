"""What values an integer tensor of the graph can hold, by interval arithmetic.

Used for two questions: can an expert id be outside [0, E), or twice in a row? Only what the graph
itself shows counts; unknown bounds are infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from comet_compile.passes.graph_view import val

aten = torch.ops.aten
prims = torch.ops.prims

Interval = tuple[float, float]
_UNKNOWN: Interval = (-math.inf, math.inf)

_SAME_VALUES = {
    aten.view,
    aten.reshape,
    aten.permute,
    aten.transpose,
    aten.unsqueeze,
    aten.squeeze,
    aten.expand,
    aten.clone,
    aten.slice,
    aten.select,
    aten.index,
    aten.gather,
    aten.index_select,
    aten.alias,
    prims.convert_element_type,
    aten._to_copy,
}


def interval(node: Any) -> Interval:
    """Bounds (inclusive) of the values of an integer node or number."""
    if isinstance(node, (int, float)):
        return (node, node)
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return _UNKNOWN
    if getattr(node.target, "__name__", "") == "getitem":
        return _of_output(node.args[0], node.args[1])
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _SAME_VALUES:
        return interval(node.args[0])
    rule = _RULES.get(packet)
    return rule(node) if rule else _UNKNOWN


def are_distinct(node: fx.Node) -> bool:
    """Whether the ids of one token are known to differ: positions that topk chose in a row."""
    while node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", None)
        if packet in (aten.view, aten.reshape, aten.clone, aten.alias, prims.convert_element_type):
            node = node.args[0]
            continue
        if getattr(node.target, "__name__", "") != "getitem" or node.args[1] != 1:
            return False
        source = node.args[0]
        if getattr(source.target, "overloadpacket", None) is not aten.topk:
            return False
        dim = source.args[2] if len(source.args) > 2 else -1
        return dim in (-1, val(node).ndim - 1)
    return False


def _of_output(node: fx.Node, output: int) -> Interval:
    """topk, sort and max return positions along a dimension as their second output."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet in (aten.topk, aten.sort, aten.max, aten.min):
        if output == 0:
            return interval(node.args[0])
        default = -1 if packet in (aten.topk, aten.sort) else 0
        place = 2 if packet is aten.topk else 1
        dim = node.args[place] if len(node.args) > place else default
        return _positions(node.args[0], dim if isinstance(dim, int) else default)
    return _UNKNOWN


def _positions(source: fx.Node, dim: int) -> Interval:
    size = val(source).shape[dim]
    return (0, size - 1) if isinstance(size, int) else (0, math.inf)


def _argmax(node: fx.Node) -> Interval:
    dim = node.args[1] if len(node.args) > 1 else None
    return _positions(node.args[0], dim) if isinstance(dim, int) else (0, math.inf)


def _constant(node: fx.Node) -> Interval:
    fill = node.args[-1]
    return (fill, fill) if isinstance(fill, (int, float)) else _UNKNOWN


def _where(node: fx.Node) -> Interval:
    condition, yes, no = node.args
    low_yes, high_yes = interval(yes)
    low, high = interval(no)
    # where(v == low, other, v): what is left of v starts one higher
    if (
        isinstance(condition, fx.Node)
        and condition.target is aten.eq.Scalar
        and condition.args[0] is no
        and condition.args[1] == low
    ):
        low += 1
    return (min(low, low_yes), max(high, high_yes))


def _remainder(node: fx.Node) -> Interval:
    divisor = node.args[1]
    return (0, divisor - 1) if isinstance(divisor, int) and divisor > 0 else _UNKNOWN


def _fmod(node: fx.Node) -> Interval:
    divisor = node.args[1]
    if not isinstance(divisor, int) or divisor <= 0:
        return _UNKNOWN
    low, high = interval(node.args[0])
    return (max(min(low, 0), 1 - divisor), min(max(high, 0), divisor - 1))


def _clamp(node: fx.Node) -> Interval:
    low, high = interval(node.args[0])
    bounds = [*node.args[1:], None, None][:2]
    if isinstance(bounds[0], int):
        low, high = max(low, bounds[0]), max(high, bounds[0])
    if isinstance(bounds[1], int):
        low, high = min(low, bounds[1]), min(high, bounds[1])
    return (low, high)


def _clamp_min(node: fx.Node) -> Interval:
    low, high = interval(node.args[0])
    floor = interval(node.args[1])[0]
    return (max(low, floor), max(high, floor))


def _clamp_max(node: fx.Node) -> Interval:
    low, high = interval(node.args[0])
    ceiling = interval(node.args[1])[1]
    return (min(low, ceiling), min(high, ceiling))


def _shift(sign: int) -> Callable[[fx.Node], Interval]:
    def rule(node: fx.Node) -> Interval:
        low, high = interval(node.args[0])
        other_low, other_high = interval(node.args[1])
        if sign < 0:
            other_low, other_high = -other_high, -other_low
        return (low + other_low, high + other_high)

    return rule


def _cat(node: fx.Node) -> Interval:
    parts = [interval(n) for n in node.args[0]]
    return (min(p[0] for p in parts), max(p[1] for p in parts))


_RULES: dict[Any, Callable[[fx.Node], Interval]] = {
    aten.argmax: _argmax,
    aten.argmin: _argmax,
    aten.full: _constant,
    aten.scalar_tensor: _constant,
    aten.where: _where,
    aten.remainder: _remainder,
    aten.fmod: _fmod,
    aten.clamp: _clamp,
    aten.clamp_min: _clamp_min,
    aten.clamp_max: _clamp_max,
    aten.add: _shift(1),
    aten.sub: _shift(-1),
    aten.cat: _cat,
    aten.stack: _cat,
}
