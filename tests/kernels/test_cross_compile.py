"""Every fused kernel at the shapes of real models, compiled for GPUs that are not there.

A spill, a tile that does not fit into shared memory, or an instruction that one architecture lacks
shows here without a GPU.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from compiled_models import (
    DEVICES,
    MODELS,
    REGISTERS_BY_KERNEL,
    TABLES_BYTES,
    Layer,
    Model,
    assert_within,
    empty,
    plan_of,
)
from conftest import SLOW
from cross_compile import Compiled, compiling_for
from exchange_ranks import LocalWorkspace

from comet_compile.kernels import (
    exchange_call,
    exchange_entry,
    exchange_plan,
    fused,
    fused_backward,
    fused_replicated,
    grouped_float,
)
from comet_compile.kernels.experts import Matrices, Needs
from comet_compile.kernels.fused_exchange import BackwardCall
from comet_compile.kernels.workspace import Layout, ReduceLayout

# The most registers that (layer0, layer1) took with triton 3.6.0 and 3.9.0.
REGISTERS = {
    (90, "qwen3_30b", 64): (80, 70),
    (90, "qwen3_30b", 512): (80, 70),
    (90, "qwen3_30b", 8192): (168, 157),
    (90, "mixtral", 64): (80, 50),
    (90, "mixtral", 512): (168, 96),
    (90, "mixtral", 8192): (168, 157),
    (90, "deepseek_v3", 8192): (168, 157),
    (90, "gpt_oss", 64): (126, 88),
    (90, "gpt_oss", 512): (254, 246),
    (90, "gpt_oss", 8192): (250, 210),
    (90, "halves_n_contiguous", 8192): (255, 214),
    (90, "interleaved_k_contiguous", 8192): (172, 157),
    (90, "plain", 8192): (252, 214),
    (90, "plain_n_contiguous", 8192): (196, 157),
    (90, "gpt_oss_training", 8192): (255, 214),
    (80, "qwen3_30b", 64): (230, 227),
    (80, "qwen3_30b", 8192): (255, 255),
    (80, "gpt_oss", 8192): (255, 255),
    (89, "qwen3_30b", 64): (230, 255),
    (89, "qwen3_30b", 8192): (255, 255),
    (100, "qwen3_30b", 64): (108, 84),
    (100, "qwen3_30b", 8192): (175, 155),
    (100, "gpt_oss", 8192): (255, 182),
}
# What these take besides does not depend on the model's size.
OTHER_REGISTERS = {"count": 47, "place": 128, "sum": 48}
# Their kernels are compiled with the newest Triton in other modes or for other devices.
WITH_ONE_TRITON = {
    (90, "halves_n_contiguous", 8192),
    (90, "gpt_oss", 8192),
    (80, "qwen3_30b", 512),
    (100, "gpt_oss", 8192),
}
# The same of the forward: other models or devices in the table have their tiles.
FORWARDS_WITH_ONE_TRITON = {
    (90, "deepseek_v3", 8192),
    (89, "qwen3_30b", 64),
    (100, "gpt_oss", 8192),
}
# Where the tiles of `choose_plan`, sized for inference, are too large for the registers.
KNOWN_SPILLS = {
    (90, "gpt_oss_training", 8192),
    (100, "gpt_oss", 8192),
}


# The routing's table takes 5 seconds to compile, a third of the time of all tests here, for each
# number of experts and slots; the others are compiled with one of the two versions of triton.
TABLE = "place_slots_kernel"
TABLES_WITH_BOTH_TRITONS = {
    (90, "qwen3_30b", 64),
    (90, "qwen3_30b", 8192),
    (90, "mixtral", 64),
    (90, "gpt_oss", 512),
    (80, "qwen3_30b", 64),
    (100, "qwen3_30b", 8192),
}
# The same of the exchange, whose ids are int32.
EXCHANGE_TABLES_WITH_BOTH_TRITONS = {(90, "qwen3_30b", 4096), (80, "qwen3_30b", 512)}
ALL_TABLES = bool(os.environ.get(SLOW))


# The same of (grad_hidden, gemm_rows, grad_weight) in the backward, whose plan is the forward's.
BACKWARD_REGISTERS = {
    (90, "qwen3_30b", 512): (80, 76, 164),
    (90, "qwen3_30b", 8192): (255, 157, 176),
    (90, "halves_n_contiguous", 8192): (255, 157, 176),
    (90, "interleaved_k_contiguous", 8192): (255, 157, 176),
    (90, "gpt_oss", 8192): (255, 157, 175),
    (90, "plain", 8192): (193, 157, 176),
    (80, "qwen3_30b", 512): (255, 255, 255),
    (80, "qwen3_30b", 8192): (255, 255, 255),
    (89, "qwen3_30b", 8192): (255, 255, 255),
    (100, "qwen3_30b", 8192): (184, 155, 152),
    (100, "gpt_oss", 8192): (255, 155, 148),
}
# And of (dispatch_gemm_act, gemm_combine) in the exchange of two ranks.
EXCHANGE_REGISTERS = {
    (90, "qwen3_30b", 64): (106, 80),
    (90, "qwen3_30b", 4096): (255, 222),
    (90, "gpt_oss", 4096): (245, 172),
    (80, "qwen3_30b", 512): (255, 255),
    (100, "qwen3_30b", 4096): (175, 198),
}
# And of gemm_all_reduce, the same tokens on two ranks.
ALL_REDUCE_REGISTERS = {
    (90, "qwen3_30b", 4096): 246,
    (90, "mixtral", 4096): 184,
    (90, "gpt_oss", 4096): 194,
    (80, "qwen3_30b", 4096): 255,
    (100, "qwen3_30b", 4096): 220,
}
# Bytes of stack that a GEMM of old devices takes with one of the two versions of triton.
OLD_DEVICE_BYTES = 8
# Bytes that grad_hidden spills with one of the two versions of triton.
SPILLED_BYTES = {
    (90, "qwen3_30b", 8192): 24,  # 3.9.0; 256 columns are 15 % faster than 128
    (90, "halves_n_contiguous", 8192): 24,  # 3.9.0
    (80, "qwen3_30b", 8192): 8,
    (89, "qwen3_30b", 8192): 8,
    (90, "interleaved_k_contiguous", 8192): 32,  # 3.9.0
    (90, "gpt_oss", 8192): 48,  # 3.9.0
    (100, "gpt_oss", 8192): 64,  # 3.9.0
    (100, "qwen3_30b", 8192): 8,  # 3.6.0
}


def compile_layer(
    capability: int, model: Model, num_tokens: int, but: Collection[str] = ()
) -> list[Compiled]:
    """Compile what `local_forward` launches, with the plan of that size."""
    layer = Layer.of(model, num_tokens, biases=model.biases)
    plan = plan_of(capability, model, num_tokens)
    with compiling_for(capability, but=but) as compiled:
        fused.local_forward(
            layer.routed, layer.params, layer.math, torch.bfloat16, save=model.save, plan=plan
        )
    return compiled


def compile_backward(
    capability: int, model: Model, num_tokens: int, only: Collection[str] = ()
) -> list[Compiled]:
    """Compile what `local_backward` launches for all gradients, but for the forward's table."""
    layer = Layer.of(model, num_tokens, biases=model.biases)
    plan = plan_of(capability, model, num_tokens)
    saved = empty(num_tokens * model.top_k, layer.params.w_in.shape[2])
    grad_y = empty(num_tokens, model.hidden)
    with compiling_for(capability, only, but=[TABLE]) as compiled:
        fused_backward.local_backward(
            grad_y, layer.routed, saved, layer.params, layer.math, Needs(), plan
        )
    return compiled


