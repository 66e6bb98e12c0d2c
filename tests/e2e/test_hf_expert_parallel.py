"""Hugging Face expert parallelism (router mask and all-reduce) in real gloo processes."""

from __future__ import annotations

import pytest
import torch
from distributed.gloo import RankPool
from e2e import harness
from torch import nn

pytest.importorskip("transformers")

from zoo import hf, hf_ep


@pytest.mark.parametrize("name", hf_ep.NAMES)
def test_block(name: str, pair: RankPool) -> None:
    pair.run(_block, name)


def _block(rank: int, world_size: int, name: str) -> None:
    block = hf_ep.moe_block(name)
    reference = hf.moe_block(name).float()
    for train in (False, True):
        outcome = harness.compile_and_compare(
            block, [hf.hidden_states(name)], train=train, reference=reference
        )
        harness.assert_rewritten(outcome, 1, train=train)


def test_as_many_tokens_as_experts(pair: RankPool) -> None:
    pair.run(_as_many_tokens_as_experts)


def _as_many_tokens_as_experts(rank: int, world_size: int) -> None:
    block = hf_ep.moe_block("gpt_oss")
    reference = hf.moe_block("gpt_oss").float()
    for tokens in (hf.NUM_EXPERTS // world_size, hf.NUM_EXPERTS):
        outcome = harness.compile_and_compare(
            block, [hf.hidden_states("gpt_oss", 1, tokens)], train=True, reference=reference
        )
        harness.assert_rewritten(outcome, 1, train=True)


def test_causal_lm(pair: RankPool) -> None:
    pair.run(_causal_lm)


def _causal_lm(rank: int, world_size: int) -> None:
    model = hf_ep.causal_lm("mixtral", ep_implementation="auto")
    outcome = harness.compile_and_compare(
        _Logits(model),
        [hf.input_ids()],
        train=False,
        reference=_Logits(hf.causal_lm("mixtral").float()),
    )
    harness.assert_rewritten(outcome, hf.num_moe_layers(model), train=False)


class _Logits(nn.Module):
    """The model without a key-value cache, called with one positional tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, use_cache=False).logits
