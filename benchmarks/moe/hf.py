"""Suites "block", "model" and "ep-hf": Hugging Face's MoE block, and language models around it."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_bench import layers
from moe_bench.errors import ErrorSums, layer_errors
from moe_bench.local import why_portable
from moe_bench.shapes import Case
from moe_bench.workload import Workload

VOCABULARY = 1024


def config(case: Case) -> Any:
    """Return the Hugging Face configuration: the model's own layers, few, small vocabulary."""
    import transformers

    shape = case.shape
    wide = shape.hidden >= 1024
    heads, head_dim = (shape.hidden // 64, 128) if wide else (2, 32)
    common = {
        "vocab_size": VOCABULARY if wide else 64,
        "hidden_size": shape.hidden,
        "num_hidden_layers": case.num_layers,
        "max_position_embeddings": 32768,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": False,
    }
    if shape.family == "qwen3_moe":
        own = {
            "moe_intermediate_size": shape.inter,
            "intermediate_size": shape.inter,
            "norm_topk_prob": True,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 8),
            "head_dim": head_dim,
        }
    elif shape.family == "olmoe":
        heads = shape.hidden // head_dim
        own = {
            "intermediate_size": shape.inter,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
        }
    else:
        raise ValueError(f"no Hugging Face configuration for {shape.name} ({shape.family!r})")
    return transformers.AutoConfig.for_model(shape.family, **common, **own)


def causal_lm(
    case: Case,
    device: torch.device,
    dtype: torch.dtype = layers.DTYPE,
    implementation: str = "grouped_mm",
) -> nn.Module:
    """Return the model, with experts and routers scaled 1/sqrt(fan-in)."""
    import transformers

    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config(case), dtype=dtype, experts_implementation=implementation
        )
    blocks = moe_blocks(model)
    with torch.no_grad():
        for number, block in enumerate(blocks):
            generator = layers.seeded(device, 50 + number)
            block.gate.weight.normal_(std=case.shape.hidden**-0.5, generator=generator)
            for name, scale in (
                ("gate_up_proj", case.shape.hidden**-0.5),
                ("down_proj", case.shape.inter**-0.5),
            ):
                getattr(block.experts, name).normal_(std=scale, generator=generator)
    return model


def moe_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules of `model` that own routed experts, in order."""
    return [m for m in model.modules() if hasattr(getattr(m, "experts", None), "down_proj")]


def block_workloads(case: Case, device: torch.device) -> list[Workload]:
    """Return the workloads of one block (router and experts), forward."""
    block = moe_blocks(causal_lm(case, device))[0]
    x_TH = layers.draw_tokens(case.shape, case.tokens, device, 0)
    x = x_TH.view(case.batch, case.seq, case.shape.hidden)
    with torch.no_grad():
        weights, ids = routing_of(block, x_TH)
    w_in, w_out = block.experts.gate_up_proj, block.experts.down_proj
    order_S = torch.sort(ids.reshape(-1))[1]

    def errors(out: Tensor) -> dict[str, float]:
        # eager's routing: what the experts make of it is compared, not the router's near ties
        return layer_errors(
            x_TH,
            ids,
            weights,
            range(case.shape.num_experts),
            lambda expert: (w_in[expert], w_out[expert]),
            {"y": out.reshape(x_TH.shape)},
        )

    return [
        Workload(
            case=case,
            mode="forward",
            layer=lambda x: block(x),
            inputs=(x,),
            leaves=[],
            errors=errors,
            functions={"gemms": layers.BareGemms(w_in, w_out, ids)},
            inputs_of={"gemms": (x_TH[order_S // case.shape.top_k],)},
            flops=case.shape.forward_flops(case.tokens),
            why_portable=lambda: why_portable(x_TH, ids, weights, w_in, w_out),
        )
    ]


def routing_of(block: nn.Module, x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Return the router's weights [T, A] and ids [T, A]."""
    found = block.gate(x_TH)
    ids = next(t for t in found if not t.is_floating_point())
    weights = next(t for t in found if t.is_floating_point() and t.shape == ids.shape)
    return weights, ids


