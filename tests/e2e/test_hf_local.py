"""Hugging Face models on one device: every MoE layer is rewritten and computes the same."""

from __future__ import annotations

import pytest
import torch
from e2e import harness
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

from zoo import hf

IMPLEMENTATIONS = ("grouped_mm", "batched_mm")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", hf.NAMES)
def test_block_inference(name: str, implementation: str) -> None:
    block = hf.moe_block(name, implementation)
    outcome = harness.compile_and_compare(block, [hf.hidden_states(name)], train=False)
    harness.assert_rewritten(outcome, 1, train=False)


@pytest.mark.parametrize("name", hf.NAMES)
def test_block_training_batched_mm(name: str) -> None:
    block = hf.moe_block(name, "batched_mm")
    outcome = harness.compile_and_compare(block, [hf.hidden_states(name)], train=True)
    harness.assert_rewritten(outcome, 1, train=True)


# whose blocks are trained above, and which differ from others in nothing around them
ALIKE = ("olmoe", "qwen2_moe")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in ALIKE else []) for n in hf.NAMES],
)
def test_causal_lm_training(name: str) -> None:
    model = hf.causal_lm(name)
    outcome = harness.compile_and_compare(_Logits(model), [hf.input_ids()], train=True)
    harness.assert_rewritten(outcome, hf.num_moe_layers(model), train=True)


def test_causal_lm_inference() -> None:
    model = hf.causal_lm("olmoe")
    outcome = harness.compile_and_compare(_Logits(model), [hf.input_ids()], train=False)
    harness.assert_rewritten(outcome, hf.num_moe_layers(model), train=False)


def test_dynamic_token_counts_compile_once() -> None:
    inputs = [
        hf.hidden_states("qwen3_moe", batch=2, seq=12),
        hf.hidden_states("qwen3_moe", batch=3, seq=7, seed=1),
        hf.hidden_states("qwen3_moe", batch=5, seq=9, seed=2),
    ]
    block = hf.moe_block("qwen3_moe")
    outcome = harness.compile_and_compare(block, inputs, train=True, dynamic=True)
    assert outcome.graphs == 1
    harness.assert_rewritten(outcome, 1, train=True)


def test_changing_token_counts_recompile_once() -> None:
    inputs = [hf.hidden_states("mixtral", batch=2, seq=s, seed=s) for s in (12, 7, 5, 16)]
    outcome = harness.compile_and_compare(hf.moe_block("mixtral"), inputs, train=False)
    assert outcome.graphs == 2, "one static graph, one dynamic"
    harness.assert_rewritten(outcome, 1, train=False)


def test_one_token() -> None:
    inputs = [hf.hidden_states("mixtral", batch=1, seq=1)]
    for implementation in IMPLEMENTATIONS:
        block = hf.moe_block("mixtral", implementation)
        outcome = harness.compile_and_compare(block, inputs, train=False)
        harness.assert_rewritten(outcome, 1, train=False)


def test_activation_checkpointing() -> None:
    block = hf.moe_block("gpt_oss")

    def checkpointed(module: nn.Module):
        return lambda x: checkpoint(module, x, use_reentrant=False)

    outcome = harness.compile_and_compare(
        block, [hf.hidden_states("gpt_oss")], train=True, wrap=checkpointed
    )
    harness.assert_rewritten(outcome, 1, train=True)


def test_frozen_experts() -> None:
    block = hf.moe_block("mixtral")
    block.experts.requires_grad_(False)
    x = hf.hidden_states("mixtral")
    reference = hf.moe_block("mixtral", dtype=torch.float32)
    reference.load_state_dict(block.state_dict())

    def gradients(module: nn.Module):
        return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}

    reference.experts.requires_grad_(False)
    ref = harness.results(reference, reference, x.float(), True, gradients)
    eager = harness.results(block, block, x, True, gradients)
    with harness.fresh_compilation():
        compiled = torch.compile(block, backend=harness.BACKEND, fullgraph=True)
        got = harness.results(block, compiled, x, True, gradients)
        harness.assert_rewritten(harness.snapshot(compiled), 1, train=True)
    harness.assert_all_match(got, ref, eager, "frozen experts")


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_float32_experts(name: str, autocast: bool, train: bool) -> None:
    """transformers has an op of its own for experts that are not bfloat16."""
    block = hf.moe_block(name, dtype=torch.float32)
    x = hf.hidden_states(name, dtype=torch.float32)
    reference = hf.moe_block(name, "batched_mm", torch.float64)
    reference.load_state_dict(block.state_dict())

    def call(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return block(x)

    ref = harness.results(reference, reference, x.double(), train)
    eager = harness.results(block, call, x, train)
    with harness.fresh_compilation():
        got = harness.results(block, torch.compile(call, backend=harness.BACKEND), x, train)
        harness.assert_rewritten(harness.snapshot(block), 1, train=train)
    harness.assert_all_match(got, ref, eager, f"{name} in float32")


class _Logits(nn.Module):
    """The model without a key-value cache, called with one positional tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits
