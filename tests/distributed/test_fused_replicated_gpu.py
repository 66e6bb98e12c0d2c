"""The fused replicated form between processes on GPUs: values, bits, replays, a stalled peer."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.gloo import run_ranks

from comet_compile.errors import PeerTimeoutError
from comet_compile.kernels import fused_replicated, ops  # noqa: F401, registers the ops
from comet_compile.kernels.agreement import AGREEMENTS
from comet_compile.kernels.refs import moe_layer_backward_ref, moe_layer_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# T, A, experts per rank, H, I, weight_place, activation, dtype, out_dtype
BF16 = torch.bfloat16
LAYERS: dict[str, tuple[Any, ...]] = {
    "small": (70, 2, 4, 256, 192, "after", "silu_glu", BF16, BF16),
    "one_token": (1, 4, 8, 2048, 768, "after", "silu_glu", BF16, BF16),
    "odd_sizes": (333, 6, 5, 520, 200, "between", "gelu_glu:up_first", BF16, torch.float32),
    "float16": (1001, 8, 16, 2880, 256, "before", "silu_glu", torch.float16, torch.float16),
    "plain": (300, 1, 3, 512, 264, "after", "relu2", BF16, BF16),
    "qwen3": (4096, 8, 64, 2048, 768, "after", "silu_glu", BF16, BF16),
}


class Layer:
    """One rank's experts, and all of them for the reference."""

    def __init__(self, spec: tuple[Any, ...], rank: int, num_ranks: int) -> None:
        self.tokens, self.top_k, self.local, self.hidden, inter, place, act, self.dtype, out = spec
        self.rank, self.num_experts = rank, self.local * num_ranks
        generator = torch.Generator("cuda").manual_seed(5)

        def matrix(k: int, n: int) -> torch.Tensor:
            shape = (self.num_experts, n, k)
            rows = torch.randn(shape, device="cuda", generator=generator) * k**-0.5
            return rows.to(self.dtype).transpose(1, 2)

        columns = 2 * inter if "glu" in act else inter
        self.w_in, self.w_out = matrix(self.hidden, columns), matrix(inter, self.hidden)
        bias = torch.randn(self.num_experts, self.hidden, device="cuda", generator=generator)
        self.b_out = bias.to(self.dtype)
        self.mine = slice(rank * self.local, (rank + 1) * self.local)
        self.options = {"activation": act, "weight_place": place}
        self.out_dtype = out

    def routed(self, call: int, how: str = "random") -> list[torch.Tensor]:
        """x, ids of all experts, and weights: the same on every rank."""
        generator = torch.Generator("cuda").manual_seed(1000 + call)
        x = torch.randn(self.tokens, self.hidden, device="cuda", generator=generator)
        scores = torch.randn(self.tokens, self.num_experts, device="cuda", generator=generator)
        weights, ids = scores.softmax(-1).topk(self.top_k, -1)
        if how == "one_expert":  # so the other ranks have no row
            ids[:] = self.num_experts - 1
        return [x.to(self.dtype), ids, weights]

    def local_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """The ids counted from this rank's first expert, strays for the others."""
        return ids - self.rank * self.local

    def run(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, save: str = "nothing"
    ) -> torch.Tensor:
        """y by the op on this rank's experts."""
        y, _, _ = torch.ops.comet.moe_layer(
            x,
            self.local_ids(ids),
            weights,
            self.w_in[self.mine],
            None,
            self.w_out[self.mine],
            None,
            None,
            self.b_out[self.mine],
            None,
            **self.options,
            product_dtype=torch.float32,
            out_dtype=self.out_dtype,
            form="replicated",
            group_name=dist.group.WORLD.group_name,
            save=save,
        )
        return y

    def error(self, y: torch.Tensor, x: Any, ids: Any, weights: Any) -> float:
        """Distance from the float32 reference, relative to it in norm."""
        params = (self.w_in, None, self.w_out, None, None, self.b_out)
        ref = moe_layer_ref(x, ids, weights, *params, **self.options)
        assert y.shape == ref.shape
        assert y.dtype == self.out_dtype
        return float((y.float() - ref).norm() / ref.norm())


def start(rank: int) -> None:
    """Give the rank its GPU, or a share of the only one."""
    if torch.cuda.device_count() <= rank:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(rank % torch.cuda.device_count())
    fused_replicated._MIN_BYTES = 1  # small layers too


def fused_calls() -> int:
    """How many calls of this process's groups took the fused path."""
    from comet_compile.kernels.workspace import _workspaces

    torch.cuda.synchronize()
    return sum(int(ws.epoch) for kept in _workspaces.values() for ws in kept)


def same_on_all_ranks(y: torch.Tensor) -> bool:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, y.cpu())
    return all(torch.equal(other, every[0]) for other in every)


