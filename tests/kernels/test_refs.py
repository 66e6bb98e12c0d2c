from __future__ import annotations

import pytest
import torch
from moe_cases import GRAD_NAMES, make_case, token_loop

from comet_compile.kernels.refs import moe_layer_backward_ref, moe_layer_ref


@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize("separate_up", [False, True])
def test_refs_match_the_token_loop(weight_place: str, separate_up: bool) -> None:
    case = make_case(weight_place=weight_place, separate_up=separate_up, biases=True)
    options = {"activation": case.activation, "weight_place": weight_place}
    y, grads = token_loop(case)
    torch.testing.assert_close(moe_layer_ref(*case.tensors(), **options), y)
    got = moe_layer_backward_ref(case.grad_y, *case.tensors(), **options)
    for name, grad in zip(GRAD_NAMES, got, strict=True):
        expected = grads.get(name, torch.empty(0, dtype=torch.float64))
        torch.testing.assert_close(grad, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_refs_compute_in_float32_for_narrow_inputs() -> None:
    case = make_case(dtype=torch.bfloat16)
    y = moe_layer_ref(*case.tensors(), activation="silu_glu", weight_place="after")
    assert y.dtype == torch.float32


def test_backward_ref_honours_needs() -> None:
    case = make_case()
    needs = [name == "w_out" for name in GRAD_NAMES]
    got = moe_layer_backward_ref(
        case.grad_y, *case.tensors(), activation="silu_glu", weight_place="after", needs=needs
    )
    assert [grad.numel() > 0 for grad in got] == needs


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_refs_without_a_routed_row_are_zero(num_tokens: int) -> None:
    case = make_case(ids=torch.full((num_tokens, 2), 99))
    options = {"activation": "silu_glu", "weight_place": "after"}
    assert moe_layer_ref(*case.tensors(), **options).count_nonzero() == 0
    for grad in moe_layer_backward_ref(case.grad_y, *case.tensors(), **options):
        assert grad.count_nonzero() == 0