def compile_exchange(
    capability: int,
    model: Model,
    num_tokens: int,
    but: Collection[str] = (),
    *,
    traced: bool = False,
) -> list[Compiled]:
    """Compile what a rank of two launches for at most `num_tokens` tokens."""
    layer = Layer.of(model, num_tokens, num_ranks=2, biases=model.biases)
    args = layer.params, layer.math
    capacity = exchange_plan.capacity_for([num_tokens])
    plan = exchange_plan.plan_exchange(*args, model.top_k, capacity, 2, 0)
    layout = Layout.of(capacity, model.top_k, model.hidden, 2, 2)
    workspace = LocalWorkspace(layout.num_bytes, 0, 2, "meta")
    if traced:
        workspace.trace = empty(1000, dtype=torch.int64)
    call = exchange_call.ExchangeCall(layer.routed, *args, plan, workspace, 60.0)
    with compiling_for(capability, but=but) as compiled:
        call.publish()
        call.receive()
        call.sum_own(call.combine(call.compute_hidden()), empty(num_tokens, model.hidden))
    return compiled


def compile_exchange_backward(capability: int, model: Model, num_tokens: int) -> list[Compiled]:
    """Compile what a rank of two launches for all gradients, gate and up in two tensors, but for
    the forward's table."""
    layer = Layer.of(model, num_tokens, num_ranks=2, biases=False)
    num_experts = layer.params.num_experts
    pair = empty(2, num_experts, model.inter, model.hidden).transpose(2, 3)
    params = dataclasses.replace(layer.params, w_in=pair[0], w_up=pair[1])
    capacity = exchange_plan.capacity_for([num_tokens])
    plan = exchange_plan.plan_exchange(params, layer.math, model.top_k, capacity, 2, 0)
    layout = Layout.of(capacity, model.top_k, model.hidden, 2, 2, backward=True)
    workspace = LocalWorkspace(layout.num_bytes, 0, 2, "meta")
    grad_y = empty(num_tokens, model.hidden)
    call = BackwardCall(grad_y, layer.routed, params, layer.math, Needs(), plan, workspace, 60.0)
    with compiling_for(capability, but=[TABLE]) as compiled:
        call.publish()
        call.receive()
        call.compute()
        call.finish()
    return compiled


