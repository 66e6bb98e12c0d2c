"""What is not an MoE layer stays as Inductor would have it, to the last bit."""

from __future__ import annotations

import logging

import pytest
import torch
from e2e import harness
from torch import Tensor, nn
from zoo import ep, near_misses


class Dense(nn.Module):
    """A plain gated FFN with a norm: no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.w_in = nn.Linear(32, 96)
        self.w_out = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_in(self.norm(x)).chunk(2, dim=-1)
        return x + self.w_out(nn.functional.silu(gate) * up)


def dense() -> Dense:
    torch.manual_seed(0)
    return Dense().bfloat16()


@pytest.mark.parametrize("train", [False, True])
def test_dense_model_equals_inductor_bitwise(train: bool) -> None:
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected, _ = compiled_results(dense(), x, train, "inductor", codegen=True)
    got, outcome = compiled_results(dense(), x, train, "comet", codegen=True)
    assert_equal(got, expected)
    assert not any(outcome.comet.values()), outcome.comet


def test_dense_model_logs_one_quiet_line(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(10, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    with caplog.at_level(logging.DEBUG, logger="comet_compile"):
        compiled_results(dense(), x, True, "comet")
    ours = [r for r in caplog.records if r.name.split(".")[0] == "comet_compile"]
    assert max(r.levelno for r in ours) <= logging.INFO
    about_layers = [r.getMessage() for r in ours if "MoE" in r.getMessage()]
    assert len(about_layers) == 1, about_layers
    assert about_layers[0].startswith("comet: no MoE")


@pytest.mark.parametrize("name", near_misses.LOCAL)
def test_near_miss_equals_inductor_bitwise(name: str) -> None:
    kind = near_misses.LOCAL[name]
    x = ep.tokens(12)
    expected, _ = compiled_results(kind(), x, kind.trains, "inductor", kind.fullgraph)
    got, outcome = compiled_results(kind(), x, kind.trains, "comet", kind.fullgraph)
    assert_equal(got, expected)
    harness.assert_untouched(outcome)
    assert outcome.comet.get("regions_rejected", 0) > 0, outcome.comet
    reasons = sum(n for key, n in outcome.comet.items() if key.startswith("rejected."))
    assert reasons == outcome.comet["regions_rejected"]


def test_the_form_that_near_misses_are_made_from_is_rewritten() -> None:
    for kind in (near_misses.LocalMoE, near_misses.BatchedMoE):
        outcome = harness.compile_and_compare(kind(), [ep.tokens(12)], train=True)
        harness.assert_rewritten(outcome, 1, train=True)


def compiled_results(
    model: nn.Module,
    x: Tensor,
    train: bool,
    backend: str,
    fullgraph: bool = True,
    codegen: bool = False,
) -> tuple[dict[str, Tensor], harness.Outcome]:
    """Return the results of a freshly compiled `model` and its counters."""
    with harness.fresh_compilation(codegen):
        compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
        found = harness.results(model, compiled, x, train, existing_gradients)
        return found, harness.snapshot(compiled)


def existing_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the parameters that take part in the loss."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name]), f"{name} differs from Inductor's"
