"""comet::moe_layer on one GPU: rows without an expert stay rows there, and hold garbage."""

from __future__ import annotations

import pytest
import torch
from moe_cases import GRAD_NAMES, make_case, token_loop
from numerics import assert_matches_ref

from comet_compile.kernels import ops  # noqa: F401, registers the ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LOCAL = {"form": "local", "group_name": ""}


@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("save", ["nothing", "pre_activation"])
def test_values_and_gradients(
    weight_place: str, dtype: torch.dtype, biases: bool, save: str
) -> None:
    case = make_case(
        weight_place=weight_place, dtype=dtype, biases=biases, permuted=True, num_tokens=33
    )
    ref_y, ref_grads = token_loop(case.to(torch.float64))
    eager_y, eager_grads = token_loop(case)
    here = case.on("cuda")
    y, saved, _ = torch.ops.comet.moe_layer(
        *here.tensors(), None, **here.options(), out_dtype=dtype, save=save, **LOCAL
    )
    *grads, _ = torch.ops.comet.moe_layer_backward(
        here.grad_y, *here.tensors(), saved, None, **here.options(), needs=[True] * 8, **LOCAL
    )
    assert_matches_ref(y.cpu(), ref_y, eager_y, what="y")
    for name, grad in zip(GRAD_NAMES, grads, strict=True):
        if name in ref_grads:
            assert_matches_ref(grad.cpu(), ref_grads[name], eager_grads[name], what=f"d_{name}")


@pytest.mark.parametrize(
    "ids", [[[-1, -1], [9, 9]], [[1, 1], [1, 1]], [[0, -1], [2, 5]]], ids=["none", "one", "some"]
)
def test_routing_edges_in_bf16(ids: list[list[int]]) -> None:
    case = make_case(ids=torch.tensor(ids), dtype=torch.bfloat16)
    ref_y, ref_grads = token_loop(case.to(torch.float64))
    eager_y, eager_grads = token_loop(case)
    here = case.on("cuda")
    options = {**here.options(), **LOCAL}
    y, saved, _ = torch.ops.comet.moe_layer(
        *here.tensors(), None, out_dtype=torch.bfloat16, save="nothing", **options
    )
    *grads, _ = torch.ops.comet.moe_layer_backward(
        here.grad_y, *here.tensors(), saved, None, needs=[True] * 8, **options
    )
    assert_matches_ref(y.cpu(), ref_y, eager_y, what="y")
    for name, grad in zip(GRAD_NAMES, grads, strict=True):
        if name in ref_grads:
            assert_matches_ref(grad.cpu(), ref_grads[name], eager_grads[name], what=f"d_{name}")


def test_bf16_layer_does_not_wait_for_the_device() -> None:
    here = make_case(dtype=torch.bfloat16).on("cuda")
    options = {**here.options(), **LOCAL}

    def step() -> None:
        _, saved, _ = torch.ops.comet.moe_layer(
            *here.tensors(), None, out_dtype=torch.bfloat16, save="nothing", **options
        )
        torch.ops.comet.moe_layer_backward(
            here.grad_y, *here.tensors(), saved, None, needs=[True] * 8, **options
        )

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
