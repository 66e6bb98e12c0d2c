"""Hugging Face expert parallelism (router mask and all-reduce) in real gloo processes."""

from __future__ import annotations

import pytest
import torch
from distributed.gloo import run_ranks
from e2e import harness
from torch import nn

pytest.importorskip("transformers")

from zoo import hf, hf_ep

TIMEOUT = 280.0  # two processes that generate and compile C++ on a slow, shared core


@pytest.mark.parametrize("name", hf_ep.NAMES)
def test_block_inference(name: str) -> None:
    run_ranks(_block, 2, name, False, timeout=TIMEOUT)


@pytest.mark.parametrize("name", hf_ep.NAMES)
def test_block_training(name: str) -> None:
    run_ranks(_block, 2, name, True, timeout=TIMEOUT)


def _block(rank: int, world_size: int, name: str, train: bool) -> None:
    block = hf_ep.moe_block(name)
    outcome = harness.compile_and_compare(
        block,
        [hf.hidden_states(name)],
        train=train,
        reference=hf.moe_block(name).float(),
    )
    harness.assert_rewritten(outcome, 1, train=train)


def test_causal_lm() -> None:
    run_ranks(_causal_lm, 2, timeout=TIMEOUT)


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
