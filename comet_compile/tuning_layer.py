"""A layer of random weights to measure plans on: one GPU's, or one rank's of an exchange.

Tokens choose experts at random, so all get about as many.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from comet_compile.kernels import exchange_plan, fused, fused_backward, fused_exchange, portable
from comet_compile.kernels.activation import Activation
from comet_compile.kernels.experts import ExpertParams, LayerMath, Needs
from comet_compile.kernels.launch import OutOfResources
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.workspace import Layout, workspace_for

DEADLINE = 20.0
_REPEATS = 9
_WARM_UP = 3
# clock ticks, about a millisecond: a backward's launches take less
HEAD_START = 2_000_000
# results of other tiles differ by their rounding, which is far below this
_SAME = 0.02

Run = Callable[[Any], tuple[Tensor | None, ...]]


@dataclasses.dataclass(frozen=True)
class LayerSize:
    """Sizes of a layer; `experts` are those of one rank, `tokens` too."""

    hidden: int
    inter: int
    experts: int
    top_k: int
    tokens: int
    gated: bool = True

    @property
    def math(self) -> LayerMath:
        """The arithmetic: SwiGLU or plain GELU, weights after the experts."""
        act = Activation.parse("silu_glu" if self.gated else "gelu")
        return LayerMath(act, "after", torch.float32)


@dataclasses.dataclass(frozen=True)
class TunedLayer:
    """The rule's plan for a layer, and how to run it with another."""

    plan: Any
    run: Run
    """Runs all kernels of a direction with a plan and returns what they computed."""
    run_layer0: Run | None = None
    """Runs a local forward's kernels up to the activation."""
    run_unfused: Run | None = None
    """Runs a local forward on torch's operators."""
    alone: bool = False
    """Whether this process measures by itself, although others may be there."""


def make_layer(size: LayerSize, group: Any, *, backward: bool) -> TunedLayer:
    """Return a bfloat16 layer on the current CUDA device, a rank's part if there is a group."""
    rank, num_ranks = (0, 1) if group is None else (group.rank(), group.size())
    generator = torch.Generator("cuda").manual_seed(rank)
    tokens, top_k, arithmetic = size.tokens, size.top_k, size.math

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    columns = 2 * size.inter if size.gated else size.inter
    w_in = normal(size.experts, columns, size.hidden).mul_(size.hidden**-0.5)
    w_out = normal(size.experts, size.hidden, size.inter).mul_(size.inter**-0.5)
    params = ExpertParams(w_in.transpose(1, 2), None, w_out.transpose(1, 2))
    scores = torch.rand(tokens, size.experts * num_ranks, generator=generator, device="cuda")
    weights, ids = scores.topk(top_k, -1)
    routed = Routed(normal(tokens, size.hidden), ids, weights)
    grad_y = normal(tokens, size.hidden)
    if group is None:
        plan: Any = fused.plan_layer(routed, params, arithmetic, use_tables=False)
        args = routed, params, arithmetic, torch.bfloat16
        if not backward:
            return TunedLayer(
                plan,
                lambda plan: fused.local_forward(*args, save=False, plan=plan),
                lambda plan: (fused.compute_hidden(*args[:3], plan, save=False).h_RI,),
                lambda plan: portable.local_forward(*args),
            )
        _, saved = fused.local_forward(*args, save=True, plan=plan)
        return TunedLayer(
            plan,
            lambda plan: fused_backward.local_backward(
                grad_y, routed, saved, params, arithmetic, Needs(), plan
            ),
        )
    device = torch.device("cuda", torch.cuda.current_device())
    capacity = exchange_plan.capacity_for([tokens])
    plan = exchange_plan.plan_exchange(
        params, arithmetic, top_k, capacity, num_ranks, device.index or 0, use_tables=False
    )
    layout = Layout.of(capacity, top_k, size.hidden, num_ranks, 2, backward=backward)
    workspace = workspace_for(layout.num_bytes, group, device)
    y = torch.empty_like(routed.x)

    def forward(plan: Any) -> tuple[Tensor | None, ...]:
        workspace.check()
        fused_exchange.all_to_all_forward(routed, params, arithmetic, plan, workspace, DEADLINE, y)
        return (y,)

    def backward_of(plan: Any) -> tuple[Tensor | None, ...]:
        workspace.check()
        args = grad_y, routed, params, arithmetic, Needs(), plan, workspace, DEADLINE
        return fused_exchange.all_to_all_backward(*args, fused_exchange.begin_backward(*args))

    return TunedLayer(plan, backward_of if backward else forward)


def measure(layer: TunedLayer, plans: Sequence[Any], repeats: int = _REPEATS) -> list[float]:
    """Return the median microseconds of plans, in turns (`time_us`).

    Of several ranks the slowest counts. inf for a plan that some rank cannot launch, or that does
    not compute what the layer's own plan does.
    """
    wanted = [None if one is None else one.clone() for one in layer.run(layer.plan)]
    able = [_agrees(layer, plan, wanted) for plan in plans]
    times: list[list[float]] = [[] for _ in plans]
    for _ in range(repeats):
        for plan, is_able, samples in zip(plans, able, times, strict=True):
            if not is_able:
                continue
            samples.append(time_us(layer, plan))
    return [
        slowest(statistics.median(samples), alone=layer.alone) if is_able else math.inf
        for is_able, samples in zip(able, times, strict=True)
    ]


def time_us(layer: TunedLayer, plan: Any) -> float:
    """Return the microseconds of one run on the device, which all ranks begin together.

    The device sleeps until the host has launched all of it: a small layer's kernels are shorter
    than their launches, and a call that is replayed does not wait for the host either.
    """
    if dist.is_initialized() and not layer.alone:
        dist.barrier()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    begin.record()
    layer.run(plan)
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end)


def median_us(layer: TunedLayer, repeats: int = _REPEATS) -> float:
    """Return the median microseconds of calls (`time_us`), of several ranks the slowest's."""
    times = [time_us(layer, layer.plan) for _ in range(_WARM_UP + repeats)][_WARM_UP:]
    return slowest(statistics.median(times), alone=layer.alone)


def _agrees(layer: TunedLayer, plan: Any, wanted: Sequence[Tensor | None]) -> bool:
    """Whether `plan` runs and gets what is wanted, on all ranks."""
    try:
        found = layer.run(plan)
    except OutOfResources:
        # between ranks a call cannot be given up half way: the peers would wait for the rest of it
        if dist.is_initialized() and not layer.alone:
            raise
        return False
    worst = 0.0
    for got, want in zip(found, wanted, strict=True):
        if got is not None and want is not None:
            error = (got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-30)
            worst = max(worst, float(error.nan_to_num(nan=math.inf)))
    return slowest(worst, alone=layer.alone) < _SAME


def slowest(value: float, *, alone: bool = False) -> float:
    """Return the largest of all ranks' values, so that all ranks draw one conclusion."""
    if alone or not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device="cuda")
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)