class Loss(nn.Module):
    """The model called with token ids: logits [B, S, V], or the training loss."""

    def __init__(self, model: nn.Module, train: bool) -> None:
        super().__init__()
        self.model, self.train_step = model, train

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, S] -> [B, S, V] or []."""
        if self.train_step:
            return self.model(input_ids, labels=input_ids, use_cache=False).loss
        return self.model(input_ids, use_cache=False).logits


def model_workloads(case: Case, device: torch.device) -> list[Workload]:
    """Return the workloads of a whole model; a training step is forward, loss and backward."""
    model = causal_lm(case, device)
    wide = widened(copy.deepcopy(model))
    return [model_workload(case, mode, model, wide, device) for mode in case.modes]


def expert_parallel_workloads(
    case: Case, device: torch.device, group: dist.ProcessGroup
) -> list[Workload]:
    """Return the workloads of a model whose experts are split by transformers.

    The form of transformers 5.17: every rank has all tokens, masks the ids of others' experts
    and the partial outputs are summed by an all-reduce.
    """
    model = causal_lm(case, device)
    split = split_experts(model, device, group)
    wide = widened(model)
    return [model_workload(case, mode, split, wide, device) for mode in case.modes]


def widened(model: nn.Module) -> nn.Module:
    """Turn `model` into its float32 reference: one product per expert."""
    model.float().set_experts_implementation("eager")
    return model


def split_experts(model: nn.Module, device: torch.device, group: dist.ProcessGroup) -> nn.Module:
    """Return `model` with its experts split over the ranks, by way of a saved copy."""
    import transformers
    from transformers.distributed import DistributedConfig

    size = dist.get_world_size(group)
    if hasattr(DistributedConfig, "ep_implementation"):  # newer than 5.17
        distributed = DistributedConfig(tp_size=size, ep_size=size, ep_implementation="all_reduce")
    else:
        distributed = DistributedConfig(tp_size=size, enable_expert_parallel=True)
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0, group=group)
        model.save_pretrained(shared[0])  # writes on rank 0 only
        dist.barrier(group)
        split = transformers.AutoModelForCausalLM.from_pretrained(
            shared[0],
            dtype=layers.DTYPE,
            experts_implementation="grouped_mm",
            distributed_config=distributed,
        )
        dist.barrier(group)
    return split.to(device).train(model.training)


def model_workload(
    case: Case, mode: str, model: nn.Module, wide: nn.Module, device: torch.device
) -> Workload:
    """Return one mode of a model, with its float32 copy `wide` as the reference."""
    generator = layers.seeded(device, 30)
    size = (case.batch, case.seq)
    ids = torch.randint(3, model.config.vocab_size, size, generator=generator, device=device)
    train = mode == "train"
    reference = Loss(wide, train)

    def errors(out: Tensor) -> dict[str, float]:
        sums = ErrorSums()
        with torch.set_grad_enabled(train):
            ref = reference(ids)
        sums.add("loss" if train else "logits", out, ref.detach())
        if train:
            ref.backward()
            for ours, theirs in zip(model.parameters(), wide.parameters(), strict=True):
                sums.add("gradients", *_same_part(ours.grad, theirs.grad))
                theirs.grad = None
        return sums.relative()

    return Workload(
        case=case,
        mode=mode,
        host_splits=case.suite == "ep-hf",  # NCCL inside: captured only if comet fused all
        layer=Loss(model, train),
        inputs=(ids,),
        leaves=list(model.parameters()),
        errors=errors,
    )


def _same_part(ours: Any, theirs: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return a gradient and its reference, which is cut to this rank's experts if need be."""
    if hasattr(ours, "full_tensor"):
        ours = ours.full_tensor()
    if ours is not None and ours.shape != theirs.shape:
        theirs = theirs.chunk(dist.get_world_size())[dist.get_rank()]
    return ours, theirs
