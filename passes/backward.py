"""Find the gradients of a proven layer in the joint graph, and prove that they are its gradients.

Contract: reads the graph, changes nothing. Autograd wrote the backward, so its spelling is free;
gradients are recognised by their values: the part of the backward that depends on nothing but the
layer's inputs, its inner values and one incoming gradient is interpreted on the instances of the
forward proof, and every node whose value is the derivative of the op's own definition is that
gradient.

Steps
1. Core: backward nodes that read the region's inner values or the expert matrices.
2. Incoming gradient: the nearest [T, H] value above the core on which all of the core depends.
3. Interpret what follows from it, and match nodes against the oracle's gradients by value, on
   every instance.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from comet_compile.passes.graph_view import (
    ancestors,
    dependents,
    is_float,
    is_known_size,
    numel,
    positions,
    same_size,
    val,
)
from comet_compile.passes.instance import Instance, close
from comet_compile.passes.memo import Terms, region_key, roles_of
from comet_compile.passes.probe import Probe, Untracked, Value, make, restrict
from comet_compile.passes.prove import Layer
from comet_compile.passes.reasons import Rejection, RejectReason
from comet_compile.passes.row_chains import SHAPES
from comet_compile.passes.simulate import Failed, Ranked, leading_to, run

aten = torch.ops.aten

# in the order of the outputs of comet::moe_layer_backward
GRADIENT_NAMES = ("x", "weights", "w_in", "w_up", "w_out", "b_in", "b_up", "b_out")


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The incoming gradient and, by the op's argument name, the nodes that hold each gradient.

    `flipped` are matched nodes that hold the gradient of a stack with its matrices transposed.
    """

    grad_y: fx.Node
    nodes: dict[str, tuple[fx.Node, ...]]
    flipped: frozenset[fx.Node]


@dataclasses.dataclass
class Matches:
    """What was found before: by the expressions looked at, which of them is which gradient, and
    whether it is flipped."""

    terms: Terms = dataclasses.field(default_factory=Terms)
    found: dict[Hashable, dict[int, tuple[str, bool]]] = dataclasses.field(default_factory=dict)


def find_gradients(
    layer: Layer, graph: fx.Graph, backward: set[fx.Node], matches: Matches | None = None
) -> Gradients | Rejection | None:
    """The layer's gradients; None if the graph does not differentiate through the layer.

    `matches` keeps what was found, for the layers to come.
    """
    matches = matches or Matches()
    core = _core(layer, backward)
    if not core:
        return None
    order = positions(graph)
    tried = 0
    problem = "no [T, H] gradient leads to all of its backward"
    for grad_y in _incoming(layer, core, backward, order):
        pure = _pure_part(layer, grad_y, backward, order)
        if not core <= set(pure):
            continue
        tried += 1
        found = _match(layer, grad_y, pure, matches)
        if isinstance(found, Gradients):
            return found
        problem = found
        if tried == 6:
            break
    detail = f"{layer.candidate.y.name}: {problem}"
    return Rejection(RejectReason.BACKWARD_NOT_PROVEN, detail)


def _inner(layer: Layer) -> set[fx.Node]:
    """Float values between the region's inputs and its output."""
    candidate = layer.candidate
    return {n for n in candidate.nodes if is_float(n)} - {*candidate.inputs, candidate.y}


def _core(layer: Layer, backward: set[fx.Node]) -> set[fx.Node]:
    sources = _inner(layer) | set(layer.candidate.pair.stacks)
    sources |= _views(layer, sources, backward)
    return {user for node in sources for user in node.users if user in backward}


def _views(layer: Layer, nodes: set[fx.Node], backward: set[fx.Node]) -> set[fx.Node]:
    """What `nodes` are seen as by the backward, transposed for example: views outside of both."""
    inside = set(layer.candidate.nodes)
    found: set[fx.Node] = set()
    seen = list(nodes)
    while seen:
        for user in seen.pop().users:
            is_view = getattr(user.target, "overloadpacket", None) in SHAPES
            if is_view and user not in found | backward | inside:
                found.add(user)
                seen.append(user)
    return found


def _incoming(
    layer: Layer, core: set[fx.Node], backward: set[fx.Node], order: dict[fx.Node, int]
) -> Iterator[fx.Node]:
    """[.., H] gradients of T rows above the core, the output's own dtype first, nearest first."""
    y = val(layer.candidate.y)
    above = ancestors(core, stop=lambda n: n not in backward) & backward
    fitting = [
        n
        for n in above
        if is_float(n)
        and val(n).ndim >= 2
        and same_size(val(n).shape[-1], y.shape[-1])
        and same_size(numel(val(n).shape), numel(y.shape))
    ]
    yield from sorted(fitting, key=lambda n: (val(n).dtype != y.dtype, val(n).ndim != 2, -order[n]))


