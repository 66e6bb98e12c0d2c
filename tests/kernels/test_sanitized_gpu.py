"""Every fused kernel on small, odd sizes on one GPU: what `make sanitize` runs under NVIDIA's
compute-sanitizer, which watches each access and each hazard in shared memory.

The exchange's ranks are buffers of this one process, one stage of all ranks after the other.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from exchange_ranks import Ranks
from fused_layers import math, params, routed, small_case
from moe_cases import GRAD_NAMES, Case
from numerics import assert_matches_ref
from poison import poisoned_memory
from replicated_ranks import ReplicatedRanks

from comet_compile.kernels import fused, fused_backward, portable
from comet_compile.kernels.experts import Needs, weight_gradients
from comet_compile.kernels.refs import moe_layer_backward_ref, moe_layer_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# Few kernels: the sanitizer makes each a hundred times as slow.
LAYERS: dict[str, dict[str, Any]] = {
    "biases": {"biases": True},
    "before": {"weight_place": "before", "biases": True, "permuted": True},
    "between": {"weight_place": "between", "activation": "relu2"},
}


def expect(layer: Case) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(y and its gradients in float64, the same by the portable path) on one device."""
    wide = layer.to(torch.float64)
    options: Any = {"activation": layer.activation, "weight_place": layer.weight_place}
    refs = (
        moe_layer_ref(*wide.tensors(), **options),
        *moe_layer_backward_ref(wide.grad_y, *wide.tensors(), **options),
    )
    args = routed(layer), params(layer), math(layer)
    y, pre = portable.local_forward(*args, layer.out_dtype)
    d_x, d_weights, part = portable.local_backward(layer.grad_y, args[0], pre, *args[1:], Needs())
    return refs, (y, d_x, d_weights, *weight_gradients([part], args[1], Needs()))


@pytest.mark.parametrize("name", LAYERS)
def test_one_gpu(name: str) -> None:
    layer = Ranks(1, num_experts=3, device="cuda", **LAYERS[name]).tokens((21,))[0]
    args = routed(layer), params(layer), math(layer)
    y, saved = fused.local_forward(*args, layer.out_dtype, save=True)
    plan = fused.plan_layer(*args)
    grads = fused_backward.local_backward(layer.grad_y, args[0], saved, *args[1:], Needs(), plan)
    names = ("y", *GRAD_NAMES)
    for what, got, ref, eager in zip(names, (y, *grads), *expect(layer), strict=True):
        if what == "y" or getattr(layer, what) is not None:
            assert_matches_ref(got, ref, eager, what=what)


@pytest.mark.parametrize("name", LAYERS)
def test_exchange(name: str) -> None:
    ranks = Ranks(2, capacity=64, block_tokens=8, device="cuda", **LAYERS[name])
    layers = ranks.tokens((40, 33))
    # one rank keeps its rows, the other computes them again
    saved = [ranks.memory_for_rows(layer) for layer in layers]
    results = ranks.run(layers, saved)
    gradients = ranks.run_backward(layers, saved=[saved[0], None])
    torch.cuda.synchronize()
    for rank, layer in enumerate(layers):
        ranks.workspaces[rank].check()
        refs, eagers = expect(layer)
        # gradients of the experts are sums over all ranks' tokens: test_fused_exchange_gpu.py
        got = (results[rank], *gradients[rank][:2])
        names = ("y", "d_x", "d_weights")
        for what, one, ref, eager in zip(names, got, refs[:3], eagers[:3], strict=True):
            assert one is not None
            assert_matches_ref(one, ref, eager, what=f"{what} of rank {rank}")


@pytest.mark.parametrize("name", LAYERS)
def test_replicated(name: str) -> None:
    layer = small_case(num_tokens=21, num_experts=6, hidden=72, **LAYERS[name]).on("cuda")
    ranks = ReplicatedRanks(3, layer)
    with poisoned_memory():
        results = ranks.run()
    torch.cuda.synchronize()
    refs, eagers = expect(layer)
    for rank, y in enumerate(results):
        assert torch.equal(y, results[0]), f"rank {rank} differs from rank 0"
    assert_matches_ref(results[0], refs[0], eagers[0], what="y")
