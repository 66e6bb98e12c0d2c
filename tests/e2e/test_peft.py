"""Models wrapped by PEFT: low-rank adapters on the attention, frozen experts."""

from __future__ import annotations

import pytest
import torch
from e2e import harness
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("peft", reason="peft is not installed")

import peft
from zoo import hf


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def adapted(name: str, dtype: torch.dtype) -> nn.Module:
    """The model with adapters on its attention, whose product is not zero as at the beginning."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]
    )
    model = peft.get_peft_model(hf.causal_lm(name, dtype=dtype), config)
    generator = torch.Generator().manual_seed(3)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data.copy_(noise)
    return _Logits(model)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_training(name: str) -> None:
    model = adapted(name, torch.bfloat16)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained), "the experts are frozen"
    reference = adapted(name, torch.float32)
    reference.load_state_dict(model.state_dict())
    x = hf.input_ids()

    def gradients(module: nn.Module) -> dict[str, Tensor | None]:
        return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}

    ref = harness.results(reference, reference, x, True, gradients)
    eager = harness.results(model, model, x, True, gradients)
    with harness.fresh_compilation():
        compiled = torch.compile(model, backend=harness.BACKEND, fullgraph=True)
        got = harness.results(model, compiled, x, True, gradients)
        harness.assert_rewritten(harness.snapshot(compiled), 2, train=True)
    harness.assert_all_match(got, ref, eager, f"{name} with adapters")