def _pure_part(
    layer: Layer, grad_y: fx.Node, backward: set[fx.Node], order: dict[fx.Node, int]
) -> list[fx.Node]:
    """Backward nodes that depend on `grad_y`, the region and constants alone, in graph order."""
    candidate = layer.candidate
    known = {*candidate.nodes}
    constants = _Constants(known)
    pure: set[fx.Node] = {grad_y}
    # in graph order, and no further than is pure: the whole backward of a deep model lies below
    heap, seen = [(order[grad_y], grad_y)], {grad_y}
    while heap:
        _, node = heapq.heappop(heap)
        if node is not grad_y:
            if not all(s in pure or constants.have(s) for s in node.all_input_nodes):
                continue
            pure.add(node)
        for user in node.users:
            if user.op == "call_function" and user in backward and user not in seen:
                seen.add(user)
                heapq.heappush(heap, (order[user], user))
    inner = known - set(candidate.inputs)
    inner |= _views(layer, inner, backward)
    if candidate.pair.dense:
        # a product over all rows of an expert takes inner values flipped, not as they are
        rows = dependents([candidate.x], candidate.nodes) - {candidate.y}
        inner |= _made_of(rows, backward, constants)
    pure = _about(pure, grad_y, inner, order)
    # what the incoming gradient itself is computed from is no part of the layer
    sources = {s for n in pure - {grad_y} for s in n.all_input_nodes}
    helpers = sources - pure - known
    return sorted(pure | _with_sources(helpers, known), key=order.__getitem__)


def _made_of(rows: set[fx.Node], backward: set[fx.Node], constants: _Constants) -> set[fx.Node]:
    """What the backward makes of the forward's `rows` before they meet a gradient."""
    found: set[fx.Node] = set()
    stack = list(rows)
    while stack:
        users = set(stack.pop().users) - backward - found - rows
        new = {u for u in users if u.op == "call_function" and constants.have(u)}
        found |= new
        stack.extend(new)
    return found


def _about(
    pure: set[fx.Node], grad_y: fx.Node, inner: set[fx.Node], order: dict[fx.Node, int]
) -> set[fx.Node]:
    """Those of `pure` that use the region's inner values, what they need, what follows from them.

    The rest (the residual stream's own gradient, say) differs from layer to layer.
    """
    touched: set[fx.Node] = set()
    for node in sorted(pure - {grad_y}, key=order.__getitem__):
        if any(s in inner or s in touched for s in node.all_input_nodes):
            touched.add(node)
    return (ancestors(touched, stop=lambda n: n not in pure) & pure) | {grad_y}


class _Constants:
    """Values outside the backward: made from nothing, from sizes, or from `known` nodes (a flipped
    stack). Every node is looked at once."""

    def __init__(self, known: set[fx.Node]) -> None:
        self._known = known
        self._verdicts: dict[fx.Node, bool] = {}

    def have(self, node: fx.Node) -> bool:
        """Whether `node` is one of them."""
        verdicts, stack = self._verdicts, [node]
        while stack:  # the way to a graph's inputs may be longer than Python recurses
            current = stack[-1]
            if current in verdicts:
                stack.pop()
            elif current in self._known or is_known_size(current):
                verdicts[current] = True
            elif current.op != "call_function":
                verdicts[current] = False
            else:
                sources = current.all_input_nodes
                may_be = all(verdicts.get(s, True) for s in sources)
                unknown = next((s for s in sources if s not in verdicts), None)
                if may_be and unknown is not None:
                    stack.append(unknown)
                else:
                    verdicts[current] = may_be
        return verdicts[node]


def _with_sources(nodes: set[fx.Node], known: set[fx.Node]) -> set[fx.Node]:
    return ancestors(nodes, stop=lambda n: n in known or is_known_size(n)) - known


# -- values -----------------------------------------------------------------------------------


def _match(
    layer: Layer, grad_y: fx.Node, pure: Sequence[fx.Node], matches: Matches
) -> Gradients | str:
    """Nodes of `pure` by the gradient they hold on every instance, or what is missing."""
    candidate, tables = layer.candidate, layer.roles
    roles = {**roles_of(candidate), grad_y: "grad_y"}
    numbers = matches.terms.numbered([*candidate.nodes, *pure], roles)
    key = (
        region_key(candidate, numbers),
        str(layer.activation),
        layer.weight_place,
        tuple(roles.get(table) for table in (tables.b_in, tables.b_up, tables.b_out)),
        frozenset(numbers[node] for node in pure),
    )
    if key not in matches.found:
        held = _evaluated(layer, grad_y, pure)
        matches.found[key] = {numbers[node]: role for node, role in held.items()}
    found = matches.found[key]
    if not found:
        return "no gradient follows from what comes in"
    nodes: dict[str, tuple[fx.Node, ...]] = {}
    flipped: set[fx.Node] = set()
    for node in pure:
        if numbers[node] in found:
            name, flip = found[numbers[node]]
            nodes[name] = (*nodes.get(name, ()), node)
            flipped |= {node} if flip else set()
    return Gradients(grad_y, nodes, frozenset(flipped))


def _evaluated(
    layer: Layer, grad_y: fx.Node, pure: Sequence[fx.Node]
) -> dict[fx.Node, tuple[str, bool]]:
    """(gradient name, transposed) of each node of `pure` that holds one on every instance."""
    held: dict[fx.Node, tuple[str, bool]] | None = None
    for instance in layer.instances():
        held = _held(layer, instance, grad_y, pure, held)
        if not held:
            break
    return held or {}


