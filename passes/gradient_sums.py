"""Add up what the experts of a loop give to a gradient, apart from what others give to it.

    dx = ((d_shared + d_expert_1) + d_expert_0) + d_router
    dx = (d_shared + d_router) + (d_expert_1 + d_expert_0)

Autograd adds up in the order in which a backward runs, so what came behind the loop in the forward
is in front of it here, and no value is the layer's own gradient. The sum is the same but for
rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from comet_compile.passes.edits import Edits
from comet_compile.passes.graph_view import val

aten = torch.ops.aten

# from a product's gradient to the sum that it goes into: shapes, casts, a routing weight
_MAX_STEPS = 6


def sum_apart(products: Iterable[fx.Node], backward: set[fx.Node], edits: Edits) -> None:
    """Regroup the sum that all of `products` (nodes of the backward) go into, if it has others."""
    ways = [_way_down(product, backward) for product in products]
    if len(ways) < 2 or not all(ways):
        return
    root = _root(ways[0][-1], backward)
    terms = _terms(root, backward)
    own = [term for term in terms if any(term in way for way in ways)]
    others = [term for term in terms if term not in own]
    if not others or not all(any(term in way for term in own) for way in ways):
        return
    if others == terms[-len(others) :]:
        return  # they are added behind the loop's: these are a sum already
    users = list(root.users)
    total = _sum([_sum(others, root, edits), _sum(own, root, edits)], root, edits)
    for user in users:
        edits.redirect(user, root, total)


def _way_down(node: fx.Node, backward: set[fx.Node]) -> list[fx.Node]:
    """`node` and what is made of it until it is added to something; empty if it is not."""
    way = [node]
    while len(way) <= _MAX_STEPS:
        users = [user for user in way[-1].users if user in backward]
        if len(users) != 1:
            return []
        if _is_sum(users[0]):
            return [*way, users[0]]
        way.append(users[0])
    return []


def _is_sum(node: fx.Node) -> bool:
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    operands = [val(n) for n in node.args if isinstance(n, fx.Node)]
    same = len(operands) == 2 and operands[0].shape == operands[1].shape
    return same and operands[0].dtype == operands[1].dtype


def _root(node: fx.Node, backward: set[fx.Node]) -> fx.Node:
    """The last of the sums that only go into one another."""
    while len(node.users) == 1 and _is_sum(user := next(iter(node.users))) and user in backward:
        node = user
    return node


def _terms(root: fx.Node, backward: set[fx.Node]) -> list[fx.Node]:
    """What `root` is the sum of, in the order in which it is added."""
    terms: list[fx.Node] = []
    for operand in root.args:
        assert isinstance(operand, fx.Node)
        inner = operand in backward and _is_sum(operand) and len(operand.users) == 1
        terms += _terms(operand, backward) if inner else [operand]
    return terms


def _sum(terms: Sequence[fx.Node], before: fx.Node, edits: Edits) -> fx.Node:
    return functools.reduce(lambda a, b: edits.add(before, aten.add.Tensor, a, b), terms)
