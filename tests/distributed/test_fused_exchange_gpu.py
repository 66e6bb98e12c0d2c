"""The fused exchange between processes on GPUs: values, other routings, replays, lost peers.

One GPU is enough: torch lets ranks share one when it is told to, and kernels that wait for another
process are then interrupted for it. With a GPU for each rank, each takes its own.
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.gloo import run_ranks

from comet_compile.errors import PeerTimeoutError
from comet_compile.kernels import exchange_paths, ops  # noqa: F401, registers the ops
from comet_compile.kernels.agreement import AGREEMENTS
from comet_compile.kernels.refs import moe_layer_backward_ref, moe_layer_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# tokens of each rank, A, experts per rank, H, I, weight_place, activation, dtype
LAYERS: dict[str, tuple[Any, ...]] = {
    "small": ((70, 50), 2, 4, 256, 192, "after", "silu_glu", torch.bfloat16),
    "one_rank_empty": ((700, 0), 4, 8, 512, 256, "between", "silu_glu", torch.bfloat16),
    "no_tokens": ((0, 0), 2, 4, 256, 192, "after", "silu_glu", torch.bfloat16),
    "odd_sizes": ((333, 1), 6, 5, 520, 200, "after", "gelu_glu:up_first", torch.bfloat16),
    "before": ((1000, 1500), 8, 16, 512, 256, "before", "silu_glu", torch.float16),
    "plain": ((300, 301), 1, 3, 512, 264, "after", "relu2", torch.bfloat16),
    "qwen3": ((1024, 900), 8, 64, 2048, 768, "after", "silu_glu", torch.bfloat16),
}


class Layer:
    """One rank's part of a layer, and the whole of it for the reference."""

    def __init__(self, spec: tuple[Any, ...], rank: int, num_ranks: int) -> None:
        self.tokens, self.top_k, self.local, self.hidden, inter, place, act, self.dtype = spec
        self.rank, self.num_ranks = rank, num_ranks
        generator = torch.Generator("cuda").manual_seed(5)

        def matrix(k: int, n: int) -> torch.Tensor:
            shape = (self.local * num_ranks, n, k)
            rows = torch.randn(shape, device="cuda", generator=generator) * k**-0.5
            return rows.to(self.dtype).transpose(1, 2)

        columns = 2 * inter if "glu" in act else inter
        self.w_in, self.w_out = matrix(self.hidden, columns), matrix(inter, self.hidden)
        bias = torch.randn(self.local * num_ranks, columns, device="cuda", generator=generator)
        self.b_in = bias.to(self.dtype)
        self.options = {
            "activation": act,
            "weight_place": place,
            "product_dtype": torch.float32,
        }

    def routed(self, call: int, how: str = "random") -> list[torch.Tensor]:
        """x, ids and weights of this rank; ranks swap their numbers of tokens from call to call."""
        num_tokens = self.tokens[(self.rank + call) % self.num_ranks]
        torch.manual_seed(1000 * call + self.rank)
        num_experts = self.local * self.num_ranks
        x = torch.randn(num_tokens, self.hidden, device="cuda").to(self.dtype)
        scores = torch.randn(num_tokens, num_experts, device="cuda").softmax(-1)
        weights, ids = scores.topk(self.top_k, -1)
        if how == "one_expert":
            ids[:] = num_experts - 1
        if how == "stray" and num_tokens:
            ids[::3, 0] = num_experts + 2
            ids[-1, -1] = -1
            weights[0, 0] = float("nan")
        return [x, ids, weights]

    def run(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The op on this rank's experts."""
        mine = slice(self.rank * self.local, (self.rank + 1) * self.local)
        params = (self.w_in[mine], None, self.w_out[mine], self.b_in[mine], None, None)
        y, _, _ = torch.ops.comet.moe_layer(
            x,
            ids,
            weights,
            *params,
            None,
            **self.options,
            out_dtype=self.dtype,
            form="all_to_all",
            group_name=dist.group.WORLD.group_name,
            save="nothing",
        )
        return y

    def gradients(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, save: str = "nothing"
    ) -> Any:
        """A gradient of y, those of (x, weights, w_in, w_out, b_in); "balanced" rows are freed."""
        mine = slice(self.rank * self.local, (self.rank + 1) * self.local)
        tensors = (x, ids, weights, self.w_in[mine], None, self.w_out[mine], self.b_in[mine])
        where = {"form": "all_to_all", "group_name": dist.group.WORLD.group_name}
        y, saved, token = torch.ops.comet.moe_layer(
            *tensors, *[None] * 3, **self.options, **where, out_dtype=self.dtype, save=save
        )
        torch.manual_seed(77 + self.rank)
        grad_y = torch.randn(y.shape, device="cuda").to(y.dtype)
        frees = save == "balanced"
        d_x, d_weights, d_w_in, _, d_w_out, d_b_in, *_ = torch.ops.comet.moe_layer_backward(
            grad_y, *tensors, None, None, saved, token, **self.options, **where,
            needs=[True] * 8, free_saved=frees,
        )  # fmt: skip
        return grad_y, (d_x, d_weights, d_w_in, d_w_out, d_b_in)

    def error(self, y: torch.Tensor, x: Any, ids: Any, weights: Any) -> float:
        """Distance from the float32 reference, relative to it in norm."""
        ref = moe_layer_ref(
            x,
            ids,
            weights,
            self.w_in,
            None,
            self.w_out,
            self.b_in,
            activation=self.options["activation"],
            weight_place=self.options["weight_place"],
        )
        assert y.shape == ref.shape
        return float((y.float() - ref).norm() / ref.norm()) if ref.numel() else 0.0


def start(rank: int) -> None:
    """Give the rank its GPU, or a share of the only one."""
    if torch.cuda.device_count() <= rank:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(rank % torch.cuda.device_count())


def fused_calls() -> int:
    """How many calls of this process's groups took the fused path."""
    from comet_compile.kernels.workspace import _workspaces

    torch.cuda.synchronize()
    return sum(int(ws.epoch) for kept in _workspaces.values() for ws in kept)


def values_main(rank: int, num_ranks: int) -> dict[str, list[float]]:
    start(rank)
    outcome, before = {}, 0
    for name, spec in LAYERS.items():
        layer = Layer(spec, rank, num_ranks)
        errors = []
        for call, how in enumerate(("random", "stray", "one_expert", "random")):
            routed = layer.routed(call, how)
            y = layer.run(*routed)
            assert torch.equal(y, layer.run(*routed)), "the same call gives the same bits"
            errors.append(layer.error(y, *routed))
        assert fused_calls() == before + 8, f"{name} ran the portable path"
        before += 8
        outcome[name] = errors
    return outcome


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, list[float]]]:
    return run_ranks(values_main, 2, timeout=300)


