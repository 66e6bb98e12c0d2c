"""Small Hugging Face MoE models with random bf16 weights; nothing is downloaded.

All have H = 32, I = 48, 8 experts and two layers. Works with transformers 5.17 and 5.23.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo import routing

HIDDEN = 32
INTERMEDIATE = 48
NUM_EXPERTS = 8
VOCAB = 64
NAMES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Each model's own names for I, E and A, and what keeps it small.
_SPECIFIC = {
    "mixtral": {
        "intermediate_size": INTERMEDIATE,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE,
        "shared_expert_intermediate_size": 64,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 4,
    },
    "qwen3_moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    "olmoe": {
        "intermediate_size": INTERMEDIATE,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 4,
    },
    "deepseek_v3": {
        "intermediate_size": 64,
        "moe_intermediate_size": INTERMEDIATE,
        "n_routed_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,  # layer 0 is dense: one MoE layer of two
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "gpt_oss": {
        "intermediate_size": INTERMEDIATE,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": 4,
        "head_dim": 16,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}

_ROUTING_GROUPS = {"deepseek_v3": 2}


def config(name: str):
    """Return the small config of the model called `name`."""
    import transformers

    return transformers.AutoConfig.for_model(name, **_COMMON, **_SPECIFIC[name])


def causal_lm(
    name: str,
    experts_implementation: str = "grouped_mm",
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """Return the whole causal language model, with planted routing and seeded weights."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config(name), dtype=dtype, experts_implementation=experts_implementation
    )
    _reset_parameters(model, name)
    return model


def moe_block(
    name: str,
    experts_implementation: str = "grouped_mm",
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """Return one MoE block [B, S, H] -> [B, S, H] (a tuple for gpt_oss): router and experts."""
    return moe_blocks(causal_lm(name, experts_implementation, dtype))[-1]


def moe_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules of `model` that own an experts module, in order."""
    return [m for m in model.modules() if _is_experts(getattr(m, "experts", None))]


def num_moe_layers(model: nn.Module) -> int:
    """Return how many MoE layers one forward of `model` runs through."""
    return len(moe_blocks(model))


def input_ids(batch: int = 2, seq: int = 12, seed: int = 0) -> Tensor:
    """Return token ids [B, S] clear of the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, seq), generator=generator)


def hidden_states(
    name: str,
    batch: int = 2,
    seq: int = 12,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return input [B, S, H] for `moe_block(name)` with planted routing."""
    top_k = _SPECIFIC[name]["num_experts_per_tok"]
    ids_TA = routing.spread_ids(batch * seq, NUM_EXPERTS, top_k, seed, _ROUTING_GROUPS.get(name, 1))
    x_TH = routing.planted_tokens(ids_TA, NUM_EXPERTS, HIDDEN, seed)
    return x_TH.to(dtype).view(batch, seq, HIDDEN)


def _is_experts(module: object) -> bool:
    return isinstance(module, nn.Module) and hasattr(module, "down_proj")


def _router_of(block: nn.Module) -> nn.Module:
    return block.gate if hasattr(block, "gate") else block.router


@torch.no_grad()
def _reset_parameters(model: nn.Module, name: str) -> None:
    """Give the experts weight in the output and the router a clear choice.

    transformers' own std of 0.02 leaves the experts a thousandth of the residual stream, where no
    test would see them.
    """
    generator = torch.Generator().manual_seed(5)
    for block in moe_blocks(model):
        experts = block.experts
        transposed = getattr(experts, "is_transposed", False)
        for parameter_name, parameter in experts.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if parameter_name.endswith("bias"):
                # gpt_oss clamps at 7: only pre-activations this wide ever reach the clamp
                value *= 3.0 if parameter_name.startswith("gate_up") else 0.5
            else:
                value /= parameter.shape[1 if transposed else 2] ** 0.5
                if name == "gpt_oss" and parameter_name == "down_proj":
                    value *= 0.25  # its wide activations would outweigh the planted routing
            parameter.copy_(value)
        _router_of(block).weight.copy_(routing.router_rows(NUM_EXPERTS, HIDDEN))
    top_k = _SPECIFIC[name]["num_experts_per_tok"]
    ids_VA = routing.spread_ids(VOCAB, NUM_EXPERTS, top_k, 3, _ROUTING_GROUPS.get(name, 1))
    embedding_VH = 4.0 * routing.planted_tokens(ids_VA, NUM_EXPERTS, HIDDEN, 3)
    model.get_input_embeddings().weight.copy_(embedding_VH)
