"""Arrange Python loops over experts so that each projection multiplies with one stack.

    modules of their own                      arranged
    mm_0 = x @ w_0, mm_1 = x @ w_1            stack = cat(unsqueeze(w_0), unsqueeze(w_1))
    d_w_0 = ..., d_w_1 = ... (outputs)        mm_0 = x @ stack[0], mm_1 = x @ stack[1]
                                              d = cat(unsqueeze(d_w_0), unsqueeze(d_w_1))
                                              outputs d[0], d[1]

    a stack under autocast                    arranged
    mm_0 = cast(x) @ cast(w[0]), ...          stack = cast(w); mm_0 = cast(x) @ stack[0], ...

Contract: the graph computes the same before and after (a sum of gradients but for rounding), and
`Loop.edits.undo()` takes back all that was done.
What is found then (`expert_gemms.py`) is a loop over stacks, which is proven or refused as such;
whether the layer is one of experts at all is not asked here.

Steps
1. Units: a product with an input of the graph whose rows come, without leaving their rows, from
   one or two others. Those are an expert's projections, or any model's MLP.
2. Loops: units of equal shapes whose rows come from one value. A model's MLP has no sibling; one
   unit alone is a loop only if its rows came from other ranks.
3. Stacks of each projection's matrices and biases and of their gradients; rows are cast once, and
   what the experts give to the gradient of their rows is summed apart (`gradient_sums.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from comet_compile.passes.edits import Edits
from comet_compile.passes.gradient_sums import sum_apart
from comet_compile.passes.graph_view import concrete, is_float, numel, same_size, val
from comet_compile.passes.products import Product, line_of, product_of, row_local_sources, uncast
from comet_compile.passes.region import ExpertPair
from comet_compile.passes.row_chains import upwards
from comet_compile.passes.samples import size_choices

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
_CAST = torch.ops.prims.convert_element_type.default

Unit = tuple[Product, ...]  # the in-projections and, last, the out-projection of one expert


class Loop:
    """The experts of one loop, and what was done to the graph so that it reads `stacks`.

    `why_not` says why stacks of these matrices cost more than they bring; "" if they do not.
    """

    def __init__(self, units: Sequence[Unit], backward: set[fx.Node]) -> None:
        self.units = tuple(units)
        self.stacks: set[fx.Node] = set()
        self.edits = Edits()
        self.why_not = _why_not(units)
        self._cast_rows_once()
        for products in zip(*units, strict=True):
            for parts in zip(*(product.tensors for product in products), strict=True):
                self._stack(parts)
        sum_apart(self._row_gradients(backward), backward, self.edits)

    def __contains__(self, pair: ExpertPair) -> bool:
        return not self.stacks.isdisjoint(pair.stacks)

    def _cast_rows_once(self) -> None:
        """Have products of the same rows, each cast for itself, read one cast."""
        casts: dict[Hashable, fx.Node] = {}
        for rows in (product.rows for unit in self.units for product in unit[:-1]):
            if uncast(rows) is rows:
                continue
            first = casts.setdefault((uncast(rows), val(rows).dtype), rows)
            if first is not rows:
                for user in list(rows.users):
                    self.edits.redirect(user, rows, first)

    def _stack(self, parts: Sequence[fx.Node]) -> None:
        """Have all users of `parts` read lines of one stack, and the output those of gradients."""
        stack = _table_of(parts)
        if stack is not None:
            self.stacks.add(stack)
            return
        gradients = _gradients_of(parts)
        users = [sorted(part.users) for part in parts]
        first = min(own[0] for own in users)
        sources = [uncast(part) for part in parts]
        stack = _table_of(sources)
        is_new = stack is None
        joined = stack = self._joined(sources, first) if stack is None else stack
        if val(stack).dtype != val(parts[0]).dtype:
            stack = self.edits.add(first, _CAST, stack, val(parts[0]).dtype)
        for node in (joined, stack) if is_new else ():
            # kept for the backward, all matrices would be there twice
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
        self.stacks.add(stack)
        for number, (part, own) in enumerate(zip(parts, users, strict=True)):
            line = self.edits.add(own[0], aten.select.int, stack, 0, number)
            for user in own:
                self.edits.redirect(user, part, line)
        if is_new and len(gradients) == len(parts):
            self._stack_gradients(gradients)

    def _stack_gradients(self, gradients: Sequence[tuple[fx.Node, fx.Node]]) -> None:
        output = gradients[0][0].graph.output_node()
        stack = self._joined([inner for inner, _ in gradients], output)
        for number, (_, outer) in enumerate(gradients):
            line = self.edits.add(output, aten.select.int, stack, 0, number)
            if val(line).dtype != val(outer).dtype:
                line = self.edits.add(output, _CAST, line, val(outer).dtype)
            self.edits.redirect(output, outer, line)

    def _joined(self, parts: Sequence[fx.Node], before: fx.Node) -> fx.Node:
        lines = [self.edits.add(before, aten.unsqueeze.default, part, 0) for part in parts]
        return lines[0] if len(lines) == 1 else self.edits.add(before, aten.cat.default, lines)

    def _row_gradients(self, backward: set[fx.Node]) -> list[fx.Node]:
        """The backward's products with the matrices of the in-projections."""
        found: list[fx.Node] = []
        flipped = [product.node.args[-1] for unit in self.units for product in unit[:-1]]
        while flipped:
            for user in flipped.pop().users:
                if user.target is aten.permute.default:
                    flipped.append(user)
                elif user in backward and user.target is aten.mm.default:
                    found.append(user)
        return found


