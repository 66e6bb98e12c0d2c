"""Whole models on a GPU: what is reported fused runs fused, in and out of CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from distributed.gloo import run_ranks
from e2e import harness
from numerics import assert_matches_ref
from torch import Tensor, nn
from torch._dynamo.utils import counters
from zoo import all_experts, capacity, ep, hf, loops, titan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def gradients(model: nn.Module, call: object, x: Tensor) -> dict[str, Tensor]:
    """The output and all gradients for a fixed gradient of the output."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = harness.first_tensor(call(x))  # type: ignore[operator]
    torch.manual_seed(3)
    y.backward(torch.randn(y.shape, device="cuda").to(y.dtype))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **found}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_training_runs_fused_both_ways(name: str) -> None:
    model = hf.moe_block(name).cuda().bfloat16()
    wide = copy.deepcopy(model).float()
    hidden = hf.hidden_states(name).cuda().bfloat16()
    eager = gradients(model, model, hidden)
    ref = gradients(wide, wide, hidden.float())
    with harness.fresh_compilation(codegen=True):
        got = gradients(model, torch.compile(model, backend="comet", fullgraph=True), hidden)
        assert counters["comet"]["regions_fused"] == 1
        assert counters["comet"]["regions_backward_fused"] == 1
    assert set(got) == set(eager) == set(ref)
    for what, value in got.items():
        assert_matches_ref(value, ref[what].double(), eager[what], what=what)


FORMS = {
    "llama4": all_experts.AllExperts,
    "weighted_after": all_experts.WeightedAfter,
    "capacity": capacity.Capacity,
    "one_hot": capacity.OneHot,
    "loop": loops.Loop,
    "loop_with_biases": loops.Biases,
    "modules": loops.Modules,
}


def decided_tokens(layer: nn.Module, num_tokens: int) -> Tensor:
    """Tokens whose experts no rounding changes."""
    generator = torch.Generator().manual_seed(1)
    router = layer.router.detach().float()
    x = torch.randn(8 * num_tokens, router.shape[1], generator=generator).bfloat16()
    logits = (x.float() @ router.T).sort(descending=True).values
    is_clear = logits[:, layer.top_k - 1] - logits[:, layer.top_k] > 0.05
    assert int(is_clear.sum()) >= num_tokens
    return x[is_clear][:num_tokens].cuda()


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_run_fused_both_ways(name: str) -> None:
    layer = FORMS[name](num_experts=8, top_k=2, hidden=128, inner=96)
    x = decided_tokens(layer, 600)
    layer = layer.cuda()
    wide = copy.deepcopy(layer).float()
    eager, ref = gradients(layer, layer, x), gradients(wide, wide, x.float())
    with harness.fresh_compilation(codegen=True):
        got = gradients(layer, torch.compile(layer, backend="comet", fullgraph=True), x)
        assert counters["comet"]["regions_fused"] == 1
        assert counters["comet"]["regions_backward_fused"] == 1
    assert set(got) == set(eager) == set(ref)
    for what, value in got.items():
        assert_matches_ref(value, ref[what].double(), eager[what], what=what)


def test_reduce_overhead_replays_with_other_routings() -> None:
    model = hf.moe_block("qwen3_moe").cuda().bfloat16()
    wide = copy.deepcopy(model).float()
    with torch.no_grad(), harness.fresh_compilation(codegen=True):
        compiled = torch.compile(model, backend="comet", mode="reduce-overhead")
        for seed in range(6):
            x = hf.hidden_states("qwen3_moe", seed=seed).cuda()
            ref = harness.first_tensor(wide(x.float())).double()
            eager = harness.first_tensor(model(x))
            got = harness.first_tensor(compiled(x)).clone()
            assert_matches_ref(got, ref, eager, what=f"call {seed}")
        assert counters["comet"]["regions_fused"] == 1
        assert not counters["inductor"]["cudagraph_skips"]


def expert_parallel(rank: int, num_ranks: int) -> int:
    from comet_compile.kernels.workspace import _workspaces

    layer = titan.TitanMoE().cuda()
    oracle = ep.oracle_of(layer, torch.bfloat16).cuda()
    wide = ep.oracle_of(layer).cuda()
    with torch.no_grad(), harness.fresh_compilation(codegen=True):
        compiled = torch.compile(layer, backend="comet", fullgraph=True)
        for counts in ((16, 16), (9, 40), (33, 5)):
            x = ep.tokens(counts[rank], seed=10 * rank + counts[rank]).cuda()
            got = compiled(x)
            eager = oracle(x).to(x.dtype)  # of sums in the dtype of the scores, float32
            assert_matches_ref(got, wide(x.float()).double(), eager, what=f"{counts}")
        assert counters["comet"]["regions_rejected"] == 0
        assert counters["comet"]["regions_fused"] > 0
    torch.cuda.synchronize()
    dist.barrier()
    return sum(int(ws.epoch) for kept in _workspaces.values() for ws in kept)


def start_expert_parallel(rank: int, num_ranks: int) -> int:
    torch.cuda.set_device(rank)
    return expert_parallel(rank, num_ranks)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_expert_parallel_inference_runs_fused() -> None:
    # over gloo, whose exchange of CUDA tensors nothing here may need any more
    for calls in run_ranks(start_expert_parallel, 2, timeout=200):
        assert calls == 3
