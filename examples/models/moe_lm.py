"""What train_lm.py trains: Hugging Face's Qwen3-MoE, on the bytes of Python's own reference.

In one process the model is as Hugging Face wrote it. In several, `ExpertParallelMoE` replaces its
routed layers and spreads the experts over the processes by all-to-all. Neither knows of
comet_compile.

Names end in their dimensions: B sequences of C bytes, T = B * C tokens, A experts per token,
S = T * A slots, R rows received, E experts, L of them local, P processes, H features, I of an
expert's inner ones, N = 2 * I columns of gate and up together.
"""

from __future__ import annotations

import dataclasses
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.nn import functional as F

VOCABULARY = 256  # one token per byte
INITIAL_SCALE = 0.02  # that of Qwen3-MoE


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the model is, and the batches that it is trained on."""

    num_layers: int
    hidden: int
    inner: int
    num_experts: int
    top_k: int
    sequences: int  # per process and step
    characters: int
    learning_rate: float


SIZES = {
    "cpu": Size(2, 64, 32, 8, 2, sequences=8, characters=64, learning_rate=3e-3),
    "cuda": Size(4, 512, 256, 16, 4, sequences=16, characters=256, learning_rate=1e-3),
}


class ExpertParallelMoE(nn.Module):
    """A routed layer that keeps E / P experts in each process, in plain torch.distributed."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.group, self.top_k = dist.group.WORLD, size.top_k
        self.num_ranks = dist.get_world_size()
        self.num_local = size.num_experts // self.num_ranks
        self.gate = nn.Linear(size.hidden, size.num_experts, bias=False)
        # every process draws all experts and keeps its own: the model is the same for any P
        own = slice(dist.get_rank() * self.num_local, (dist.get_rank() + 1) * self.num_local)
        w_in_EHN = INITIAL_SCALE * torch.randn(size.num_experts, size.hidden, 2 * size.inner)
        w_out_EIH = INITIAL_SCALE * torch.randn(size.num_experts, size.inner, size.hidden)
        self.w_in_LHN, self.w_out_LIH = nn.Parameter(w_in_EHN[own]), nn.Parameter(w_out_EIH[own])

    def forward(self, x_BCH: Tensor) -> Tensor:
        x_TH = x_BCH.flatten(0, 1)
        weights_TA, ids_TA = self.gate(x_TH).float().softmax(-1).topk(self.top_k)
        weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
        ids_S = ids_TA.view(-1)

        # dispatch: one row per slot, sorted by expert and hence by the process that has it
        order_S = ids_S.argsort(stable=True)
        counts_E = ids_S.new_zeros(self.num_ranks * self.num_local)
        counts_PL = counts_E.scatter_add(0, ids_S, torch.ones_like(ids_S)).view(self.num_ranks, -1)
        received_PL = all_to_all_single(counts_PL, None, None, self.group)
        send, recv = counts_PL.sum(1).tolist(), received_PL.sum(1).tolist()
        # Dynamo traces grouped_mm in bfloat16 only: experts are in it, whatever the rest is
        x_SH = x_TH.bfloat16()[order_S // self.top_k]
        x_RH = all_to_all_single_autograd(x_SH, recv, send, self.group)

        # experts: rows came process by process, the grouped GEMM wants them expert by expert
        local_ids_L = torch.arange(self.num_local, device=x_TH.device)
        local_ids_R = local_ids_L.repeat(self.num_ranks).repeat_interleave(
            received_PL.view(-1), output_size=sum(recv)
        )
        by_expert_R = local_ids_R.argsort(stable=True)
        offs_L = received_PL.sum(0).cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(x_RH[by_expert_R], self.w_in_LHN, offs=offs_L).chunk(2, -1)
        y_RH = F.grouped_mm(F.silu(gate) * up, self.w_out_LIH, offs=offs_L)

        # combine: back the same way, then the weighted sum over each token's experts
        y_RH = y_RH[by_expert_R.argsort()]
        y_SH = all_to_all_single_autograd(y_RH, send, recv, self.group)
        y_TAH = y_SH[order_S.argsort()].view(*ids_TA.shape, -1)
        return (y_TAH * weights_TA.unsqueeze(-1)).sum(1).to(x_BCH.dtype).view_as(x_BCH)


def make_model(size: Size, seed: int) -> nn.Module:
    """Return the model with the weights of the seed."""
    torch.manual_seed(seed)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        num_hidden_layers=size.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=size.hidden // 4,
        num_experts=size.num_experts,
        num_experts_per_tok=size.top_k,
        moe_intermediate_size=size.inner,
        norm_topk_prob=True,
        initializer_range=INITIAL_SCALE,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    if dist.get_world_size() > 1:
        for layer in model.model.layers:
            layer.mlp = ExpertParallelMoE(size)
    return model


def is_of_experts(weight: Tensor) -> bool:
    """Return whether the weight is [experts, ...]: no other one has three dimensions."""
    return weight.ndim == 3


def dtype_of(weight: Tensor) -> torch.dtype:
    """Return what the model computes in: float32, where drift is least, if that can be compiled."""
    # before transformers 5.23, Inductor cannot train float32 experts
    old = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
    spread = is_of_experts(weight) and dist.get_world_size() > 1
    return torch.bfloat16 if weight.is_cuda or old or spread else torch.float32


def read_text(held_out: bool) -> bytes:
    """Return Python's reference without every tenth topic, or these topics."""
    names = sorted(topics)
    chosen = [name for i, name in enumerate(names) if (i % 10 == 0) == held_out]
    return "".join(topics[name] for name in chosen).encode()


def make_batches(text: bytes, number: int, size: Size, device: torch.device) -> list[Tensor]:
    """Return this process's own batches of the text, int64 [B, C] each."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    windows = torch.tensor(list(text)).unfold(0, size.characters, 1)
    picks = torch.randint(len(windows), (number, size.sequences), generator=generator)
    return [windows[rows].to(device) for rows in picks]


def average(value: Tensor) -> Tensor:
    """Return the mean of `value` over the processes."""
    dist.all_reduce(value)
    return value / dist.get_world_size()


def loss_of(model: nn.Module, tokens_BC: Tensor) -> Tensor:
    """Return the mean loss of the next bytes, in nats."""
    logits = model(tokens_BC).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BC[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Tensor]) -> float:
    """Return the mean loss of the batches of all processes."""
    return average(torch.stack([loss_of(model, tokens) for tokens in batches]).mean()).item()
