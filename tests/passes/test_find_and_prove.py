"""What the pass finds and proves in every family, read off the op that it emits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import joint_graphs
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from zoo import ep, hf, near_misses, textbook
from zoo.titan import TitanMoE

from comet_compile.passes.backward import GRADIENT_NAMES

T = 6
BF16, F32 = torch.bfloat16, torch.float32


@dataclasses.dataclass(frozen=True)
class Facts:
    """What has to be proven of a layer; gradients are those that its parameters ask for."""

    activation: str
    weight_place: str
    product_dtype: torch.dtype
    top_k: int
    form: str = "local"
    biases: tuple[str, ...] = ()
    separate_up: bool = False
    weights_dtype: torch.dtype = F32

    @property
    def gradients(self) -> tuple[str, ...]:
        up = ("w_up",) if self.separate_up else ()
        return ("x", "weights", "w_in", *up, "w_out", *self.biases)


# the routers of some models hand their weights on in bfloat16
HUGGING_FACE = {
    "mixtral": Facts("silu_glu", "after", F32, 2),
    "qwen2_moe": Facts("silu_glu", "after", BF16, 4, weights_dtype=BF16),
    "qwen3_moe": Facts("silu_glu", "after", BF16, 3, weights_dtype=BF16),
    "olmoe": Facts("silu_glu", "after", BF16, 4, weights_dtype=BF16),
    "deepseek_v3": Facts("silu_glu", "after", F32, 2),
    "gpt_oss": Facts(
        "swiglu_oai:interleaved:alpha=1.702:limit=7.0", "after", BF16, 4,
        biases=("b_in", "b_out"), weights_dtype=BF16,
    ),
}  # fmt: skip

ALL_TO_ALL: dict[str, tuple[Callable[[], nn.Module], Facts]] = {
    "titan": (TitanMoE, Facts("silu_glu", "after", F32, 2, "all_to_all", separate_up=True)),
    "titan_before": (
        lambda: TitanMoE(score_before_experts=True),
        Facts("silu_glu", "before", F32, 2, "all_to_all", separate_up=True),
    ),
    "funcol": (
        textbook.FuncolMoE,
        Facts("silu_glu", "after", BF16, 2, "all_to_all", weights_dtype=BF16),
    ),
    "in_place": (textbook.InPlaceMoE, Facts("silu_glu", "after", BF16, 2, "all_to_all")),
    "in_place_function": (
        textbook.InPlaceFunctionMoE,
        Facts("silu_glu", "after", BF16, 2, "all_to_all"),
    ),
}


def check(graph: fx.Graph, facts: Facts, train: bool) -> None:
    counts = joint_graphs.run_pass(graph)
    expected = {"regions_found": 1, "regions_portable": 1}
    if train:
        expected["regions_backward_portable"] = 1
    assert counts == expected
    assert proven(graph) == facts
    if not train:
        assert joint_graphs.nodes_of(graph, joint_graphs.MOE_BACKWARD) == []
        return
    needs = joint_graphs.only(graph, joint_graphs.MOE_BACKWARD).kwargs["needs"]
    found = tuple(name for name, need in zip(GRADIENT_NAMES, needs, strict=True) if need)
    assert found == facts.gradients


def proven(graph: fx.Graph) -> Facts:
    """The facts that the emitted op states."""
    node = joint_graphs.only(graph, joint_graphs.MOE)
    _, ids, weights, _, w_up, _, *biases, _ = node.args
    names = ("b_in", "b_up", "b_out")
    return Facts(
        activation=node.kwargs["activation"],
        weight_place=node.kwargs["weight_place"],
        product_dtype=node.kwargs["product_dtype"],
        top_k=ids.meta["val"].shape[1],
        form=node.kwargs["form"],
        biases=tuple(n for n, b in zip(names, biases, strict=True) if b is not None),
        separate_up=w_up is not None,
        weights_dtype=weights.meta["val"].dtype,
    )


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", hf.NAMES)
def test_hugging_face(name: str, implementation: str, train: bool) -> None:
    block = joint_graphs.small_block(name, implementation)
    x = torch.randn(1, T, hf.HIDDEN).bfloat16()
    check(joint_graphs.capture(block, x, train=train), HUGGING_FACE[name], train)


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ALL_TO_ALL)
def test_all_to_all(name: str, train: bool) -> None:
    if name == "in_place" and train:
        pytest.skip("eager does not differentiate an in-place exchange")
    make, facts = ALL_TO_ALL[name]
    check(joint_graphs.capture(make(), ep.tokens(T), train=train), facts, train)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("make", [near_misses.LocalMoE, near_misses.BatchedMoE])
def test_plain_layers(make: Callable[[], nn.Module], train: bool) -> None:
    facts = Facts("silu_glu", "after", BF16, 2, weights_dtype=BF16)
    graph = joint_graphs.capture(make(), ep.tokens(T), train=train)
    joint_graphs.run_pass(graph)
    found = proven(graph)
    # the conversion of the weights may be inside or outside of the region
    assert dataclasses.replace(found, weights_dtype=BF16) == facts


class Activated(near_misses.LocalMoE):
    """Any function between the projections."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.function = function

    def activate(self, pre_SN: torch.Tensor) -> torch.Tensor:
        return self.function(*pre_SN.chunk(2, dim=-1))