@pytest.mark.parametrize(
    ("capability", "name", "num_tokens"),
    [
        pytest.param(
            *case,
            marks=[pytest.mark.xfail(raises=AssertionError, reason="spills")]
            * (case in KNOWN_SPILLS)
            + [pytest.mark.slow] * (case in FORWARDS_WITH_ONE_TRITON),
        )
        for case in REGISTERS
    ],
)
def test_compiles_without_a_spill(capability: int, name: str, num_tokens: int) -> None:
    with_table = ALL_TABLES or (capability, name, num_tokens) in TABLES_WITH_BOTH_TRITONS
    but = [] if with_table else [TABLE]
    compiled = compile_layer(capability, MODELS[name], num_tokens, but)
    layer0, layer1 = REGISTERS[capability, name, num_tokens]
    ceilings = {**OTHER_REGISTERS, "gather": layer0, "gemm": layer1}
    seen = set()
    for kernel in compiled:
        stem = kernel.name.split("_")[0]
        seen.add(stem)
        allowed = TABLES_BYTES["place_slots"] if stem == "place" else 0
        if stem == "gemm" and capability < 90:
            allowed = OLD_DEVICE_BYTES
        assert kernel.spilled_bytes <= allowed, kernel
        assert kernel.registers <= ceilings[stem], kernel
        assert kernel.shared_bytes <= DEVICES[capability].shared_bytes, kernel
    assert seen >= {"gather", "gemm", "sum"}
    assert ("place" in seen) == with_table
    assert ("count" in seen) == (num_tokens * MODELS[name].top_k > 512)