def _why_not(units: Sequence[Unit]) -> str:
    first = units[0][0]
    if len(units) == 1 or line_of(uncast(first.matrix)) is not None:
        return ""  # a view, or a cast that was made anyway
    if len({_as_many(unit[0].rows) for unit in units}) > 1:
        return "each expert multiplies its own rows already"
    as_traced, *_ = size_choices([first.rows])
    rows = val(first.rows)
    num_tokens = concrete(numel(rows.shape[:-1]), as_traced)
    return "" if num_tokens >= tokens_that_pay(rows.device) else f"{num_tokens} tokens are few"


def _as_many(rows: fx.Node) -> fx.Node:
    """What `rows` were before they were masked, scaled or cast, none of them left out."""
    same = [n for n in upwards(rows) if is_float(n) and same_size(_numel(n), _numel(rows))]
    return same[-1]


def _numel(node: fx.Node) -> Any:
    return numel(val(node).shape)


def tokens_that_pay(device: torch.device) -> int:
    """From how many tokens on a copy of separate matrices into a stack is worth its time.

    An expert that multiplies T tokens does 2 T FLOPs for each number of its matrices, of which the
    sparse layer saves most; the copy moves 4 bytes for it. GPUs do 150 to 300 16-bit FLOPs in the
    time of a byte, so from some 500 tokens on it pays. Processors do few.
    """
    return 0 if device.type == "cpu" else 512


def arrange_loops(graph: fx.Graph, backward: set[fx.Node]) -> list[Loop]:
    """Arrange every loop over experts, where that changes anything."""
    products = {
        node: product
        for node in graph.nodes
        if node not in backward and (product := product_of(node)) is not None
    }
    units: dict[Hashable, list[Unit]] = {}
    for product in products.values():
        sources = row_local_sources(product.rows, products)
        if 1 <= len(sources) <= 2:
            unit = (*(products[node] for node in sources), product)
            units.setdefault(_sibling_key(unit), []).append(unit)
    siblings = [own for own in units.values() if len(own) > 1 or _came_from_ranks(own[0])]
    loops = [Loop(own, backward) for own in map(_in_order, siblings) if _are_distinct(own)]
    return [loop for loop in loops if loop.edits]


def _sibling_key(unit: Unit) -> Hashable:
    return (upwards(uncast(unit[0].rows))[-1], *(product.kind for product in unit))


def _in_order(units: Sequence[Unit]) -> Sequence[Unit]:
    """The experts in the order of their matrices in a stack, or of their products."""

    def number(unit: Unit) -> int:
        line = line_of(uncast(unit[0].matrix))
        return 0 if line is None else line[1]

    return sorted(units, key=number)


def _came_from_ranks(unit: Unit) -> bool:
    return any(n.target is c10d.all_to_all_single.default for n in upwards(unit[0].rows))


def _are_distinct(units: Sequence[Unit]) -> bool:
    tensors = [uncast(t) for unit in units for product in unit for t in product.tensors]
    return len(set(tensors)) == len(tensors)


def _table_of(parts: Sequence[fx.Node]) -> fx.Node | None:
    """The table whose lines `parts` are, all of them and in order."""
    lines = [line_of(part) for part in parts]
    if lines[0] is None:
        return None
    table = lines[0][0]
    all_lines = [(table, number) for number in range(int(val(table).shape[0]))]
    return table if lines == all_lines else None


def _gradients_of(parts: Sequence[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """The gradient of each of the graph's inputs, or casts of those, in its dtype, and the output
    that it becomes; fewer, where there is none.

    The outputs of a joint graph end with the gradients of its inputs but the incoming ones.
    """
    graph = parts[0].graph
    placeholders = graph.find_nodes(op="placeholder")
    inputs = [n for n in placeholders if not str(n.target).startswith("tangents")]
    outputs = list(graph.output_node().args[0])[-len(inputs) :]
    if len(inputs) == len(placeholders) or len(outputs) < len(inputs):
        return []
    gradients = dict(zip(inputs, outputs, strict=True))
    found = []
    for part in parts:
        outer = gradients.get(uncast(part))
        if outer is None or not is_float(outer):
            continue
        inner = outer if val(outer).dtype == val(part).dtype else uncast(outer)
        if val(inner).dtype == val(part).dtype and val(inner).shape == val(part).shape:
            found.append((inner, outer))
    return found