def _held(
    layer: Layer,
    instance: Instance,
    grad_y: fx.Node,
    pure: Sequence[fx.Node],
    suspects: dict[fx.Node, tuple[str, bool]] | None,
) -> dict[fx.Node, tuple[str, bool]]:
    """(gradient name, transposed) of each node of `pure` that holds one on this instance."""
    candidate = layer.candidate
    bound = {**instance.bindings(), grad_y: instance.rows(grad_y, instance.grad_y)}
    expected = _oracle_gradients(layer, instance)
    columns = _columns(layer, instance)
    looked_at = set(pure) - {grad_y}
    held: dict[fx.Node, tuple[str, bool]] = {}

    def observe(node: fx.Node, values: Ranked | Failed) -> None:
        if node not in looked_at or isinstance(values, Failed) or not is_float(node):
            return
        if not _can_take(node) or (suspects is not None and node not in suspects):
            return
        names = expected if suspects is None else (suspects[node][0],)
        for name in names:
            flip = _holds(values, expected[name], columns[name])
            if flip is not None:
                held[node] = (name, flip)
                return

    nodes: Sequence[fx.Node] = [*candidate.nodes, *pure]
    if suspects is not None:
        nodes = leading_to(suspects, nodes, bound)
    run(nodes, bound, layer.form.world, instance.sample.symbols, observe=observe)
    return held


def _can_take(node: fx.Node) -> bool:
    """Whether the rewrite can give a gradient this node's shape: at most one symbolic size, or
    a view that has its sizes at hand."""
    symbolic = [size for size in val(node).shape if not isinstance(size, int)]
    return len(symbolic) <= 1 or node.target is aten.view.default


def _oracle_gradients(layer: Layer, instance: Instance) -> dict[str, list[Tensor]]:
    """Gradients of sum <grad_y, y> per rank, in the instance's own (fused) layout."""
    with torch.enable_grad():
        leaves = instance.leaves(requires_grad=True)
        y = instance.expected(layer.activation, layer.weight_place, leaves, reduce=False)
        loss = torch.stack([(a * g).sum() for a, g in zip(y, instance.grad_y, strict=True)]).sum()
        names = [name for name, values in leaves.items() if values is not None]
        flat = [v for name in names for v in leaves[name] or ()]
        grads = list(torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True))
    size = layer.form.world.size
    found = {name: grads[i * size : (i + 1) * size] for i, name in enumerate(names)}
    if layer.candidate.scores is not None:
        # what follows from it in the graph may read any entry: all must be what the op implies
        found["weights"] = [
            instance.spread(g, ids)
            for g, ids in zip(found["weights"], instance.sample.ids, strict=True)
        ]
    return found


# per gradient: the tracked columns and real size of each of its last dimensions
Columns = tuple[tuple[tuple[int, ...], int], ...]


def _columns(layer: Layer, instance: Instance) -> dict[str, Columns]:
    pair = layer.candidate.pair
    hidden = (instance.h_cols, pair.ins[0].in_features)
    inner = (instance.i_cols, pair.out.in_features)
    wide = (instance.n_cols, pair.ins[0].out_features)
    return {
        "x": (hidden,),
        "weights": (),
        "w_in": (hidden, wide),
        "w_up": (hidden, wide),
        "w_out": (inner, hidden),
        "b_in": (wide,),
        "b_up": (wide,),
        "b_out": (hidden,),
    }


def _holds(values: Sequence[Any], grads: Sequence[Tensor], columns: Columns) -> bool | None:
    """Whether `values` are `grads` (False) or their transposed matrices (True); None if neither."""
    for flip in (False, True) if len(columns) == 2 else (False,):
        wanted = columns[::-1] if flip else columns
        for value, grad in zip(values, grads, strict=True):
            expected = grad.transpose(-2, -1) if flip else grad
            actual = _on_columns(value, wanted)
            if actual is None or actual.numel() != expected.numel():
                break
            if not close(actual.reshape(expected.shape), expected):
                break
        else:
            return flip
    return None


def _on_columns(value: Value, columns: Columns) -> Tensor | None:
    """The data of `value` on exactly `columns` of its last dimensions; None if they do not fit."""
    if not isinstance(value, (Probe, torch.Tensor)) or value.ndim < len(columns):
        return None
    if not columns:
        return None if isinstance(value, Probe) else value
    if not isinstance(value, Probe):
        return None
    lead = value.ndim - len(columns)
    if any(value.supports[:lead]):
        return None
    current: Value = value
    for offset, (cols, size) in enumerate(columns):
        dim = lead + offset
        if not isinstance(current, Probe) or current.supports[dim] is None:
            return None
        try:
            data = restrict(current, dim, cols, size)
        except Untracked:
            return None
        rest = (*current.supports[:dim], None, *current.supports[dim + 1 :])
        current = make(data, rest)
    return current.data if isinstance(current, Probe) else current
