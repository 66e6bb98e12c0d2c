"""explain(): a fresh compilation whatever was compiled before, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._inductor.compile_fx import compile_fx
from zoo import hf

import comet_compile
from comet_compile import records
from comet_compile.explainer import explain


def publishing_backend(gm: torch.fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
    """Compile with Inductor and publish an empty record from a joint-graph pass, as comet does."""

    def publish(graph: torch.fx.Graph) -> None:
        kind = "training" if any("tangents" in n.name for n in graph.nodes) else "inference"
        records.publish(
            records.GraphRecord(0, kind, len(graph.nodes), len(graph.nodes), 0.0, (), "", "")
        )

    return compile_fx(gm, inputs, config_patches={"joint_custom_post_pass": publish})


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let explain() find the publishing backend, so that only explain() itself is tested."""
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: publishing_backend)


class Changing(torch.nn.Module):
    """Changes everything a forward may change: buffers, their objects, random state, flags."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.dropout = torch.nn.Dropout(0.5)
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x: torch.Tensor, model: int = 1) -> torch.Tensor:
        self.replaced = self.replaced + model
        return self.dropout(self.norm(self.linear(x)))


@pytest.mark.usefixtures("stand_in")
def test_explain_leaves_the_model_as_it_was() -> None:
    model, x = Changing(), torch.randn(3, 4)
    model.dropout.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replaced, linear_version = model.replaced, model.linear.weight._version
    flags = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()

    report = explain(model, x, model=2)  # `model` is also the name of explain's first parameter

    assert len(report.graphs) == 1
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in before.items()
    }
    assert model.replaced is replaced
    assert model.linear.weight._version == linear_version
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures("stand_in")
def test_explain_does_not_touch_buffers_that_did_not_change() -> None:
    model = Changing().eval()
    version = model.norm.running_mean._version  # type: ignore[union-attr]
    explain(model, torch.randn(3, 4))
    assert model.norm.running_mean._version == version  # type: ignore[union-attr]


@pytest.mark.usefixtures("stand_in")
def test_explain_restores_after_an_error() -> None:
    model = Changing()
    with pytest.raises(Exception, match=r"size|shape"):
        explain(model, torch.randn(3, 5))
    assert model.replaced.item() == 0
    assert records.is_collecting() is False


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("grad", [True, False])
def test_explain_follows_the_callers_grad_mode(grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        report = explain(torch.nn.Linear(4, 4), torch.randn(3, 4))
    assert [graph.kind for graph in report.graphs] == ["training" if grad else "inference"]


@pytest.mark.usefixtures("stand_in")
def test_explain_compiles_every_time_and_costs_the_model_no_recompile() -> None:
    model, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
    user = torch.compile(model, backend="aot_eager")
    user(x)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert len(explain(model, x).graphs) == 1
    frames = torch._dynamo.utils.counters["frames"]["total"]
    user(x)
    assert torch._dynamo.utils.counters["frames"]["total"] == frames
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        torch.compile(model, backend="eager")(x)


@pytest.mark.usefixtures("stand_in")
def test_explain_takes_what_is_compiled_already() -> None:
    x = torch.randn(3, 4)
    in_place = torch.nn.Linear(4, 4)
    in_place.compile(backend="aot_eager")
    in_place(x)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    for compiled in (torch.compile(torch.nn.Linear(4, 4)), in_place, torch.compile(function)):
        assert len(explain(compiled, x).graphs) == 1


@pytest.mark.usefixtures("stand_in")
def test_explain_names_graph_breaks_once_each() -> None:
    def breaking(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    report = explain(breaking, torch.ones(2))
    assert report.num_graphs == 2
    (graph_break,) = report.graph_breaks
    assert "graph_break()" in graph_break.reason
    line = breaking.__code__.co_firstlineno + 2
    assert graph_break.where == f"{__file__}:{line}"
    assert f"test_report_explain.py:{line}" in str(report)


def test_explain_refuses_what_it_cannot_call() -> None:
    with pytest.raises(TypeError, match=r"got a Tensor; call it as explain\(model"):
        explain(torch.ones(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("grad", [True, False])
def test_explain_reports_a_hugging_face_layer(grad: bool, tmp_path: Any) -> None:
    block = hf.moe_block("qwen3_moe")
    x = torch.randn(2, 8, hf.HIDDEN, dtype=torch.bfloat16)
    with torch.set_grad_enabled(grad):
        report = comet_compile.explain(block, x)
    (region,) = report.regions
    assert region.status in ("fused", "portable"), str(report)
    assert region.family == "local"
    assert region.backward == (region.status if grad else "none")
    assert region.before is not None
    assert region.after is not None
    assert any(node.role == "comet" for node in region.after.nodes)
    assert str(report).splitlines()[-1].startswith("rewrote 1 of 1 MoE region in 1 graph")
    report.to_html(tmp_path / "report.html")


def test_explain_of_a_model_without_moe_says_so() -> None:
    report = comet_compile.explain(torch.nn.Linear(4, 4), torch.randn(3, 4))
    assert report.regions == ()
    assert str(report).startswith("no MoE region found in 1 graph\n")