GATED: dict[str, Callable[..., torch.Tensor]] = {
    "silu_glu": lambda g, u: F.silu(g) * u,
    "silu_glu:up_first": lambda u, g: u * F.silu(g),
    "gelu_glu": lambda g, u: F.gelu(g) * u,
    "gelu_tanh_glu": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "relu_glu": lambda g, u: F.relu(g) * u,
    "sigmoid_glu": lambda g, u: torch.sigmoid(g) * u,
    "silu_glu:limit=10.0": lambda g, u: F.silu(g.clamp(max=10.0)) * u.clamp(-10.0, 10.0),
}


@pytest.mark.parametrize("spelling", GATED)
def test_tells_gated_activations_apart(spelling: str) -> None:
    graph = joint_graphs.capture(Activated(GATED[spelling]), ep.tokens(T), train=False)
    joint_graphs.run_pass(graph)
    assert proven(graph).activation == spelling


class Plain(near_misses.LocalMoE):
    """One function, no gate."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        super().__init__()
        self.function = function
        inner = self.w_out_EIH.shape[1]
        self.w_in_EHN = nn.Parameter(self.w_in_EHN.detach()[:, :, :inner].contiguous())

    def activate(self, pre_SN: torch.Tensor) -> torch.Tensor:
        return self.function(pre_SN)


PLAIN: dict[str, Callable[..., torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) * F.relu(x),
}


@pytest.mark.parametrize("spelling", PLAIN)
def test_tells_plain_activations_apart(spelling: str) -> None:
    graph = joint_graphs.capture(Plain(PLAIN[spelling]), ep.tokens(T), train=False)
    joint_graphs.run_pass(graph)
    assert proven(graph).activation == spelling


class WeightedBetween(near_misses.LocalMoE):
    """Weights multiply the activated rows in float32, before the out-projection."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores_TA, ids_TA = ep.route(x, self.gate, self.top_k)
        order_S, offs_E = self.order(ids_TA)
        pre_SN = torch._grouped_mm(self.gather(x, order_S), self.w_in_EHN, offs=offs_E)
        weight_S1 = scores_TA.view(-1)[order_S].unsqueeze(1)
        inner_SI = (self.activate(pre_SN).float() * weight_S1).to(x.dtype)
        out_SH = torch._grouped_mm(inner_SI, self.w_out_EIH, offs=offs_E)
        return out_SH[torch.argsort(order_S)].view(-1, self.top_k, x.shape[-1]).sum(1)


def test_weights_between_the_projections() -> None:
    graph = joint_graphs.capture(WeightedBetween(), ep.tokens(T), train=True)
    check(graph, Facts("silu_glu", "between", F32, 2), train=True)


def test_frozen_experts_need_no_weight_gradients() -> None:
    layer = near_misses.LocalMoE()
    layer.w_in_EHN.requires_grad_(False)
    layer.w_out_EIH.requires_grad_(False)
    graph = joint_graphs.capture(layer, ep.tokens(T), train=True)
    joint_graphs.run_pass(graph)
    needs = joint_graphs.only(graph, joint_graphs.MOE_BACKWARD).kwargs["needs"]
    assert needs == [True, True, False, False, False, False, False, False]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_symbolic_number_of_tokens(train: bool) -> None:
    graph = joint_graphs.capture(near_misses.LocalMoE(), ep.tokens(T), train=train, dynamic=True)
    counts = joint_graphs.run_pass(graph)
    assert joint_graphs.is_rewritten(counts), counts
    y = joint_graphs.only(graph, joint_graphs.MOE).meta["val"][0]
    assert isinstance(y.shape[0], torch.SymInt)


@pytest.mark.usefixtures("fake_group")
def test_several_layers_are_found_each() -> None:
    model = ep.Stack([TitanMoE(seed=0), textbook.FuncolMoE(seed=1)])
    graph = joint_graphs.capture(model, ep.tokens(T), train=False)
    counts = joint_graphs.run_pass(graph)
    assert counts == {"regions_found": 2, "regions_portable": 2}


def test_a_model_without_experts_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    graph = joint_graphs.capture(model, torch.randn(4, 32), train=True)
    before = joint_graphs.listing(graph)
    assert joint_graphs.run_pass(graph) == {}
    assert joint_graphs.listing(graph) == before