@pytest.mark.parametrize(
    ("capability", "name", "num_tokens"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case in WITH_ONE_TRITON else [])
        for case in BACKWARD_REGISTERS
    ],
)
def test_backward_compiles_without_a_spill(capability: int, name: str, num_tokens: int) -> None:
    model = MODELS[name]
    compiled = compile_backward(capability, model, num_tokens)
    gemms = ("grad_hidden", "gemm_rows", "grad_weight")
    registers = BACKWARD_REGISTERS[capability, name, num_tokens]
    assert {kernel.name.removesuffix("_kernel") for kernel in compiled} == {
        *("count_slots", "gather_rows", "grad_scores", "sum_slots"), *gemms, *row_sums_of(model),
    }  # fmt: skip
    assert_within(
        compiled,
        capability,
        {**REGISTERS_BY_KERNEL, **dict(zip(gemms, registers, strict=True))},
        {"grad_hidden": SPILLED_BYTES.get((capability, name, num_tokens), 0)},
    )


@pytest.mark.parametrize("k_contiguous", [True, False])
def test_weight_gradients_that_are_added_compile_without_a_spill(k_contiguous: bool) -> None:
    model = dataclasses.replace(MODELS["qwen3_30b"], k_contiguous=k_contiguous)
    layer = Layer.of(model, 8192, biases=False)
    w_in, w_out = layer.params.w_in, layer.params.w_out
    into = Matrices(torch.empty_like(w_in), None, torch.empty_like(w_out), has_values=True)
    saved, grad_y = empty(8192 * 8, 2 * model.inter), empty(8192, model.hidden)
    args = layer.routed, saved, layer.params, layer.math, Needs(), plan_of(90, model, 8192), into
    with compiling_for(90, ["grad_weight_kernel"]) as compiled:
        fused_backward.local_backward(grad_y, *args)
    assert compiled
    assert_within(compiled, 90, {"grad_weight": 255}, {})


def row_sums_of(model: Model) -> set[str]:
    """What the backward launches for biases, and for weights that multiply before."""
    before = {"gather_rows", "dot_tokens"} if model.weight_place == "before" else set()
    after = {"dot_tokens"} if model.biases and model.weight_place == "after" else set()
    return before | after | ({"grad_bias"} if model.biases else set())


@pytest.mark.parametrize("name", ["gpt_oss", "plain"])
def test_row_sums_of_the_backward_compile_without_a_spill_on_sm_80(name: str) -> None:
    model = MODELS[name]
    sums = {f"{stem}_kernel" for stem in row_sums_of(model)}
    compiled = compile_backward(80, model, 64, sums)
    assert {kernel.name for kernel in compiled} == sums
    assert_within(compiled, 80, REGISTERS_BY_KERNEL, {})


