"""Run a captured graph on real numbers, for every rank of a group, in one process.

The independent judge of the pass: plain ATen kernels on dense random inputs, node by node, with
the ranks' values side by side, so that a collective is an exchange between lists. Everything is
in float64, whatever dtypes the graph names: results that differ, differ in meaning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from comet_compile.kernels.refs import moe_layer_backward_ref, moe_layer_ref

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

Ranked = list[Any]  # one value per rank


def random_inputs(
    graph: fx.Graph, world_size: int, seed: int, num_tokens: int
) -> dict[str, Ranked]:
    """Draw a value per rank for every placeholder; all of them differ between ranks.

    `num_tokens` is the size that stands for one known at run time only (in an output gradient).
    """
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Ranked] = {}
    for node in graph.find_nodes(op="placeholder"):
        fake = node.meta["val"]
        assert fake.is_floating_point(), f"{node.name} is {fake.dtype}"
        # wide enough for pre-activations on both sides of a clamp at 7
        scale = 1.0 if fake.ndim < 3 else 0.8
        shape = [size if isinstance(size, int) else num_tokens for size in fake.shape]
        draws = [
            torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            for _ in range(world_size)
        ]
        values[node.name] = draws
    return values


def execute(graph: fx.Graph, inputs: dict[str, Ranked], world_size: int) -> list[list[Any]]:
    """Return the outputs of every rank."""
    env: dict[fx.Node, Ranked] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = inputs[node.name]
        elif node.op == "output":
            break
        else:
            assert node.op == "call_function", node.format_node()
            env[node] = _step(node, env, world_size)
    outputs = [_arguments(node, env, rank)[0] for rank in range(world_size)]
    return [pytree.tree_leaves(out[0]) for out in outputs]


def differences(actual: list[list[Any]], expected: list[list[Any]]) -> str:
    """Return the first output that differs, or an empty string.

    Numbers that are NaN in `expected` come from memory that nobody wrote, and may be anything.
    """
    for rank, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        for place, (a, e) in enumerate(zip(ours, theirs, strict=False)):
            if (a is None) != (e is None):
                return f"rank {rank}, output {place} is None on one side"
            if not isinstance(e, Tensor) or e.numel() == 0:
                continue
            if a.shape != e.shape:
                return f"rank {rank}, output {place}: {list(a.shape)}, {list(e.shape)} expected"
            a, e = a.double(), e.double()
            known = ~e.isnan()
            bound = 1e-9 * max(1.0, float(e[known].abs().max())) if bool(known.any()) else 0.0
            if bool(((a - e)[known].abs().nan_to_num(nan=math.inf) > bound).any()):
                return f"rank {rank}, output {place}"
    return ""


def _arguments(node: fx.Node, env: dict[fx.Node, Ranked], rank: int) -> tuple[Any, Any]:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n][rank])
    return args, kwargs


def _step(node: fx.Node, env: dict[fx.Node, Ranked], world_size: int) -> Ranked:
    calls = [_arguments(node, env, rank) for rank in range(world_size)]
    exchange = _EXCHANGES.get(node.target)
    if exchange is not None:
        return exchange(calls)
    return [_call(node.target, args, kwargs) for args, kwargs in calls]


def _call(target: Any, args: Any, kwargs: Any) -> Any:
    if target in (aten._assert_scalar.default, aten._assert_tensor_metadata.default):
        return None
    if target is aten._grouped_mm.default:
        return _grouped_mm(*args, **kwargs)
    if target is aten.view.default:
        target = aten.reshape.default  # in another dtype, an operator may choose other strides
    args, kwargs = pytree.tree_map(_wide, (args, kwargs))
    result = pytree.tree_map(_wide, target(*args, **kwargs))
    if "empty" in str(target) and isinstance(result, Tensor) and result.is_floating_point():
        result = torch.full_like(result, math.nan)
    return result


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def _grouped_mm(left: Tensor, right: Tensor, offs: Tensor, *_: Any) -> Tensor:
    bounds = list(itertools.pairwise([0, *offs.tolist()]))
    rows = left.shape[1 if right.ndim == 2 else 0]
    assert all(0 <= a <= b <= rows for a, b in bounds), bounds
    if right.ndim == 2:
        return torch.stack([left[:, a:b] @ right[a:b] for a, b in bounds])
    out = left.new_full((left.shape[0], right.shape[2]), math.nan)
    for expert, (a, b) in enumerate(bounds):
        out[a:b] = left[a:b] @ right[expert]
    return out


# -- collectives ------------------------------------------------------------------------------


def _all_to_all(calls: list[Any]) -> Ranked:
    pieces = [args[0].split(list(args[2])) for args, _ in calls]
    received = [torch.cat([sent[rank] for sent in pieces]) for rank in range(len(calls))]
    for rank, (args, _) in enumerate(calls):
        expected = [sent[rank].shape[0] for sent in pieces]
        assert list(args[1]) == expected, f"rank {rank} expects {args[1]}, gets {expected}"
    return received


def _wait(calls: list[Any]) -> Ranked:
    return [args[0] for args, _ in calls]


# -- the ops ----------------------------------------------------------------------------------

# places of the token-sharded and of the expert-sharded arguments among x .. b_out
_BY_TOKEN = (0, 1, 2)
_BY_EXPERT = (3, 4, 5, 6, 7, 8)


def _moe_layer(calls: list[Any]) -> Ranked:
    options = _options(calls[0][1])
    results = []
    for layer, sizes in _joined([args[:9] for args, _ in calls], calls[0][1]["form"]):
        y = moe_layer_ref(*layer, **options)
        results += list(y.split(sizes))
    empty = torch.empty(0)
    return [(y, empty, empty) for y in results]


def _moe_layer_backward(calls: list[Any]) -> Ranked:
    kwargs = calls[0][1]
    options = _options(kwargs)
    joined = list(_joined([args[1:10] for args, _ in calls], kwargs["form"]))
    if kwargs["form"] == "local":
        grads_y = [args[0] for args, _ in calls]
    else:
        grads_y = [torch.cat([args[0] for args, _ in calls])]
    results: Ranked = []
    for grad_y, (layer, sizes) in zip(grads_y, joined, strict=True):
        grads = moe_layer_backward_ref(grad_y, *layer, **options, needs=kwargs["needs"])
        ranks = len(sizes)
        by_token = [g.split(sizes) if g.numel() else (g,) * ranks for g in grads[:2]]
        by_expert = [g.chunk(ranks) if g.numel() else (g,) * ranks for g in grads[2:]]
        results += [
            (*(part[r] for part in (*by_token, *by_expert)), torch.empty(0)) for r in range(ranks)
        ]
    return results


def _options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"activation": kwargs["activation"], "weight_place": kwargs["weight_place"]}


def _joined(layers: Sequence[Any], form: str) -> list[tuple[list[Any], list[int]]]:
    """One (arguments, tokens per rank) per rank, or one for all ranks if tokens travel."""
    sizes = [layer[0].shape[0] for layer in layers]
    if form == "local":
        return [(list(layer), [size]) for layer, size in zip(layers, sizes, strict=True)]
    assert form == "all_to_all", form
    return [([_cat([layer[i] for layer in layers]) for i in range(9)], sizes)]


def _cat(values: Sequence[Tensor | None]) -> Tensor | None:
    present = [v for v in values if v is not None]
    return torch.cat(present) if present else None


_EXCHANGES: dict[Any, Callable[[list[Any]], Ranked]] = {
    c10d.all_to_all_single.default: _all_to_all,
    c10d.wait_tensor.default: _wait,
    torch.ops.comet.moe_layer.default: _moe_layer,
    torch.ops.comet.moe_layer_backward.default: _moe_layer_backward,
}
