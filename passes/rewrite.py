"""Replace a proven layer and its proven gradients by `comet::moe_layer` and its backward.

Contract: changes the graph only after it has checked that the whole region becomes dead; then the
region is replaced entirely, forward and backward together. New nodes carry `val`, the stack trace
and the recomputation tags of what they replace. Collectives that the region does not own keep
their order.

Steps
1. Check: with the output and the gradients cut, nothing else may need the region's heavy values.
2. Emit the forward op, and the backward op where the graph differentiates through the layer.
3. Once per graph: chain the tokens and erase what is dead, including collectives, waits and size
   checks that only regions used. Ops of one group take each other's tokens, so no scheduler can
   reorder them on one rank alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from comet_compile.passes.backward import GRADIENT_NAMES, Gradients
from comet_compile.passes.emit import Emitter, getter, getters, refresh_values, same_shape
from comet_compile.passes.graph_view import (
    ancestors,
    descendants,
    describe,
    expression,
    is_collective,
    is_float,
    same_size,
    val,
)
from comet_compile.passes.prove import Layer
from comet_compile.passes.reasons import Rejection, RejectReason

aten = torch.ops.aten
prims = torch.ops.prims
c10d = torch.ops._c10d_functional

# the place of the token among the arguments of comet::moe_layer and of its backward
_TOKEN_OF_FORWARD, _TOKEN_OF_BACKWARD = 9, 11


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """The ops that took the region's place; `backward` is None in an inference graph.

    `region` are the nodes that only served the region: they are erased by `finish`.
    """

    forward: fx.Node
    backward: fx.Node | None
    region: frozenset[fx.Node]

    def mark_syncing(self) -> None:
        """Take the twins of the ops that Inductor must not capture in a CUDA graph."""
        self.forward.target = torch.ops.comet.moe_layer_syncing.default
        if self.backward is not None:
            self.backward.target = torch.ops.comet.moe_layer_backward_syncing.default


def effects(graph: fx.Graph) -> list[fx.Node]:
    """The graph's output and its impure nodes: rewriting adds none."""
    return [
        n for n in graph.nodes if n.op == "output" or (n.op == "call_function" and n.is_impure())
    ]


def blocked(
    layer: Layer,
    gradients: Gradients | None,
    backward: set[fx.Node],
    impure: Sequence[fx.Node],
) -> Rejection | None:
    """Why the region cannot die: a user of its inner values that is not replaced.

    `impure` are the graph's `effects`.
    """
    candidate = layer.candidate
    inside = set(candidate.nodes) - set(candidate.inputs)
    gemms = set(candidate.pair.products)
    heavy = (gemms | descendants(gemms)) & inside
    heavy |= {n for n in inside if is_collective(n) and is_float(n)}
    heavy -= {candidate.y}
    held = {n for nodes in gradients.nodes.values() for n in nodes} if gradients else set()
    cut = {candidate.y, *held}
    owned = inside | _backward_region(gradients)
    live = ancestors(_roots(impure, owned), stop=lambda n: n in cut) - cut
    needed = sorted(heavy & live, key=lambda n: n.name)
    if not needed:
        return None
    users = [(n, u) for n in needed for u in n.users if u not in inside and (u in live)]
    value, user = users[0] if users else (needed[0], needed[0])
    if user in backward:
        detail = f"{describe(value)} is needed by {describe(user)} beside the layer's gradients"
        return Rejection(RejectReason.BACKWARD_NOT_PROVEN, detail)
    detail = f"{describe(value)} is also used by {describe(user)}"
    return Rejection(RejectReason.VALUE_USED_ELSEWHERE, detail)


def _roots(impure: Sequence[fx.Node], region: set[fx.Node]) -> list[fx.Node]:
    """Nodes that stay whatever happens: the output and effects that the region does not own."""
    return [n for n in impure if n.op == "output" or not _is_owned_effect(n, region)]


def _is_owned_effect(node: fx.Node, region: set[fx.Node]) -> bool:
    """Collectives, waits and size checks that exist for the region's sake only."""
    if node.target is aten._assert_scalar.default:
        return True
    if node in region:
        return True
    return node.target is c10d.wait_tensor.default and node.args[0] in region