@pytest.mark.parametrize(
    ("capability", "name", "num_tokens"),
    list(EXCHANGE_REGISTERS),
)
def test_exchange_compiles_without_a_spill(
    capability: int, name: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (exchange_plan, exchange_entry):
        monkeypatch.setattr(module, "read_device", lambda index: DEVICES[capability])
    with_table = ALL_TABLES or (capability, name, num_tokens) in EXCHANGE_TABLES_WITH_BOTH_TRITONS
    but = [] if with_table else [TABLE]
    compiled = compile_exchange(capability, MODELS[name], num_tokens, but)
    gemms = ("dispatch_gemm_act", "gemm_combine")
    registers = EXCHANGE_REGISTERS[capability, name, num_tokens]
    assert [kernel.name.removesuffix("_kernel") for kernel in compiled] == [
        "publish_tokens", "receive_routing", *["place_slots"] * with_table, "order_tiles", *gemms,
        "sum_own",
    ]  # fmt: skip
    assert_within(
        compiled,
        capability,
        {**REGISTERS_BY_KERNEL, **dict(zip(gemms, registers, strict=True))},
        {"dispatch_gemm_act": OLD_DEVICE_BYTES} if capability < 90 else {},
    )


def test_traced_exchange_compiles_without_a_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (exchange_plan, exchange_entry):
        monkeypatch.setattr(module, "read_device", lambda index: DEVICES[90])
    compiled = compile_exchange(90, MODELS["qwen3_30b"], 4096, [TABLE], traced=True)
    gemms = {"dispatch_gemm_act": 255, "gemm_combine": 255}
    ceilings = {**REGISTERS_BY_KERNEL, **gemms, "publish_tokens": 48, "sum_own": 72}
    assert_within(compiled, 90, ceilings, {})


@pytest.mark.parametrize(("capability", "num_tokens"), [(90, 64), (90, 8192), (100, 8192)])
def test_exchange_backward_compiles_without_a_spill(
    capability: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (exchange_plan, exchange_entry):
        monkeypatch.setattr(module, "read_device", lambda index: DEVICES[capability])
    compiled = compile_exchange_backward(capability, MODELS["qwen3_30b"], num_tokens)
    names = [kernel.name.removesuffix("_kernel") for kernel in compiled]
    assert {"push_scores", "sum_scores", "gemm_combine", "grad_hidden"} <= set(names)
    for kernel in compiled:
        name = kernel.name.removesuffix("_kernel")
        assert kernel.spilled_bytes <= {**TABLES_BYTES, "grad_hidden": 24}.get(name, 0), kernel
        assert kernel.shared_bytes <= DEVICES[capability].shared_bytes, kernel


@pytest.mark.parametrize(
    ("capability", "name", "num_tokens"),
    [
        pytest.param(*case, marks=[] if case[1] == "qwen3_30b" else pytest.mark.slow)
        for case in ALL_REDUCE_REGISTERS
    ],
)
def test_all_reduce_compiles_without_a_spill(
    capability: int, name: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_replicated, "read_device", lambda index: DEVICES[capability])
    model = MODELS[name]
    layer = Layer.of(model, num_tokens, num_ranks=2, biases=model.biases)
    layout = ReduceLayout.of(num_tokens, model.hidden, 2, 2)
    workspace = LocalWorkspace(layout.num_bytes, 0, 2, "meta")
    plan = plan_of(capability, model, num_tokens)
    with compiling_for(capability, ["gemm_all_reduce_kernel"]) as compiled:
        call = fused_replicated.ReplicatedCall(
            layer.routed, layer.params, layer.math, torch.bfloat16, plan, workspace, 60.0
        )
        call.reduce(0, call.num_steps)
    assert compiled
    ceiling = ALL_REDUCE_REGISTERS[capability, name, num_tokens]
    assert_within(compiled, capability, {"gemm_all_reduce": ceiling}, {})


@pytest.mark.parametrize(("capability", "tile"), [(80, 64), (90, 128), (100, 64)])
def test_float_products_compile_without_a_spill(
    capability: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_float, "largest_tile", lambda device: tile)
    rows = empty(32768, 2048, dtype=torch.float32)
    stack = empty(16, 2048, 1536, dtype=torch.float32)
    ends = torch.zeros(16, dtype=torch.int32)
    with compiling_for(capability) as kernels:
        for matrices in (stack, stack.transpose(1, 2).contiguous().transpose(1, 2)):
            grouped_float.multiply_rows(rows, matrices, ends)
            others = empty(32768, 1536, dtype=torch.float32)
            grouped_float.multiply_columns(rows, others, ends, matrices)
    assert len(kernels) == 4
    for kernel in kernels:
        assert kernel.spilled_bytes == 0, kernel


def test_targets_do_not_share_kernels() -> None:
    model = Model(64, 32, 4, 2)
    by_target = [compile_layer(capability, model, 16) for capability in (80, 90)]
    assert [k.name for k in by_target[0]] == [k.name for k in by_target[1]]
    assert by_target[0] != by_target[1]
