"""Layers that loop over their experts, compiled and trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from e2e import harness
from torch import Tensor, nn
from zoo import loops


def tokens(num_tokens: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, loops.HIDDEN, generator=generator).to(dtype)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["loop", "modules", "modules_with_biases", "shared_expert_last"])
def test_any_number_of_tokens(name: str, train: bool) -> None:
    """One compilation after the first change of size serves all; Dynamo makes one of one token."""
    model = loops.REWRITTEN[name]()
    steps = [tokens(num_tokens, torch.bfloat16) for num_tokens in (24, 40, 9, 1)]
    outcome = harness.compile_and_compare(model, steps, train=train)
    assert outcome.comet["regions_found"] == outcome.comet["regions_portable"]
    assert outcome.graphs == 3


def _autocast(model: nn.Module) -> Callable[..., Any]:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    return forward


@pytest.mark.parametrize("name", ["loop", "modules"])
def test_autocast(name: str) -> None:
    """Fine-tuning as most people do it: float32 parameters, one step of it."""
    model = loops.REWRITTEN[name](dtype=torch.float32)
    x = tokens(24, torch.float32)
    ref = harness.results(model, model, x, True)
    eager = harness.results(model, _autocast(model), x, True)
    with harness.fresh_compilation():
        compiled = torch.compile(_autocast(model), backend=harness.BACKEND, fullgraph=True)
        got = harness.results(model, compiled, x, True)
        harness.assert_rewritten(harness.snapshot(model), 1, train=True)
    harness.assert_all_match(got, ref, eager, name)
