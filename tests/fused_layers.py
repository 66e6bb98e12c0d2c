"""Run the fused path of a `Case`, and compare it with the portable path and the reference.

`tiles` are small on purpose: a few dozen rows and columns already make many tiles, partial ones
among them, and groups of row tiles that are not full.
"""

from __future__ import annotations

import dataclasses

import torch
from moe_cases import Case, make_case
from numerics import assert_matches_ref
from torch import Tensor

from comet_compile.kernels import fused, portable
from comet_compile.kernels.activation import Activation
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.plan import GemmTiles, Plan
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.refs import moe_layer_ref

# Every kind, each with the options that it takes.
ACTIVATIONS = (
    "silu_glu",
    "silu_glu:up_first",
    "silu_glu:limit=1.0",
    "silu_glu:interleaved",
    "gelu_glu",
    "gelu_glu:up_first:limit=0.5",
    "gelu_tanh_glu",
    "gelu_tanh_glu:interleaved:up_first",
    "relu_glu",
    "sigmoid_glu",
    "sigmoid_glu:interleaved:limit=0.5",
    "swiglu_oai:alpha=1.702",
    "swiglu_oai:interleaved:alpha=1.702:limit=1.5",
    "swiglu_oai:up_first:alpha=0.5:limit=1.5",
    "silu",
    "gelu",
    "gelu_tanh",
    "relu",
    "relu2",
    "identity",
)


def tiles(block_m: int, block_n: int, block_k: int, num_programs: int = 3) -> GemmTiles:
    return GemmTiles(block_m, block_n, block_k, 4, 2, 2, num_programs)


# Weight gradients in several tiles, the last ones partial.
SMALL_WEIGHTS = GemmTiles(16, 32, 16, 4, 2, 8, 3)


def small_plan(
    layer0: GemmTiles,
    layer1: GemmTiles,
    *,
    grad_weight: GemmTiles = SMALL_WEIGHTS,
    gathers: bool = False,
) -> Plan:
    """A plan whose grad_hidden is tiled as layer1, in columns that its epilogue can quarter."""
    grad_hidden = dataclasses.replace(layer1, block_n=64)
    return Plan(layer0, layer1, grad_hidden, grad_weight, gathers)


SMALL = small_plan(tiles(16, 16, 32), tiles(16, 32, 16))


def routed(case: Case) -> Routed:
    return Routed(case.x, case.ids, case.weights)


def params(case: Case) -> ExpertParams:
    return ExpertParams(case.w_in, case.w_up, case.w_out, case.b_in, case.b_up, case.b_out)


def math(case: Case) -> LayerMath:
    return LayerMath(Activation.parse(case.activation), case.weight_place, case.product_dtype)


def small_case(**changes: object) -> Case:
    """A layer whose sizes are odd multiples of 8 and not multiples of a tile; some ids stray."""
    sizes = {"num_tokens": 21, "top_k": 2, "num_experts": 3, "hidden": 40, "inter": 24}
    options = {"dtype": torch.float16, "weights_dtype": torch.float32}
    options["product_dtype"] = torch.float32
    return make_case(**{**sizes, **options, **changes})  # type: ignore[arg-type]


def stored_pair(case: Case, up_before_in_memory: bool) -> Case:
    """The same layer with w_in and w_up in one allocation, in a chosen order."""
    assert case.w_up is not None
    stored = torch.stack(
        [t.transpose(1, 2) if t.stride(1) == 1 else t for t in (case.w_up, case.w_in)][
            :: 1 if up_before_in_memory else -1
        ]
    )
    if case.w_in.stride(1) == 1:
        stored = stored.transpose(2, 3)
    up, gate = (0, 1) if up_before_in_memory else (1, 0)
    assert torch.equal(stored[gate], case.w_in)
    return dataclasses.replace(case, w_in=stored[gate], w_up=stored[up])


def check_fused(case: Case, plan: Plan | None = SMALL) -> Tensor:
    """Assert that y and the saved rows err at most as `numerics` allows; return y.

    The reference is in float64, "eager" is the portable path on the same tensors.
    """
    y, saved = fused.local_forward(
        routed(case), params(case), math(case), case.out_dtype, save=True, plan=plan
    )
    wide = case.to(torch.float64)
    ref_y = moe_layer_ref(
        *wide.tensors(), activation=case.activation, weight_place=case.weight_place
    )
    _, ref_saved = portable.local_forward(routed(wide), params(wide), math(wide), torch.float64)
    eager_y, eager_saved = portable.local_forward(
        routed(case), params(case), math(case), case.out_dtype
    )
    assert y.is_contiguous()
    assert_matches_ref(y, ref_y, eager_y, what="y")
    # rows past the last routed slot are garbage
    num_rows = int(((case.ids >= 0) & (case.ids < case.w_in.shape[0])).sum())
    assert saved.shape == (case.ids.numel(), eager_saved.shape[1])
    for got, ref, eager in zip(
        saved[:num_rows].chunk(2, 1),
        ref_saved[:num_rows].chunk(2, 1),
        eager_saved[:num_rows].chunk(2, 1),
        strict=True,
    ):
        assert_matches_ref(got, ref, eager, what="saved")
    return y