@pytest.mark.parametrize("name", LAYERS)
def test_values(outcomes: list[dict[str, list[float]]], name: str) -> None:
    bound = 1e-3 if LAYERS[name][-1] == torch.float16 else 6e-3
    for outcome in outcomes:
        assert max(outcome[name]) < bound


BACKWARD = ("small", "one_rank_empty", "odd_sizes", "before", "plain", "qwen3")


def backward_main(rank: int, num_ranks: int) -> dict[str, dict[str, float]]:
    """Errors of every gradient, relative in norm to those of the whole layer in float32."""
    start(rank)
    outcome, calls = {}, 0
    for name in BACKWARD:
        layer = Layer(LAYERS[name], rank, num_ranks)
        routed = layer.routed(0)
        grad_y, grads = layer.gradients(*routed)
        # run, recorded, then replayed; a rank with fewer tokens than its peer may keep no rows
        for save in ("nothing", "nothing", *["pre_activation"] * 3, *["balanced"] * 4):
            # by default the number of rows is read for large layers only
            here: Any = exchange_paths
            here._WORTH_READING = 0 if save == "balanced" else 2**40
            for grad, again in zip(grads, layer.gradients(*routed, save)[1], strict=True):
                assert torch.equal(grad, again), f"{name}: the same call gives the same bits"
        calls += 20
        assert fused_calls() == calls, f"{name} ran the portable path"
        every: list[Any] = [None] * num_ranks
        dist.all_gather_object(every, [t.cpu() for t in (*routed, grad_y)])
        x, ids, weights, grad = (torch.cat(part).cuda() for part in zip(*every, strict=True))
        refs = moe_layer_backward_ref(
            grad,
            x,
            ids,
            weights,
            layer.w_in,
            None,
            layer.w_out,
            layer.b_in,
            activation=layer.options["activation"],
            weight_place=layer.options["weight_place"],
        )
        first = sum(len(part[0]) for part in every[:rank])
        tokens = slice(first, first + len(routed[0]))
        mine = slice(rank * layer.local, (rank + 1) * layer.local)
        wanted = (refs[0][tokens], refs[1][tokens], refs[2][mine], refs[4][mine], refs[5][mine])
        errors = {}
        for what, got, ref in zip(
            ("x", "weights", "w_in", "w_out", "b_in"), grads, wanted, strict=True
        ):
            assert got.shape == ref.shape
            errors[what] = float((got.float() - ref).norm() / ref.norm()) if ref.numel() else 0.0
        outcome[name] = errors
    return outcome


