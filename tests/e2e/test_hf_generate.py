"""What users do with Hugging Face models beside calling them: generate, balance the router."""

from __future__ import annotations

import pytest
import torch
from e2e import harness
from torch import Tensor, nn

pytest.importorskip("transformers")

from zoo import hf


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_generate(name: str) -> None:
    # float32, in which no two tokens come so near that rounding decides
    model = hf.causal_lm(name, dtype=torch.float32).eval()
    ids = hf.input_ids(batch=2, seq=7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padded on the left
    ids[0, :3] = model.config.pad_token_id

    def generate() -> Tensor:
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            cache_implementation="static",
        )

    expected = generate()
    assert expected.shape[1] > ids.shape[1]
    with harness.fresh_compilation():
        model.forward = torch.compile(model.forward, backend=harness.BACKEND)
        got = generate()
        outcome = harness.snapshot(model)
    assert torch.equal(got, expected)
    # the prompt, and one token after the other
    assert outcome.graphs == 2
    harness.assert_rewritten(outcome, hf.num_moe_layers(model), train=False)


class _Loss(nn.Module):
    """The loss with what balances the router."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        out = self.model(ids, labels=ids, output_router_logits=True, use_cache=False)
        assert out.aux_loss is not None
        return out.loss


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_training_with_a_router_loss(name: str) -> None:
    model = hf.causal_lm(name).train()
    outcome = harness.compile_and_compare(_Loss(model), [hf.input_ids()], train=True)
    harness.assert_rewritten(outcome, hf.num_moe_layers(model), train=True)
