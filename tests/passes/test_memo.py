"""Equal layers are proven once, and only equal ones."""

from __future__ import annotations

import collections
import math
import sys
from collections.abc import Callable
from typing import Any

import joint_graphs
import pytest
import torch
from torch import Tensor, fx, nn
from zoo import ep, hf, near_misses
from zoo.titan import TitanMoE

from comet_compile.passes import backward, moe_pass
from comet_compile.passes.memo import Terms

aten = torch.ops.aten

T = 6


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """Counts the regions whose forward, and those whose backward, is evaluated."""
    counts: collections.Counter[str] = collections.Counter()

    def counted(module: Any, function: str, name: str) -> None:
        original: Callable[..., Any] = getattr(module, function)

        def call(*args: Any) -> Any:
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(module, function, call)

    counted(moe_pass, "prove", "forward")
    counted(backward, "_evaluated", "backward")
    return counts


# -- whole models -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_equal_layers_are_proven_once(
    name: str, proofs: collections.Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hf.config(name)
    config.num_hidden_layers = 3
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:1] * 3
    monkeypatch.setattr(hf, "config", lambda _: config)
    graph = joint_graphs.capture(hf.causal_lm(name), hf.input_ids(), train=True)
    counts = joint_graphs.run_pass(graph)
    assert counts["regions_portable"] == counts["regions_backward_portable"] == 3
    assert proofs == {"forward": 1, "backward": 1}


@pytest.mark.usefixtures("fake_group")
def test_layers_that_read_splits_on_the_host_are_proven_once(
    proofs: collections.Counter[str],
) -> None:
    # each layer has size symbols of its own
    model = ep.Stack([TitanMoE(seed=0), TitanMoE(seed=1)])
    graph = joint_graphs.capture(model, ep.tokens(T), train=True)
    assert joint_graphs.num_rewritten(joint_graphs.run_pass(graph)) == 2
    assert proofs == {"forward": 1, "backward": 1}