def replace(
    layer: Layer,
    gradients: Gradients | None,
    arguments: list[Any],
    save: str,
    graph: fx.Graph,
    *,
    free_saved: bool = False,
) -> Rewritten:
    """Rewrite one region to an op of `emit_arguments`; `blocked` must have found nothing.

    `save` and `free_saved` are options of the ops: of what the forward saves, the backward is the
    only user. `finish` must follow.
    """
    region = set(layer.candidate.nodes) - set(layer.candidate.inputs)
    region |= descendants(region) & _waits(graph)
    forward = _emit_forward(layer, arguments, save)
    _keep_what_a_policy_keeps(forward, layer)
    y, saved = getters(forward, 2)
    backward = None
    if gradients is not None:
        backward = _emit_backward(layer, gradients, arguments, saved, free_saved)
    _substitute_output(layer, y)
    return Rewritten(forward, backward, frozenset(region | _backward_region(gradients)))


def finish(graph: fx.Graph, rewritten: Iterable[Rewritten]) -> None:
    """Chain the ops of each group by their tokens, in graph order, and erase dead regions."""
    last: dict[tuple[Any, str], fx.Node] = {}
    region: set[fx.Node] = set()
    ops: dict[fx.Node, int] = {}
    for one in rewritten:
        region |= one.region
        ops[one.forward] = _TOKEN_OF_FORWARD
        if one.backward is not None:
            ops[one.backward] = _TOKEN_OF_BACKWARD
    for node in list(graph.nodes):
        group = node.kwargs.get("group_name") if node in ops else None
        if not group:
            continue
        # forward and backward apart: a forward token must not be kept for the backward
        key = (node.target, group)
        if key in last:
            previous = last[key]
            token = getter(previous, len(val(previous)) - 1, previous)
            # recomputing one layer must not recompute the layers in front of it
            token.meta.pop("recompute", None)
            node.update_arg(ops[node], token)
        last[key] = node
    erase_dead(graph, region)


def _waits(graph: fx.Graph) -> set[fx.Node]:
    return set(graph.find_nodes(op="call_function", target=c10d.wait_tensor.default))


def _backward_region(gradients: Gradients | None) -> set[fx.Node]:
    """Everything between the incoming gradient and the gradients: its collectives die with it."""
    if gradients is None:
        return set()
    held = [n for nodes in gradients.nodes.values() for n in nodes]
    return ancestors(held, stop=lambda n: n is gradients.grad_y) & descendants([gradients.grad_y])


# -- forward ----------------------------------------------------------------------------------


def _emit_forward(layer: Layer, arguments: list[Any], save: str) -> fx.Node:
    y = layer.candidate.y
    return Emitter(y.graph, y, y).call(
        torch.ops.comet.moe_layer.default,
        *arguments,
        None,
        **_options(layer),
        out_dtype=layer.out_dtype,
        save=save,
    )


def _keep_what_a_policy_keeps(forward: fx.Node, layer: Layer) -> None:
    """Keep the op's results where a checkpoint's policy keeps a product or exchange of the region.

    The output, whose tags the op has by now, is cheap to sum again from those; the op is not.
    """
    gemms = set(layer.candidate.pair.products)
    tags = {
        node.meta.get("recompute")
        for node in layer.candidate.nodes
        if node in gemms or (is_collective(node) and is_float(node))
    }
    for tag in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE):
        if tag in tags:
            forward.meta["recompute"] = tag
            return


def _options(layer: Layer) -> dict[str, Any]:
    return {
        "activation": str(layer.activation),
        "weight_place": layer.weight_place,
        "product_dtype": layer.product_dtype,
        "form": layer.form.name,
        "group_name": layer.form.world.group_name,
    }


def _substitute_output(layer: Layer, new: fx.Node) -> None:
    y = layer.candidate.y
    if val(y).ndim != 2:
        emit = Emitter(y.graph, y, y)
        x_dims = len(val(layer.candidate.x).shape)
        lead = [
            size if isinstance(size, int) else emit.call(aten.sym_size.int, layer.candidate.x, dim)
            for dim, size in enumerate(val(y).shape[:-1])
        ]
        assert x_dims == val(y).ndim or all(isinstance(size, int) for size in lead)
        new = emit.view(new, [*lead, val(y).shape[-1]])
    old_shape, new_shape = val(y).shape, val(new).shape
    y.replace_all_uses_with(new)
    if not same_shape(old_shape, new_shape):
        refresh_values(new)
        _retire_sizes(y.graph, old_shape, new_shape)


