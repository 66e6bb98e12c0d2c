"""Forward and fused backward of the ops on one GPU: values, bits, no host read, CUDA graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from device_layers import DEVICE, make_layer
from fused_layers import math, params, routed
from moe_cases import GRAD_NAMES, Case
from numerics import assert_matches_ref
from poison import poisoned_memory

from comet_compile.kernels import (
    ops,  # noqa: F401, registers the ops
    paths,
)
from comet_compile.kernels.refs import moe_layer_backward_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPT_OSS = "swiglu_oai:interleaved:alpha=1.702:limit=7.0"
BEFORE: dict[str, Any] = {"weight_place": "before", "biases": True}


def step(case: Case, save: str = "pre_activation", frees: bool = False) -> tuple[Tensor, ...]:
    """(y, the gradients as the op returns them), forward and backward; [0] where there is none.

    With `frees`, the gradients of a second backward, for which the rows are gone.
    """
    where = {"form": "local", "group_name": ""}
    options: dict[str, Any] = {**case.options(), **where}
    y, saved, token = torch.ops.comet.moe_layer(
        *case.tensors(), None, **options, out_dtype=case.out_dtype, save=save
    )
    for _ in range(2 if frees else 1):
        *grads, _ = torch.ops.comet.moe_layer_backward(
            case.grad_y, *case.tensors(), saved, token, **options, needs=[True] * 8,
            free_saved=frees,
        )  # fmt: skip
        assert frees == (saved.untyped_storage().nbytes() == 0 and saved.numel() > 0)
    return y, *grads


def is_fused(case: Case) -> bool:
    return paths.why_portable(routed(case), params(case), math(case)) is None


def check(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that gradients err at most twice as much as the portable path's.

    Twice the same bits, and the same from rows that are computed again.
    """
    assert is_fused(case)
    with poisoned_memory():
        got, again, computed_again = step(case), step(case), step(case, save="nothing")
        second = step(case, frees=case.ids.numel() > 0)
    with monkeypatch.context() as patch:
        patch.setenv("COMET_PORTABLE", "1")
        assert not is_fused(case)
        eager = step(case)
    refs = moe_layer_backward_ref(
        case.grad_y, *case.tensors(), activation=case.activation, weight_place=case.weight_place
    )
    for first, *others in zip(got, again, computed_again, second, strict=True):
        assert all(torch.equal(first, other) for other in others)
    for name, grad, ref, portable in zip(GRAD_NAMES, got[1:], refs, eager[1:], strict=True):
        if getattr(case, name) is None:
            assert grad.numel() == 0, name
            continue
        # as float64: float32 gradients of the weights are sums of 16 bit rows, and err as they do
        assert_matches_ref(grad, ref.double(), portable, what=f"d_{name}")
        assert grad.isfinite().all(), name


# Few sizes: every other H, I and activation is compiled anew.
CASES: dict[str, dict[str, Any]] = {
    "silu_glu": {"sizes": (1000, 2, 8, 512, 256)},
    "strays": {"sizes": (1000, 2, 8, 512, 256), "strays": True},
    "more_experts_than_rows": {"sizes": (1, 8, 128, 512, 256)},
    "few_rows": {"sizes": (64, 8, 128, 512, 256)},
    "many_experts": {"sizes": (2000, 2, 256, 512, 256), "strays": True},
    "n_contiguous": {"sizes": (1000, 2, 8, 512, 256), "k_contiguous": False},
    "n_contiguous_apart": {
        "sizes": (1000, 2, 8, 512, 256), "k_contiguous": False, "apart": True,
    },
    "k_contiguous_apart": {
        "sizes": (1000, 2, 8, 512, 264), "activation": "silu_glu:up_first", "apart": True,
    },
    "gpt_oss": {"sizes": (500, 4, 32, 576, 576), "activation": GPT_OSS, "k_contiguous": False},
    "between": {
        "sizes": (500, 1, 8, 512, 256), "activation": "gelu_glu", "weight_place": "between",
    },
    "gpt_oss_biases": {
        "sizes": (500, 4, 32, 576, 576), "activation": GPT_OSS, "k_contiguous": False,
        "biases": True, "strays": True,
    },
    "biases": {"sizes": (1000, 2, 8, 512, 256), "biases": True},
    "biases_apart": {
        "sizes": (1000, 2, 8, 512, 264), "activation": "silu_glu:up_first", "apart": True,
        "biases": True,
    },
    "biases_between": {
        "sizes": (500, 1, 8, 512, 256), "activation": "gelu_glu", "weight_place": "between",
        "biases": True,
    },
    "biases_of_few_rows": {"sizes": (64, 8, 128, 512, 256), "biases": True},
    "before": {"sizes": (1000, 2, 8, 512, 256), "weight_place": "before", "strays": True},
    "before_n_contiguous_apart": {
        "sizes": (1000, 2, 8, 512, 256), "weight_place": "before", "k_contiguous": False,
        "apart": True, "biases": True,
    },
    "before_odd_sizes": {
        "sizes": (500, 2, 8, 520, 200), "activation": "relu2", "weight_place": "before",
        "biases": True, "weights_dtype": torch.bfloat16,
    },
    "odd_sizes": {"sizes": (500, 2, 8, 520, 200), "activation": "relu2"},
    "gelu_fp16": {"sizes": (500, 2, 8, 512, 256), "activation": "gelu", "dtype": torch.float16},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_and_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(CASES[name])
    check(make_layer(*options.pop("sizes"), **options), monkeypatch)


@pytest.mark.parametrize("options", [{}, BEFORE], ids=["after", "before"])
@pytest.mark.parametrize(
    "ids", [[[-1, 9]] * 1000, [[1, 1]] * 1000], ids=["no_expert", "one_expert"]
)
def test_routing_edges(
    ids: list[list[int]], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_layer(1000, 2, 8, 512, 256, **options)
    check(dataclasses.replace(case, ids=torch.tensor(ids, device=DEVICE)), monkeypatch)


def test_no_tokens() -> None:
    case = make_layer(0, 2, 8, 512, 256, biases=True)
    with poisoned_memory():
        y, d_x, d_weights, *d_params = step(case)
    assert y.shape == d_x.shape == case.x.shape
    assert d_weights.shape == (0, 2)
    assert not any(grad.any() for grad in d_params)


@pytest.mark.parametrize("options", [{}, BEFORE], ids=["after", "before"])
def test_the_host_never_waits(options: dict[str, Any]) -> None:
    case = make_layer(1000, 2, 8, 512, 256, strays=True, **options)
    step(case)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{}, BEFORE], ids=["after", "before"])
def test_a_graph_of_both_directions_is_replayed_with_other_routings(
    options: dict[str, Any],
) -> None:
    static = make_layer(1000, 2, 8, 512, 256, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with poisoned_memory(), torch.cuda.graph(graph):
        captured = step(static)

    def fresh(seed: int) -> Case:
        return make_layer(1000, 2, 8, 512, 256, strays=seed == 1, seed=seed, **options)

    one, few = fresh(2), fresh(3)
    one.ids.fill_(5)
    few.ids.remainder_(3)  # experts 3 to 7 are empty
    for case in (fresh(1), one, few, fresh(4)):
        for name in ("x", "ids", "weights", "grad_y"):
            getattr(static, name).copy_(getattr(case, name))
        graph.replay()
        with poisoned_memory():
            expected = step(static)
        for got, want in zip(captured, expected, strict=True):
            assert torch.equal(got, want)
            assert got.isfinite().all()
