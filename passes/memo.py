"""Prove identical layers once: nodes numbered by what they compute from a region's inputs.

A node's number stands for its operation, its constants, its dtype and shape, and the numbers of
its operands, down to the inputs, which are numbered by their role. Two nodes have equal numbers
exactly if they are the same expression of inputs of the same roles, shapes and dtypes, so what
was proven of one holds for the other. The order of the nodes plays no part, nor whether a
constant is written once for many layers or anew for each.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from comet_compile.passes.graph_view import is_known_size, val
from comet_compile.passes.region import Candidate

Roles = Mapping[fx.Node, Hashable]


class Terms:
    """Numbers for expressions, comparable between all that one of these has numbered."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def numbered(self, nodes: Iterable[fx.Node], roles: Roles) -> dict[fx.Node, int]:
        """The number of each of `nodes` (operands first); nodes with a role count as inputs."""
        found: dict[fx.Node, int] = {}
        for node in nodes:
            term = (*_operation(node, roles, found), _described(val(node)))
            # equal terms share a number by dict equality: no two can collide as hashes can
            found[node] = self._numbers.setdefault(term, len(self._numbers))
        return found


def roles_of(candidate: Candidate) -> dict[fx.Node, tuple[str, ...]]:
    """What each input is to the region; one node may be several things."""
    pair = candidate.pair
    named = [
        ("x", candidate.x),
        ("ids", candidate.ids),
        ("weights" if candidate.scores is None else "scores", candidate.weights),
        *((f"in_{i}", gemm.stack) for i, gemm in enumerate(pair.ins)),
        ("out", pair.out.stack),
        *((f"bias_{i}", table) for i, table in enumerate(candidate.biases)),
    ]
    roles: dict[fx.Node, tuple[str, ...]] = {}
    for name, node in named:
        if node is not None:
            roles[node] = (*roles.get(node, ()), name)
    return roles


def region_key(candidate: Candidate, numbers: Mapping[fx.Node, int]) -> Hashable:
    """What a proof says of a region: its output and its GEMMs, as expressions of its inputs."""
    pair = candidate.pair
    gemms = tuple(
        (*(numbers[node] for node in (*gemm.nodes, *gemm.rows)), gemm.transposed)
        for gemm in pair.gemms
    )
    kept = candidate.kept and (numbers[candidate.kept.node], candidate.kept.axes)
    return (numbers[candidate.y], gemms, candidate.top_k, candidate.first, kept)


def scores_key(candidate: Candidate, terms: Terms) -> Hashable:
    """What a proof says of scores: how they follow from the ids and from whatever tensors."""
    scores = candidate.scores
    if scores is None:
        return None
    roles: dict[fx.Node, Hashable] = {node: ("free", i) for i, node in enumerate(scores.free)}
    roles[candidate.ids] = "ids"
    return terms.numbered(scores.nodes, roles)[scores.node]


def _operation(node: fx.Node, roles: Roles, numbers: Mapping[fx.Node, int]) -> tuple[Hashable, ...]:
    if node in roles:
        return ("input", roles[node])
    if is_known_size(node):
        return ("size",)
    if node.op != "call_function":
        # nothing is proven of what depends on one of these
        return (node.op, str(node.target))
    return ("call", node.target, _frozen(node.args, numbers), _frozen(node.kwargs, numbers))


def _frozen(argument: Any, numbers: Mapping[fx.Node, int]) -> Hashable:
    """An argument as a hashable value that is equal only for an equal argument."""
    if isinstance(argument, fx.Node):
        return ("node", numbers.get(argument))
    if isinstance(argument, (list, tuple)):
        return tuple(_frozen(a, numbers) for a in argument)
    if isinstance(argument, Mapping):
        return tuple((key, _frozen(argument[key], numbers)) for key in sorted(argument))
    if isinstance(argument, slice):
        ends = (argument.start, argument.stop, argument.step)
        return ("slice", *(_frozen(a, numbers) for a in ends))
    # as text, since 1 == 1.0 == True and 0.0 == -0.0
    return (type(argument).__name__, repr(argument))


def _described(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), *(_size(size) for size in value.shape))
    if isinstance(value, (list, tuple)):
        return tuple(_described(v) for v in value)
    return _size(value)


def _size(size: Any) -> str:
    """A size or number; sizes known at run time only go by one name.

    Every layer counts its own, and they follow from the operands, which tell them apart.
    """
    return re.sub(r"\bu\d+\b", "u", str(size)) if isinstance(size, _SYMBOLIC) else str(size)


_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
