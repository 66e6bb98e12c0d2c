"""Hugging Face expert parallelism by router mask and all-reduce, from a small config.

Every rank of the group holds the same tokens and runs its own experts on them; an all-reduce sums
the partial outputs. transformers 5.17 knows only this form, 5.19 and newer call it "all_reduce".
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from zoo import hf

NAMES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


def causal_lm(
    name: str, ep_implementation: str = "all_reduce", dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Return the model of `hf.causal_lm(name)` with its experts split over all ranks.

    Call it on every rank, after init_process_group. The weights are those of `hf.causal_lm`, so
    that model is the reference.
    """
    import transformers
    from transformers.distributed import DistributedConfig

    # transformers derives the device of a rank from the launcher's variables
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    os.environ.setdefault("RANK", str(dist.get_rank()))
    os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
    size = dist.get_world_size()
    if hasattr(DistributedConfig, "ep_implementation"):
        distributed = DistributedConfig(
            tp_size=size, ep_size=size, ep_implementation=ep_implementation
        )
    else:
        distributed = DistributedConfig(tp_size=size, enable_expert_parallel=True)
    with _saved_on_rank_zero(hf.causal_lm(name, dtype=dtype)) as folder:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            experts_implementation="grouped_mm",
            distributed_config=distributed,
        )


def moe_block(name: str, ep_implementation: str = "all_reduce") -> nn.Module:
    """Return the MoE block of `hf.moe_block(name)`, its experts split over all ranks."""
    return hf.moe_blocks(causal_lm(name, ep_implementation))[-1]


@contextlib.contextmanager
def _saved_on_rank_zero(model: nn.Module) -> Iterator[str]:
    """Save `model` once (save_pretrained writes on rank 0 only) and give every rank the folder."""
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        model.save_pretrained(shared[0])
        dist.barrier()
        yield shared[0]
        dist.barrier()