class Clamped(near_misses.LocalMoE):
    """A layer with one constant of its own."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def activate(self, pre_SN: Tensor) -> Tensor:
        gate, up = pre_SN.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return nn.functional.silu(gate) * up


def test_layers_that_differ_in_a_constant_are_proven_each(
    proofs: collections.Counter[str],
) -> None:
    model = ep.Stack([Clamped(7.0), Clamped(6.0), Clamped(7.0)])
    graph = joint_graphs.capture(model, ep.tokens(T), train=True)
    assert joint_graphs.num_rewritten(joint_graphs.run_pass(graph)) == 3
    assert proofs == {"forward": 2, "backward": 2}
    ops = joint_graphs.nodes_of(graph, joint_graphs.MOE)
    limits = [7.0 if "7" in op.kwargs["activation"] else 6.0 for op in ops]
    assert limits == [7.0, 6.0, 7.0]


@pytest.mark.parametrize("exact_first", [True, False])
def test_a_layer_with_another_gradient_is_refused_beside_an_exact_one(exact_first: bool) -> None:
    layers = [near_misses.LocalMoE(), near_misses.ScalesGradient()]
    model = ep.Stack(layers if exact_first else layers[::-1])
    graph = joint_graphs.capture(model, ep.tokens(T), train=True)
    counts = joint_graphs.run_pass(graph)
    assert counts["regions_portable"] == counts["regions_rejected"] == 1
    assert joint_graphs.rejections(counts) == ["backward_not_proven"]


# -- expressions ------------------------------------------------------------------------------


def constant(graph: fx.Graph, value: float, dtype: torch.dtype = torch.float32) -> fx.Node:
    return call(graph, aten.full.default, [3], value, dtype=dtype)


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    node.meta["val"] = target(*args, **kwargs)
    return node


def leaf(graph: fx.Graph, name: str, dtype: torch.dtype = torch.float32) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = torch.ones(3, dtype=dtype)
    return node


Build = Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]


def number(terms: Terms, build: Build, **dtypes: torch.dtype) -> int:
    """The number of what `build` makes of two inputs, in a graph of its own."""
    graph = fx.Graph()
    a, b = (leaf(graph, name, dtypes.get(name, torch.float32)) for name in "ab")
    result = build(graph, a, b)
    return terms.numbered(graph.nodes, {a: "a", b: "b"})[result]


def shared(graph: fx.Graph, a: fx.Node, b: fx.Node) -> fx.Node:
    one = constant(graph, 1.0)
    left, right = call(graph, aten.add.Tensor, a, one), call(graph, aten.add.Tensor, b, one)
    return call(graph, aten.mul.Tensor, left, right)


def unshared(graph: fx.Graph, a: fx.Node, b: fx.Node) -> fx.Node:
    right = call(graph, aten.add.Tensor, b, constant(graph, 1.0))
    left = call(graph, aten.add.Tensor, a, constant(graph, 1.0))
    return call(graph, aten.mul.Tensor, left, right)


def test_order_and_sharing_of_constants_play_no_part() -> None:
    terms = Terms()
    assert number(terms, shared) == number(terms, unshared)


def plus(value: Any, dtype: torch.dtype = torch.float32) -> Build:
    return lambda graph, a, _: call(graph, aten.add.Tensor, a, constant(graph, value, dtype))


def times(value: Any) -> Build:
    return lambda graph, a, _: call(graph, aten.mul.Tensor, a, value)


NEAR_MISSES: dict[str, tuple[Build, Build]] = {
    "constant": (plus(1.0), plus(1.0 + 2**-52)),
    "sign of zero": (times(0.0), times(-0.0)),
    "integer or float": (times(1), times(1.0)),
    "number or bool": (times(1), times(True)),
    "infinity": (times(math.inf), times(-math.inf)),
    "dtype of a constant": (plus(1.0), plus(1.0, torch.float64)),
    "operation": (
        lambda graph, a, b: call(graph, aten.add.Tensor, a, b),
        lambda graph, a, b: call(graph, aten.mul.Tensor, a, b),
    ),
    "roles of inputs": (
        lambda graph, a, b: call(graph, aten.sub.Tensor, a, b),
        lambda graph, a, b: call(graph, aten.sub.Tensor, b, a),
    ),
    "one input twice": (
        lambda graph, a, b: call(graph, aten.add.Tensor, a, b),
        lambda graph, a, b: call(graph, aten.add.Tensor, a, a),
    ),
    "keyword": (
        lambda graph, a, b: call(graph, aten.add.Tensor, a, b),
        lambda graph, a, b: call(graph, aten.add.Tensor, a, b, alpha=2),
    ),
    "shape": (
        lambda graph, a, _: call(graph, aten.view.default, a, [3, 1]),
        lambda graph, a, _: call(graph, aten.view.default, a, [1, 3]),
    ),
}


@pytest.mark.parametrize("difference", NEAR_MISSES)
def test_near_misses_get_different_numbers(difference: str) -> None:
    terms = Terms()
    one, other = NEAR_MISSES[difference]
    assert number(terms, one) == number(terms, one)
    assert number(terms, one) != number(terms, other)


def test_inputs_of_another_dtype_get_different_numbers() -> None:
    terms = Terms()
    assert number(terms, times(2.0)) != number(terms, times(2.0), a=torch.float64)


# -- deep models ------------------------------------------------------------------------------


class Deep(nn.Module):
    """Layers behind a long chain of values, each with a residual connection."""

    def __init__(self, num_layers: int, chain: int = 0):
        super().__init__()
        self.layers = nn.ModuleList(near_misses.LocalMoE() for _ in range(num_layers))
        self.chain = chain

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.chain):
            x = 1.5 * torch.tanh(x)
        for layer in self.layers:
            x = x + layer(torch.tanh(x))
        return x


def test_the_search_for_gradients_grows_with_the_layers_not_their_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at: list[int] = []
    original = backward.is_known_size

    def counted(node: fx.Node) -> bool:
        looked_at[-1] += 1
        return original(node)

    monkeypatch.setattr(backward, "is_known_size", counted)
    for num_layers in (4, 8, 12):
        graph = joint_graphs.capture(Deep(num_layers), ep.tokens(T), train=True)
        looked_at.append(0)
        assert joint_graphs.num_rewritten(joint_graphs.run_pass(graph)) == num_layers
    four, eight, twelve = looked_at
    assert twelve - eight == eight - four


def test_a_layer_behind_more_values_than_python_recurses() -> None:
    graph = joint_graphs.capture(Deep(1, chain=520), ep.tokens(T), train=True)
    limit = sys.getrecursionlimit()  # compilers raise it
    sys.setrecursionlimit(1000)
    try:
        assert sys.getrecursionlimit() < 2 * 520, "two values each"
        counts = joint_graphs.run_pass(graph)
    finally:
        sys.setrecursionlimit(limit)
    assert joint_graphs.num_rewritten(counts) == 1, counts