def values_main(rank: int, num_ranks: int) -> dict[str, list[float]]:
    start(rank)
    outcome = {}
    for calls, (name, spec) in enumerate(LAYERS.items(), 1):
        layer = Layer(spec, rank, num_ranks)
        errors = []
        for call, how in enumerate(("random", "one_expert", "random", "random")):
            routed = layer.routed(call, how)
            y = layer.run(*routed)
            assert torch.equal(y, layer.run(*routed)), "the same call gives the same bits"
            assert same_on_all_ranks(y), name
            errors.append(layer.error(y, *routed))
        assert fused_calls() == 8 * calls, f"{name} ran another path"
        outcome[name] = errors
    return outcome


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, list[float]]]:
    return run_ranks(values_main, 2, timeout=300)


@pytest.mark.parametrize("name", LAYERS)
def test_values(outcomes: list[dict[str, list[float]]], name: str) -> None:
    bound = 1e-3 if LAYERS[name][-2] == torch.float16 else 6e-3
    for outcome in outcomes:
        assert max(outcome[name]) < bound


def backward_main(rank: int, num_ranks: int) -> dict[str, float]:
    """Errors of the gradients behind a forward that kept its rows, those of x summed over ranks."""
    start(rank)
    layer = Layer(LAYERS["small"], rank, num_ranks)
    x, ids, weights = layer.routed(0)
    x.requires_grad_()
    whole, layer.w_out = layer.w_out, layer.w_out.detach().requires_grad_()
    y = layer.run(x, ids, weights, save="pre_activation")
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    d_x, d_w = torch.autograd.grad(y, (x, layer.w_out), grad_y)
    total = d_x.float().cpu()
    dist.all_reduce(total)
    refs = moe_layer_backward_ref(
        grad_y, x.detach(), ids, weights, layer.w_in, None, whole, None, None, layer.b_out,
        **layer.options,
    )  # fmt: skip
    wanted_x, wanted_w = refs[0].cpu(), refs[4][layer.mine]
    return {
        "x": float((total - wanted_x).norm() / wanted_x.norm()),
        "w_out": float((d_w[layer.mine].float() - wanted_w).norm() / wanted_w.norm()),
    }


def test_gradients_behind_it() -> None:
    for errors in run_ranks(backward_main, 2, timeout=200):
        assert max(errors.values()) < 1.2e-2


def graph_main(rank: int, num_ranks: int) -> list[float]:
    start(rank)
    layer = Layer(LAYERS["float16"], rank, num_ranks)
    static = layer.routed(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer.run(*static)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y = layer.run(*static)
    errors = []
    for call, how in ((2, "random"), (4, "one_expert"), (6, "random")):
        for kept, new in zip(static, layer.routed(call, how), strict=True):
            kept.copy_(new)
        y.fill_(float("nan"))
        graph.replay()
        errors.append(layer.error(y, *static))
    return errors


def test_a_graph_is_replayed_with_other_routings() -> None:
    for errors in run_ranks(graph_main, 2, timeout=200):
        assert max(errors) < 1e-3


def mixed_main(rank: int, num_ranks: int) -> list[float]:
    """Layers of several sizes in turns, so that each finds the others' flags and memory."""
    start(rank)
    layers = [Layer(LAYERS[name], rank, num_ranks) for name in ("small", "qwen3", "plain")]
    errors = []
    for call in range(30):
        layer = layers[call % 3]
        routed = layer.routed(call)
        errors.append(layer.error(layer.run(*routed), *routed))
    return errors


def test_layers_take_turns_in_one_workspace() -> None:
    for errors in run_ranks(mixed_main, 2, timeout=200):
        assert max(errors) < 6e-3


def unequal_main(rank: int, num_ranks: int) -> str:
    start(rank)
    spec = (70 + rank, *LAYERS["small"][1:])
    layer = Layer(spec, rank, num_ranks)
    with pytest.raises(ValueError, match="tokens; allowed") as caught:
        layer.run(*layer.routed(0))
    return str(caught.value)


def test_ranks_with_different_tokens_are_told_so() -> None:
    for text in run_ranks(unequal_main, 2, timeout=200):
        assert "have [70, 71] tokens; allowed: the same tokens on every rank" in text


def stalled_main(rank: int, num_ranks: int) -> tuple[bool, str]:
    """A peer that comes on the host, but whose kernels do not run in time."""
    start(rank)
    layer = Layer(LAYERS["small"], rank, num_ranks)
    layer.run(*layer.routed(0))
    torch.cuda.synchronize()
    dist.barrier()
    # the stalled peer waits in vain for the rank that has given up
    AGREEMENTS.set_timeout(1.0 if rank == 0 else 8.0)
    if rank == 1:
        torch.cuda._sleep(8_000_000_000)  # some seconds in front of the kernels
    y = layer.run(*layer.routed(1))
    torch.cuda.synchronize()
    is_nan, text = bool(y.isnan().all()), ""
    if rank == 0:
        with pytest.raises(PeerTimeoutError) as caught:
            layer.run(*layer.routed(2))
        text = str(caught.value)
    dist.barrier()
    return is_nan, text


def test_a_stalled_peer_gives_nan_and_is_named() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("a sleeping kernel of one process holds up the other on the same GPU")
    (is_nan, text), _ = run_ranks(stalled_main, 2, timeout=200)
    assert is_nan
    assert "gave up waiting for group rank 1" in text
    assert "all-reduce: the peer's entry" in text
