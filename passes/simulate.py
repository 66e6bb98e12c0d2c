"""Run a piece of the joint graph for every rank of a group, in one process.

Contract: reads graph nodes, never changes them. Node by node, each of the P simulated ranks
applies the operation to its own values; collectives exchange between the P value lists. A node
that cannot be run becomes a :class:`Failed` that names it, and so does everything computed from
it: whoever asks for a result that depends on it learns the first cause.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from comet_compile.passes import probe_ops, probe_products, probe_shapes
from comet_compile.passes.graph_view import ancestors, is_known_size
from comet_compile.passes.probe import Probe, Support, Supports, Untracked, Value, make
from comet_compile.passes.reasons import RejectReason

c10d = torch.ops._c10d_functional

# loaded for the handlers that they register
_HANDLER_MODULES = (probe_shapes, probe_products)


@dataclasses.dataclass(frozen=True)
class Failed:
    """Why a node has no value: the first node that could not run, and what it said."""

    node: fx.Node
    reason: RejectReason
    detail: str


Ranked = list[Any]  # one value per simulated rank
Environment = dict[fx.Node, Ranked | Failed]


@dataclasses.dataclass(frozen=True)
class World:
    """The simulated group: its name in the graph ("" for none) and its size."""

    group_name: str
    size: int


def run(
    nodes: Sequence[fx.Node],
    bindings: Mapping[fx.Node, Ranked],
    world: World,
    symbols: Mapping[Any, int],
    *,
    observe: Callable[[fx.Node, Ranked | Failed], None],
) -> None:
    """Compute `nodes` (in graph order) given `bindings` for the region's inputs.

    `symbols` maps backed size symbols to the sizes of this sample. `observe` sees every value once;
    a value is dropped after its last use, since a region of many rows has many values.
    """
    env: Environment = {}
    last_use = {source: node for node in nodes for source in node.all_input_nodes}
    for node in nodes:
        env[node] = bindings[node] if node in bindings else _step(node, env, world, symbols)
        observe(node, env[node])
        for source in {*node.all_input_nodes, node}:
            if last_use.get(source, source) is node:
                env.pop(source, None)


def leading_to(
    wanted: Iterable[fx.Node], nodes: Sequence[fx.Node], bindings: Mapping[fx.Node, Ranked]
) -> list[fx.Node]:
    """Those of `nodes` that `wanted` follow from, given `bindings`."""
    needed = ancestors(wanted, stop=bindings.__contains__)
    return [node for node in nodes if node in needed]


def values_of(
    wanted: fx.Node,
    nodes: Sequence[fx.Node],
    bindings: Mapping[fx.Node, Ranked],
    world: World,
    symbols: Mapping[Any, int],
) -> Ranked | Failed:
    """The value of one of `nodes` on every rank; see `run`."""
    found: list[Ranked | Failed] = []

    def observe(node: fx.Node, value: Ranked | Failed) -> None:
        if node is wanted:
            found.append(value)

    run(leading_to([wanted], nodes, bindings), bindings, world, symbols, observe=observe)
    return found[0]


def _step(
    node: fx.Node, env: Environment, world: World, symbols: Mapping[Any, int]
) -> Ranked | Failed:
    if node.op == "placeholder" or is_known_size(node):
        return _input_size(node, world, symbols)
    if node.op != "call_function":
        return Failed(node, RejectReason.UNSUPPORTED_OP, f"{node.name} is a {node.op}")
    for source in node.all_input_nodes:
        value = env.get(source)
        if isinstance(value, Failed):
            return value
        if value is None:
            return Failed(node, RejectReason.UNSUPPORTED_OP, f"{source.name} is outside the region")
    if getattr(node.target, "namespace", "") == "_c10d_functional":
        return _collective(node, env, world)
    outputs: Ranked = []
    for rank in range(world.size):

        def pick(n: fx.Node, rank: int = rank) -> Any:
            values = env[n]
            assert not isinstance(values, Failed)
            return values[rank]

        args, kwargs = map_arg(node.args, pick), map_arg(node.kwargs, pick)
        try:
            outputs.append(probe_ops.apply(node.target, args, kwargs))
        except Untracked as why:
            return Failed(node, RejectReason.UNSUPPORTED_OP, f"{node.name} {why}")
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
            first = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
            return Failed(node, RejectReason.NOT_EQUIVALENT, f"{node.name} fails: {first}")
    return outputs


def _input_size(node: fx.Node, world: World, symbols: Mapping[Any, int]) -> Ranked | Failed:
    """A size that the sample fixes; a tensor input must be bound."""
    val = node.meta.get("val")
    if isinstance(val, torch.SymInt):
        expr = val.node.expr.subs(symbols)
        if expr.is_number:
            return [int(expr)] * world.size
        return Failed(node, RejectReason.DYNAMIC_SPLITS, f"{node.name} is known at run time only")
    if isinstance(val, int):
        return [val] * world.size
    return Failed(node, RejectReason.UNSUPPORTED_OP, f"{node.name} is an input of the graph")


# -- collectives ------------------------------------------------------------------------------


def _collective(node: fx.Node, env: Environment, world: World) -> Ranked | Failed:
    handler = _COLLECTIVES.get(getattr(node.target, "overloadpacket", None))
    if handler is None:
        return Failed(node, RejectReason.UNSUPPORTED_OP, f"collective {node.target}")
    ranked_args: list[Any] = []
    for rank in range(world.size):

        def pick(n: fx.Node, rank: int = rank) -> Any:
            values = env[n]
            assert not isinstance(values, Failed)
            return values[rank]

        ranked_args.append(map_arg(node.args, pick))
    if node.target is not c10d.wait_tensor.default:
        group = ranked_args[0][-1]
        if group != world.group_name:
            detail = f"{node.name} runs on group {group!r}, the region on {world.group_name!r}"
            return Failed(node, RejectReason.MIXED_GROUPS, detail)
    try:
        return handler(ranked_args)
    except Untracked as why:
        return Failed(node, RejectReason.UNSUPPORTED_OP, f"{node.name} {why}")
    except ValueError as error:
        return Failed(node, RejectReason.NOT_EQUIVALENT, f"{node.name}: {error}")


def _data(value: Value) -> torch.Tensor:
    return value.data if isinstance(value, Probe) else value


def _merged_supports(values: Sequence[Value]) -> Supports:
    """The supports that all ranks share; a column is zero outside if it is so on every rank."""
    ranked = [v.supports if isinstance(v, Probe) else (None,) * v.ndim for v in values]
    merged: list[Support | None] = []
    for supports in zip(*ranked, strict=True):
        tracked = {(s.size, s.cols) if s else None for s in supports}
        if len(tracked) > 1:
            raise Untracked("exchanges different columns between ranks")
        first = supports[0]
        zero = all(s.zero for s in supports if s)
        merged.append(dataclasses.replace(first, zero=zero) if first else None)
    return tuple(merged)


def _all_to_all_single(ranked_args: list[Any]) -> Ranked:
    inputs = [args[0] for args in ranked_args]
    out_splits = [list(args[1]) for args in ranked_args]
    in_splits = [list(args[2]) for args in ranked_args]
    size = len(inputs)
    supports = _merged_supports(inputs)
    if supports[0]:
        raise Untracked("exchanges columns")
    for rank in range(size):
        if len(in_splits[rank]) != size or len(out_splits[rank]) != size:
            raise ValueError(f"{len(in_splits[rank])} splits in a group of {size}")
        if sum(in_splits[rank]) != _data(inputs[rank]).shape[0]:
            raise ValueError(f"sends {sum(in_splits[rank])} of {_data(inputs[rank]).shape[0]} rows")
        for peer in range(size):
            if in_splits[peer][rank] != out_splits[rank][peer]:
                raise ValueError(
                    f"rank {peer} sends {in_splits[peer][rank]} rows to rank {rank}, "
                    f"which expects {out_splits[rank][peer]}"
                )
    pieces = [_data(v).split(in_splits[rank]) for rank, v in enumerate(inputs)]
    return [
        make(torch.cat([pieces[peer][rank] for peer in range(size)]), supports)
        for rank in range(size)
    ]


def _all_reduce(ranked_args: list[Any]) -> Ranked:
    inputs = [args[0] for args in ranked_args]
    if ranked_args[0][1] != "sum":
        raise Untracked(f"all-reduce by {ranked_args[0][1]}")
    supports = _merged_supports(inputs)
    total = torch.stack([_data(v) for v in inputs]).sum(0)
    return [make(total, supports) for _ in inputs]


def _all_gather_into_tensor(ranked_args: list[Any]) -> Ranked:
    inputs = [args[0] for args in ranked_args]
    supports = _merged_supports(inputs)
    if ranked_args[0][1] != len(inputs):
        raise ValueError(f"gathers from {ranked_args[0][1]} of {len(inputs)} ranks")
    gathered = torch.cat([_data(v) for v in inputs])
    return [make(gathered, supports) for _ in inputs]


def _reduce_scatter_tensor(ranked_args: list[Any]) -> Ranked:
    inputs = [args[0] for args in ranked_args]
    if ranked_args[0][1] != "sum":
        raise Untracked(f"reduce-scatter by {ranked_args[0][1]}")
    if ranked_args[0][2] != len(inputs):
        raise ValueError(f"scatters to {ranked_args[0][2]} of {len(inputs)} ranks")
    supports = _merged_supports(inputs)
    total = torch.stack([_data(v) for v in inputs]).sum(0)
    return [make(part, supports) for part in total.chunk(len(inputs))]


def _wait_tensor(ranked_args: list[Any]) -> Ranked:
    return [args[0] for args in ranked_args]


_COLLECTIVES: dict[Any, Callable[[list[Any]], Ranked]] = {
    c10d.all_to_all_single: _all_to_all_single,
    c10d.all_reduce: _all_reduce,
    c10d.all_gather_into_tensor: _all_gather_into_tensor,
    c10d.reduce_scatter_tensor: _reduce_scatter_tensor,
    c10d.wait_tensor: _wait_tensor,
}
