"""The layers of real models for GPUs that are not there, and what their small kernels may take.

The weights are "meta" tensors: the compiler asks for their dtypes, sizes and alignment, never for
their values, and DeepSeek-V3's take 22 GB a layer.
"""

from __future__ import annotations

import dataclasses

import torch
from cross_compile import Compiled
from torch import Tensor

from comet_compile.kernels.activation import Activation
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.plan import Device, Plan, choose_plan
from comet_compile.kernels.portable import Routed

DEVICES = {
    80: Device(num_sms=108, shared_bytes=166912, capability=(8, 0)),
    89: Device(num_sms=128, shared_bytes=101376, capability=(8, 9)),
    90: Device(num_sms=132, shared_bytes=232448, capability=(9, 0)),
    100: Device(num_sms=148, shared_bytes=232448, capability=(10, 0)),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of a layer, and how its checkpoint stores the experts."""

    hidden: int
    inter: int
    num_experts: int
    top_k: int
    activation: str = "silu_glu"
    k_contiguous: bool = True
    biases: bool = False
    weight_place: str = "after"
    save: bool = False  # the rows in front of the activation


GPT_OSS = Model(
    hidden=2880,
    inter=2880,
    num_experts=32,
    top_k=4,
    activation="swiglu_oai:interleaved:alpha=1.702:limit=7.0",
    k_contiguous=False,
    biases=True,
)
MODELS = {
    "qwen3_30b": Model(2048, 768, 128, 8),
    "mixtral": Model(4096, 14336, 8, 2),
    "deepseek_v3": Model(7168, 2048, 256, 8),
    "gpt_oss": GPT_OSS,
    "gpt_oss_training": dataclasses.replace(GPT_OSS, save=True),
    # the modes of layer0 that none of them uses
    "halves_n_contiguous": Model(2048, 768, 128, 8, k_contiguous=False, biases=True, save=True),
    "interleaved_k_contiguous": Model(
        2048, 768, 128, 8, "silu_glu:interleaved", weight_place="between"
    ),
    "plain": Model(2048, 768, 128, 8, "relu2", biases=True, weight_place="before", save=True),
    "plain_n_contiguous": Model(2048, 768, 128, 8, "gelu", k_contiguous=False),
}

# The most registers that kernels took whose use does not depend on the model's size.
REGISTERS_BY_KERNEL = {
    "count_slots": 47,
    "place_slots": 128,
    "sum_slots": 48,
    "grad_scores": 40,
    "dot_tokens": 52,
    "gather_rows": 44,
    "grad_bias": 66,
    "publish_tokens": 40,
    "receive_routing": 32,
    "order_tiles": 128,
    "sum_own": 64,
}
# Bytes of stack that the tables' kernels take with one of the two versions of triton.
TABLES_BYTES = {"place_slots": 8, "order_tiles": 8}


@dataclasses.dataclass(frozen=True)
class Layer:
    """The arguments of a call without values."""

    routed: Routed
    params: ExpertParams
    math: LayerMath

    @classmethod
    def of(cls, model: Model, num_tokens: int, *, num_ranks: int = 1, biases: bool) -> Layer:
        """One rank's part of the model's layer."""
        num_experts = model.num_experts // num_ranks

        def weight(k: int, n: int) -> Tensor:
            if model.k_contiguous:
                return empty(num_experts, n, k).transpose(1, 2)
            return empty(num_experts, k, n)

        def bias(n: int) -> Tensor | None:
            return empty(num_experts, n) if biases else None

        act = Activation.parse(model.activation)
        columns = 2 * model.inter if act.gated else model.inter
        params = ExpertParams(
            weight(model.hidden, columns), None, weight(model.inter, model.hidden),
            bias(columns), None, bias(model.hidden),
        )  # fmt: skip
        routed = Routed(
            empty(num_tokens, model.hidden),
            empty(num_tokens, model.top_k, dtype=torch.int64),
            empty(num_tokens, model.top_k, dtype=torch.float32),
        )
        return cls(routed, params, LayerMath(act, model.weight_place, torch.float32))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def plan_of(capability: int, model: Model, num_tokens: int) -> Plan:
    act = Activation.parse(model.activation)
    return choose_plan(
        num_tokens * model.top_k,
        model.num_experts,
        model.hidden,
        model.inter,
        gated=act.gated,
        interleaved=act.interleaved,
        device=DEVICES[capability],
    )


def assert_within(
    compiled: list[Compiled], capability: int, ceilings: dict[str, int], spilled: dict[str, int]
) -> None:
    """Assert that no kernel takes more registers, spills or shared memory than allowed."""
    for kernel in compiled:
        name = kernel.name.removesuffix("_kernel")
        assert kernel.spilled_bytes <= {**TABLES_BYTES, **spilled}.get(name, 0), kernel
        assert kernel.registers <= ceilings[name], kernel
        assert kernel.shared_bytes <= DEVICES[capability].shared_bytes, kernel
