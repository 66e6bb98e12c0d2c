"""Expert parallelism of transformers that compiles into one graph: ``ep_implementation="comet"``.

    import comet_compile.huggingface

    config = DistributedConfig(ep_size=8, ep_implementation="comet")
    model = AutoModelForCausalLM.from_pretrained(..., distributed_config=config)
    model = torch.compile(model, backend="comet")

Importing this module registers the name. It stands for what transformers does itself (the same
numbers, eager too), chosen and written so that nothing breaks the graph: ranks that hold the same
tokens mask and all-reduce, in training as in inference; ranks that hold their own exchange them by
two all-to-alls, without the branch on an empty batch that transformers' ``"all_to_all"`` takes in
Python. It needs a transformers that has such implementations and is tested with 5.23.0; with older
ones, which know one form only, that is rewritten as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from transformers.distributed.expert_parallel import (
        AllReduceEP,
        AllToAllEP,
        EPImplementation,
        EPImplementationInterface,
    )
except ImportError as error:
    raise ImportError(
        "comet_compile.huggingface needs a transformers with DistributedConfig.ep_implementation, "
        "such as 5.23; what older ones do for expert parallelism is rewritten without it"
    ) from error

__all__ = ["CometEP"]

if not (hasattr(AllToAllEP, "_dispatch_tokens") and hasattr(AllToAllEP, "_combine_tokens")):
    raise ImportError(
        "comet_compile.huggingface needs transformers' AllToAllEP as in 5.23, in two halves; this "
        "version's is written otherwise"
    )


class _OneGraphAllToAll(AllToAllEP):
    """`AllToAllEP` whose rows may be none while compiling."""

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().__call__(hidden_states, top_k_index, top_k_weights)
        rows, ids, weights, state = self._dispatch_tokens(hidden_states, top_k_index, top_k_weights)
        return self._combine_tokens(self.experts_forward(rows, ids, weights), state)


class CometEP(EPImplementation):
    """How the experts get their tokens under ``ep_implementation="comet"``."""

    def __init__(self, experts: torch.nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        way = AllReduceEP if self.shares_batch else _OneGraphAllToAll
        self._way = way(experts, ep_mesh, tp_mesh)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return [T, H] for this rank's tokens [T, H], expert ids and weights [T, A]."""
        return self._way(hidden_states, top_k_index, top_k_weights)


EPImplementationInterface.register("comet", CometEP)
