"""Python loops over the experts of a layer become the sparse layer that they are."""

from __future__ import annotations

import joint_graphs
import lockstep
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy
from zoo import loops

from comet_compile.passes import loops as arranging

aten = torch.ops.aten
T = 6

in_both_modes = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])


def tokens(hidden: int = loops.HIDDEN, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, T // 2, hidden, generator=generator).to(dtype)


def check(graph: fx.Graph, train: bool) -> fx.Node:
    """Require that the one layer is rewritten and computes the same; return its op."""
    rewritten = joint_graphs.clone(graph)
    counts = joint_graphs.run_pass(rewritten)
    expected = {"regions_found": 1, "regions_portable": 1}
    assert counts == expected | ({"regions_backward_portable": 1} if train else {})
    for seed in range(2):
        inputs = lockstep.random_inputs(graph, 1, seed, T)
        results = [lockstep.execute(g, inputs, 1) for g in (rewritten, graph)]
        assert not lockstep.differences(*results)
    return joint_graphs.only(rewritten, joint_graphs.MOE)


def assert_refused(layer: nn.Module, reason: str, train: bool) -> None:
    graph = joint_graphs.capture(layer, tokens(), train=train)
    before = joint_graphs.listing(graph)
    assert joint_graphs.rejections(joint_graphs.run_pass(graph)) == [reason]
    assert joint_graphs.listing(graph) == before, "a refused region is left as it was"


@in_both_modes
@pytest.mark.parametrize("name", loops.REWRITTEN)
def test_rewritten(name: str, train: bool) -> None:
    layer = loops.REWRITTEN[name]()
    op = check(joint_graphs.capture(layer, tokens(), train=train), train)
    assert op.kwargs["weight_place"] == ("before" if name == "weights_before" else "after")
    has_two_matrices = name in ("biases", "adds_biases")
    assert op.kwargs["activation"] == ("gelu" if has_two_matrices else "silu_glu")
    has_biases = name.endswith("biases")
    biases = [has_biases, has_biases and not has_two_matrices, has_biases]
    assert [table is not None for table in op.args[6:9]] == biases


@in_both_modes
@pytest.mark.parametrize("name", ["loop", "modules", "modules_with_biases", "shared_expert_last"])
def test_autocast(name: str, train: bool) -> None:
    """Matrices in float32, each cast by itself, and the rows anew for every product."""
    layer = loops.REWRITTEN[name](dtype=torch.float32)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    graph = joint_graphs.capture(forward, tokens(dtype=torch.float32), train=train)
    op = check(graph, train)
    assert op.args[3].meta["val"].dtype == torch.bfloat16


@in_both_modes
@pytest.mark.parametrize("name", ["loop", "modules"])
def test_symbolic_number_of_tokens(name: str, train: bool) -> None:
    layer = loops.REWRITTEN[name]()
    graph = joint_graphs.capture(layer, tokens(), train=train, dynamic=True)
    counts = joint_graphs.run_pass(graph)
    assert joint_graphs.is_rewritten(counts), counts


def test_stacks_of_modules_are_made_anew_in_the_backward() -> None:
    graph = joint_graphs.capture(loops.Modules(), tokens(), train=True)
    joint_graphs.run_pass(graph)
    op = joint_graphs.only(graph, joint_graphs.MOE)
    for matrices in (op.args[3], op.args[4], op.args[5]):
        while matrices.op != "placeholder":
            joined = matrices
            assert matrices.meta["recompute"] == CheckpointPolicy.PREFER_RECOMPUTE
            matrices = matrices.args[0]
            if joined.target is aten.cat.default:
                break
        assert len(matrices) == loops.NUM_EXPERTS


@in_both_modes
def test_few_tokens_do_not_pay_for_stacks(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arranging, "tokens_that_pay", lambda device: T + 1)
    assert_refused(loops.Modules(), "separate_experts", train)
    monkeypatch.setattr(arranging, "tokens_that_pay", lambda device: T)
    check(joint_graphs.capture(loops.Modules(), tokens(), train=train), train)


@in_both_modes
@pytest.mark.parametrize("name", ["loop", "modules", "shared_expert_last"])
def test_layers_in_a_row(name: str, train: bool) -> None:
    """The second layer's rows are the first one's output, which is replaced by then."""
    model = nn.Sequential(loops.REWRITTEN[name](), nn.Tanh(), loops.REWRITTEN[name]())
    graph = joint_graphs.capture(model.float(), tokens(dtype=torch.float32), train=train)
    rewritten = joint_graphs.clone(graph)
    assert joint_graphs.num_rewritten(joint_graphs.run_pass(rewritten)) == 2
    inputs = lockstep.random_inputs(graph, 1, 0, T)
    results = [lockstep.execute(g, inputs, 1) for g in (rewritten, graph)]
    assert not lockstep.differences(*results)


class Ensemble(nn.Module):
    """Networks of one shape on the same tokens, each counted as much as it says: no experts."""

    def __init__(self) -> None:
        super().__init__()
        experts = loops.Modules(dtype=torch.float32).experts
        self.networks, self.weigh = experts, nn.Linear(loops.HIDDEN, len(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weigh(x).softmax(-1)
        outputs = [network(x) * weights[..., e : e + 1] for e, network in enumerate(self.networks)]
        return torch.stack(outputs).sum(0)


@in_both_modes
def test_no_experts(train: bool) -> None:
    graph = joint_graphs.capture(Ensemble(), tokens(dtype=torch.float32), train=train)
    before = joint_graphs.listing(graph)
    assert joint_graphs.run_pass(graph) == {}
    assert joint_graphs.listing(graph) == before


@in_both_modes
def test_what_is_no_layer_is_left_as_it_was_beside_one(train: bool) -> None:
    """All of them have gradients among the outputs, which are put back one by one."""
    layer = loops.Modules(dtype=torch.float32)
    model = nn.Sequential(Ensemble(), layer, Ensemble(), loops.ModulesSquared(dtype=torch.float32))
    graph = joint_graphs.capture(model, tokens(dtype=torch.float32), train=train)
    rewritten = joint_graphs.clone(graph)
    counts = joint_graphs.run_pass(rewritten)
    assert (joint_graphs.num_rewritten(counts), counts["regions_found"]) == (1, 2)
    rewritten.lint()
    # the ensembles' products and the refused layer's are there as before
    products = [len(joint_graphs.nodes_of(g, aten.addmm.default)) for g in (graph, rewritten)]
    assert products[0] == products[1]
    assert not [n for n in joint_graphs.nodes_of(rewritten, aten.select.int) if not n.users]
    inputs = lockstep.random_inputs(graph, 1, 0, T)
    results = [lockstep.execute(g, inputs, 1) for g in (rewritten, graph)]
    assert not lockstep.differences(*results)


@in_both_modes
@pytest.mark.parametrize("name", loops.REFUSED)
def test_refused(name: str, train: bool) -> None:
    layer, reason = loops.REFUSED[name]
    assert_refused(layer(), reason, train)
