"""Data parallel training on two processes: averaged gradients, and every layer rewritten."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from distributed.gloo import RankPool
from e2e import harness
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from zoo import ep, titan

NAME = "qwen3_moe"
ROUTER = "grad of 0.gate"
Run = Callable[[Tensor], Tensor]
Named = Callable[[nn.Module], dict[str, Tensor | None]]


# -- replicated experts -----------------------------------------------------------------------


each_way = pytest.mark.parametrize("way", ["ddp_around_a_compiled_model", "compiled_ddp", "fsdp"])


@each_way
def test_data_parallel_models(way: str, pair: RankPool) -> None:
    pytest.importorskip("transformers")
    pair.run(_data_parallel, way, "cpu")


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_way
def test_data_parallel_models_over_nccl(way: str, gpu_pair: RankPool) -> None:
    pytest.importorskip("transformers")
    gpu_pair.run(_data_parallel, way, "cuda")


def _data_parallel(rank: int, world_size: int, way: str, device: str) -> None:
    ways = {
        "ddp_around_a_compiled_model": _ddp_around_a_compiled_model,
        "compiled_ddp": _compiled_ddp,
        "fsdp": _fsdp_of_compiled_blocks,
    }
    _compare_with_all_tokens(rank, world_size, ways[way], device)


def _ddp_around_a_compiled_model(model: nn.Module) -> Run:
    model.compile(backend=harness.BACKEND, fullgraph=True)
    return DistributedDataParallel(model)


def _compiled_ddp(model: nn.Module) -> Run:
    return torch.compile(DistributedDataParallel(model), backend=harness.BACKEND)


def _fsdp_of_compiled_blocks(model: nn.Module) -> Run:
    """FSDP2: every block compiled and sharded, then what is left of the model sharded."""
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.layers:
        layer.compile(backend=harness.BACKEND, fullgraph=True)
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _compare_with_all_tokens(
    rank: int, world_size: int, way: Callable[[nn.Module], Run], device: str
) -> None:
    """Compare with the mean over the ranks' tokens, in float32 and in eager."""
    from zoo import hf

    model = ep.Stack(hf.moe_blocks(hf.causal_lm(NAME))).to(device)
    xs = [hf.hidden_states(NAME, seed=seed).to(device) for seed in range(world_size)]
    wide = copy.deepcopy(model).float()
    ref = _mean_gradients(wide, [x.float() for x in xs])
    eager = _mean_gradients(model, xs)
    model.zero_grad(set_to_none=True)
    with harness.fresh_compilation():
        run = way(model)
        got = _gradients(model, run, xs[rank])
        outcome = harness.snapshot(model)
    assert outcome.comet["regions_found"] == 2, outcome
    path = "fused" if device == "cuda" else "portable"
    assert outcome.comet[f"regions_{path}"] == 2, outcome
    assert outcome.comet[f"regions_backward_{path}"] == 2, outcome
    assert outcome.comet.get("regions_rejected", 0) == 0, outcome
    harness.assert_all_match(got, ref, eager, f"{way.__name__}, rank {rank}")


def _mean_gradients(model: nn.Module, xs: list[Tensor]) -> dict[str, Tensor]:
    """The gradients that data parallelism promises, computed in one process."""
    found = [_gradients(model, model, x) for x in xs]
    return {name: sum(one[name] for one in found) / len(xs) for name in found[0]}


def _gradients(
    model: nn.Module, run: Run, x: Tensor, named: Named | None = None
) -> dict[str, Tensor]:
    found = harness.results(model, run, x, True, named, input_grad=False)
    del found["output"]  # of this rank's tokens only
    return found


# -- expert parallel --------------------------------------------------------------------------


def test_expert_parallel_with_a_data_parallel_router(pair: RankPool) -> None:
    pair.run(_data_parallel_router)


def _data_parallel_router(rank: int, world_size: int) -> None:
    """Experts get the sum over all tokens from the exchange, the router's gradient is averaged."""
    xs = [ep.tokens(16, seed=peer) for peer in range(world_size)]
    for wrapped in (False, True):
        # in a stack, since DDP cannot ignore parameters of the very module that it wraps
        model = ep.Stack([titan.TitanMoE()])
        ref = _oracle_gradients(model, [x.float() for x in xs])
        eager = _averaged(_expert_parallel_gradients(model, model, xs[rank]))
        with harness.fresh_compilation():
            model.compile(backend=harness.BACKEND, fullgraph=True)
            if wrapped:
                got = _expert_parallel_gradients(model, _ddp_of_router(model), xs[rank])
            else:
                got = _averaged(_expert_parallel_gradients(model, model, xs[rank]))
            harness.assert_rewritten(harness.snapshot(model), 1, train=True)
        harness.assert_all_match(got, ref, eager, f"{wrapped=}, rank {rank}")


def _ddp_of_router(model: nn.Module) -> Run:
    experts = [name for name, _ in model.named_parameters() if not name.endswith(".gate")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts)
    return DistributedDataParallel(model)


def _averaged(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    dist.all_reduce(gradients[ROUTER])
    gradients[ROUTER] /= dist.get_world_size()
    return gradients


def _oracle_gradients(model: nn.Module, xs: list[Tensor]) -> dict[str, Tensor]:
    """Over the tokens of all ranks: the sum for this rank's experts, the mean for the router."""
    oracle = ep.oracle_of(model)
    found = [_gradients(oracle, oracle, x, lambda m: ep.oracle_gradients(m, model)) for x in xs]
    total = {name: sum(one[name] for one in found) for name in found[0]}
    total[ROUTER] /= len(xs)
    return total


def _expert_parallel_gradients(model: nn.Module, run: Run, x: Tensor) -> dict[str, Tensor]:
    return _gradients(model, run, x, ep.gradients_of)