def _retire_sizes(graph: fx.Graph, old_shape: Sequence[Any], new_shape: Sequence[Any]) -> None:
    """Give incoming gradients the output's new sizes.

    On torch 2.11 the tangent of an output whose rows were counted on the host is traced with that
    count, which nothing in the rewritten graph computes any more.
    """
    sizes = {
        str(expression(a)): b for a, b in zip(old_shape, new_shape, strict=True) if str(a) != str(b)
    }
    for node in graph.find_nodes(op="placeholder"):
        old = val(node)
        if not isinstance(old, torch.Tensor):
            continue
        shape = [sizes.get(str(expression(size)), size) for size in old.shape]
        if not same_shape(shape, old.shape) and old.is_contiguous():
            with old.fake_mode:  # type: ignore[attr-defined]
                node.meta["val"] = old.new_empty(shape)
            refresh_values(node)


# -- backward ---------------------------------------------------------------------------------


def _emit_backward(
    layer: Layer, gradients: Gradients, arguments: list[Any], saved: fx.Node, free_saved: bool
) -> fx.Node:
    graph = layer.candidate.y.graph
    held = {n for nodes in gradients.nodes.values() for n in nodes}
    first = next(n for n in graph.nodes if n in held)
    emit = Emitter(graph, first, first)
    grad_y = gradients.grad_y
    if val(grad_y).ndim != 2:
        grad_y = emit.view(grad_y, [-1, val(grad_y).shape[-1]])
    node = emit.call(
        torch.ops.comet.moe_layer_backward.default,
        grad_y,
        *arguments,
        saved,
        None,
        **_options(layer),
        needs=[name in gradients.nodes for name in GRADIENT_NAMES],
        free_saved=free_saved,
    )
    # the op belongs to the backward even where the first gradient's own tag is missing
    node.meta["partitioner_tag"] = "is_backward"
    node.meta.pop("recompute", None)
    outputs = getters(node, len(GRADIENT_NAMES))
    for name, nodes in gradients.nodes.items():
        gradient = outputs[GRADIENT_NAMES.index(name)]
        if name == "weights" and layer.candidate.scores is not None:
            behind = Emitter(graph, outputs[-1].next, first)
            gradient = _spread(behind, gradient, arguments[1], layer)
        for old in nodes:
            _substitute_gradient(old, gradient, gradients.flipped)
    return node


def _spread(emit: Emitter, gradient: fx.Node, ids: fx.Node, layer: Layer) -> fx.Node:
    """The gradient of the scores [T, E] that holds the slots' [T, A]."""
    num_tokens = val(gradient).shape[0]
    if not isinstance(num_tokens, int):
        num_tokens = emit.call(aten.sym_size.int, gradient, 0)
    zeros = emit.call(
        aten.full.default, [num_tokens, layer.candidate.pair.out.num_experts], 0,
        dtype=val(gradient).dtype, device=val(gradient).device,
    )  # fmt: skip
    return emit.call(aten.scatter.src, zeros, 1, ids, gradient)


def _substitute_gradient(old: fx.Node, gradient: fx.Node, flipped: frozenset[fx.Node]) -> None:
    emit = Emitter(old.graph, old, old)
    new = gradient
    if old in flipped:
        new = emit.call(aten.permute.default, new, [0, 2, 1])
    if len(val(new).shape) != len(val(old).shape) or not all(
        same_size(a, b) for a, b in zip(val(new).shape, val(old).shape, strict=True)
    ):
        new = emit.view(new, _target_shape(old))
    if val(new).dtype != val(old).dtype:
        new = emit.call(prims.convert_element_type.default, new, val(old).dtype)
    if val(old).is_contiguous() and not val(new).is_contiguous():
        new = emit.call(aten.clone.default, new, memory_format=torch.contiguous_format)
    old.replace_all_uses_with(new)


def _target_shape(node: fx.Node) -> list[Any]:
    """The node's shape with sizes as graph values."""
    if node.target is aten.view.default:
        return list(node.args[1])
    shape = list(val(node).shape)
    unknown = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    if len(unknown) > 1:
        raise AssertionError(f"{node.name}: more than one symbolic size")
    for i in unknown:
        shape[i] = -1
    return shape


# -- clean-up ---------------------------------------------------------------------------------


def erase_dead(graph: fx.Graph, region: set[fx.Node]) -> None:
    """Erase what nothing needs, including effects that belong to the region."""
    live = ancestors(_roots(effects(graph), region))
    # a size check stays as long as the sizes that it checks are read
    for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        if ancestors([node]) & region <= live:
            live |= ancestors([node])

    def is_impure(node: fx.Node) -> bool:
        if node in live or node.op in ("placeholder", "output"):
            return True
        return node.is_impure() and not _is_owned_effect(node, region)

    graph.eliminate_dead_code(is_impure)
