"""transformers with ``ep_implementation="comet"``: one graph, rewritten, in real gloo processes."""

from __future__ import annotations

import copy
from typing import Any

import joint_graphs
import pytest
import torch
import torch.distributed as dist
from distributed.gloo import RankPool
from e2e import harness
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip(
    "transformers.distributed.expert_parallel", reason="needs transformers 5.19 or newer"
)

from zoo import hf, hf_ep, hf_families
from zoo.hf_families import NUM_EXPERTS, Layer

# tokens of both ranks, step by step: alike, different, none on one
STEPS = ((12, 12), (12, 7), (5, 0), (0, 9))


def _shared_out(layer: Layer, rank: int, world_size: int, way: Any = None) -> Layer:
    """Return the layer with this rank's experts, reached as transformers would; `way`: not ours."""
    from torch.distributed.device_mesh import init_device_mesh

    from comet_compile.huggingface import CometEP

    layer = copy.deepcopy(layer)
    experts: Any = layer.experts
    count = NUM_EXPERTS // world_size
    for name, parameter in list(experts.named_parameters()):
        mine = parameter.detach()[rank * count : (rank + 1) * count].clone()
        setattr(experts, name, nn.Parameter(mine))
    experts.num_experts, experts._is_expert_parallel = count, True
    grid = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("ep", "tp"))
    experts.forward = (way or CometEP)(experts, grid["ep"], grid["tp"]).__call__
    return layer


def _results(layer: nn.Module, call: Any, x: Tensor, rank: int, train: bool) -> dict[str, Tensor]:
    """Output and gradients; every rank has a loss of its own."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_(train)
    with torch.set_grad_enabled(train):
        out = call(x)
    if not train:
        return {"output": out}
    generator = torch.Generator().manual_seed(rank)
    out.backward(torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype))
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"output": out.detach(), "x": x.grad, **grads}


def _reference(
    whole: nn.Module, xs: list[Tensor], rank: int, world_size: int, train: bool
) -> dict[str, Tensor]:
    """What a rank should get: its experts' gradients come from the tokens of all ranks."""
    found = [_results(whole, whole, x, r, train) for r, x in enumerate(xs)]
    own = found[rank]
    count = NUM_EXPERTS // world_size
    for name in own:
        if name.startswith("experts."):
            total = sum(one[name] for one in found)
            own[name] = total[rank * count : (rank + 1) * count]
    return own


@pytest.mark.parametrize(
    "name", [pytest.param("AfmoeExperts", marks=pytest.mark.slow), "GptOssExperts"]
)
def test_tokens_that_are_each_ranks_own(name: str, pair: RankPool) -> None:
    pair.run(_own_tokens, name)


def _own_tokens(rank: int, world_size: int, name: str) -> None:
    (family,) = (family for family in hf_families.families() if family.name == name)
    whole = hf_families.layer(family)
    wide = copy.deepcopy(whole).float()
    layer = _shared_out(whole, rank, world_size)
    for train in (False, True):
        with harness.fresh_compilation():
            compiled = torch.compile(layer, backend=harness.BACKEND, fullgraph=True)
            for step, counts in enumerate(STEPS):
                xs = [hf_families.tokens(batch=1, seq=count) for count in counts]
                eager = _results(layer, layer, xs[rank], rank, train)
                got = _results(layer, compiled, xs[rank], rank, train)
                refs = _reference(wide, [x.float() for x in xs], rank, world_size, train)
                harness.assert_all_match(got, refs, eager, f"{name}, step {step}")
            harness.assert_rewritten(harness.snapshot(compiled), 1, train=train)


def test_tokens_that_all_ranks_have(pair: RankPool) -> None:
    pair.run(_shared_tokens)


def _shared_tokens(rank: int, world_size: int) -> None:
    import comet_compile.huggingface  # noqa: F401, registers the name

    block = hf_ep.moe_block("qwen3_moe", "comet")
    reference = hf.moe_block("qwen3_moe").float()
    for train in (False, True):
        outcome = harness.compile_and_compare(
            block, [hf.hidden_states("qwen3_moe")], train=train, reference=reference
        )
        harness.assert_rewritten(outcome, 1, train=train)
    dist.barrier()


def test_transformers_own_way_breaks_the_graph() -> None:
    """If this fails, the README can stop sending users of "all_to_all" to "comet"."""
    from transformers.distributed.expert_parallel import AllToAllEP

    (family,) = (one for one in hf_families.families() if one.name == "AfmoeExperts")
    with joint_graphs.fake_group(2):
        layer = _shared_out(hf_families.layer(family), 0, 2, AllToAllEP)
        with harness.fresh_compilation(), torch.no_grad():
            compiled = torch.compile(layer, backend=harness.BACKEND, fullgraph=True)
            with pytest.raises(Exception, match="Could not guard on data-dependent"):
                compiled(hf_families.tokens())