@pytest.fixture(scope="module")
def backwards() -> list[dict[str, dict[str, float]]]:
    return run_ranks(backward_main, 2, timeout=300)


@pytest.mark.parametrize("name", BACKWARD)
def test_gradients(backwards: list[dict[str, dict[str, float]]], name: str) -> None:
    bound = 2e-3 if LAYERS[name][-1] == torch.float16 else 1.2e-2
    for outcome in backwards:
        assert max(outcome[name].values()) < bound, outcome[name]


def graph_main(rank: int, num_ranks: int) -> list[float]:
    start(rank)
    layer = Layer(LAYERS["one_rank_empty"], rank, num_ranks)
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
    for call, how in ((2, "random"), (4, "stray"), (6, "one_expert")):
        for kept, new in zip(static, layer.routed(call, how), strict=True):
            kept.copy_(new)
        y.fill_(float("nan"))
        graph.replay()
        errors.append(layer.error(y, *static))
    return errors


def test_a_graph_is_replayed_with_other_routings() -> None:
    for errors in run_ranks(graph_main, 2, timeout=200):
        assert max(errors) < 6e-3


def growth_main(rank: int, num_ranks: int) -> list[float]:
    start(rank)
    errors = []
    for tokens in ((5, 3), (40, 900), (2000, 1), (7, 7), (3000, 4000)):
        spec = (tokens, 4, 4, 512, 256, "after", "silu_glu", torch.bfloat16)
        layer = Layer(spec, rank, num_ranks)
        routed = layer.routed(0)
        errors.append(layer.error(layer.run(*routed), *routed))
    return errors


def test_any_number_of_tokens_follows_any_other() -> None:
    for errors in run_ranks(growth_main, 2, timeout=200):
        assert max(errors) < 6e-3


def lost_main(rank: int, num_ranks: int) -> tuple[str, float]:
    start(rank)
    layer = Layer(LAYERS["small"], rank, num_ranks)
    layer.run(*layer.routed(0))
    torch.cuda.synchronize()
    dist.barrier()
    text, seconds = "", 0.0
    if rank == 0:
        AGREEMENTS.set_timeout(2.0)
        begun = time.monotonic()
        with pytest.raises(PeerTimeoutError) as caught:
            layer.run(*layer.routed(1))
        text, seconds = str(caught.value), time.monotonic() - begun
    dist.barrier()
    return text, seconds


def test_a_lost_peer_is_named_before_anything_is_launched() -> None:
    (text, seconds), _ = run_ranks(lost_main, 2, timeout=200)
    assert "group ranks [1] did not come" in text
    assert 2.0 <= seconds < 10.0


def stalled_main(rank: int, num_ranks: int) -> tuple[bool, str]:
    """A peer that comes on the host, but whose kernels do not run in time."""
    start(rank)
    layer = Layer(LAYERS["small"], rank, num_ranks)
    layer.run(*layer.routed(0))
    torch.cuda.synchronize()
    dist.barrier()
    # the stalled peer waits in vain for the sums of the rank that has given up
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
    assert "phase dispatch" in text
