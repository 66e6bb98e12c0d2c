"""comet::moe_layer on one device, values and gradients against a loop over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from moe_cases import GRAD_NAMES, Case, make_case, token_loop
from numerics import assert_matches_ref
from torch import Tensor

from comet_compile.kernels import ops  # noqa: F401, registers the ops

LOCAL = {"form": "local", "group_name": ""}
EDGE_IDS = {
    "empty_expert": [[0, 2], [2, 0], [0, 0]],
    "all_to_one": [[1, 1], [1, 1], [1, 1], [1, 1], [1, 1]],
    "repeated_in_a_row": [[1, 1], [2, 2], [0, 1]],
    "every_id_out_of_range": [[-1, 3], [7, 2**40]],
    "wraps_in_int32": [[2**32, 0], [-(2**32) + 1, 1]],
    "one_token": [[2, 0]],
}


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    """Every torch.empty is NaN, so a result that reads one shows it."""
    torch.set_num_threads(1)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def run_local(case: Case, save: str) -> tuple[Tensor, dict[str, Tensor]]:
    y, saved, _ = torch.ops.comet.moe_layer(
        *case.tensors(), None, **case.options(), out_dtype=case.out_dtype, save=save, **LOCAL
    )
    *grads, _ = torch.ops.comet.moe_layer_backward(
        case.grad_y, *case.tensors(), saved, None, **case.options(), needs=[True] * 8, **LOCAL
    )
    return y, dict(zip(GRAD_NAMES, grads, strict=True))


def check(case: Case, save: str = "nothing") -> None:
    y, grads = run_local(case, save)
    ref_y, ref_grads = token_loop(case.to(torch.float64))
    eager_y, eager_grads = token_loop(case)
    assert y.is_contiguous()
    assert_matches_ref(y, ref_y, eager_y, what="y")
    for name in GRAD_NAMES:
        given = getattr(case, name)
        if given is None:
            assert grads[name].shape == (0,)
            continue
        assert_matches_ref(grads[name], ref_grads[name], eager_grads[name], what=f"d_{name}")
        if name.startswith(("w_", "b_")):
            assert grads[name].stride() == given.stride(), name


@pytest.mark.parametrize(
    "activation",
    [
        "silu_glu",
        "gelu_glu",
        "gelu_tanh_glu",
        "relu_glu",
        "sigmoid_glu",
        "silu_glu:interleaved",
        "silu_glu:up_first",
        "silu_glu:limit=1.0",
        "swiglu_oai:interleaved:alpha=1.702:limit=1.5",
        "silu",
        "gelu",
        "gelu_tanh",
        "relu",
        "relu2",
        "identity",
    ],
)
@pytest.mark.parametrize("save", ["nothing", "pre_activation"])
def test_activations(activation: str, save: str) -> None:
    check(make_case(activation=activation), save)


@pytest.mark.parametrize("activation", ["silu_glu", "gelu_glu:up_first"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("save", ["nothing", "pre_activation"])
def test_separate_up(activation: str, biases: bool, save: str) -> None:
    check(make_case(activation=activation, separate_up=True, biases=biases), save)


@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weight_places(weight_place: str, biases: bool, permuted: bool, dtype: torch.dtype) -> None:
    check(make_case(weight_place=weight_place, biases=biases, permuted=permuted, dtype=dtype))


@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_product_dtypes(
    weight_place: str, product_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    check(
        make_case(
            weight_place=weight_place,
            dtype=torch.bfloat16,
            weights_dtype=torch.float32,
            product_dtype=product_dtype,
            out_dtype=out_dtype,
            num_tokens=33,
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("save", ["nothing", "pre_activation"])
def test_no_routing_weights(dtype: torch.dtype, save: str) -> None:
    check(make_case(with_weights=False, dtype=dtype), save)


@pytest.mark.parametrize("edge", EDGE_IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("save", ["nothing", "pre_activation"])
def test_routing_edges(edge: str, dtype: torch.dtype, save: str) -> None:
    check(make_case(ids=torch.tensor(EDGE_IDS[edge]), dtype=dtype, biases=True), save)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens(dtype: torch.dtype) -> None:
    case = make_case(num_tokens=0, dtype=dtype, biases=True)
    y, grads = run_local(case, "pre_activation")
    assert y.shape == case.x.shape
    for name in ("w_in", "w_out", "b_in", "b_out"):
        assert grads[name].shape == getattr(case, name).shape
        assert grads[name].count_nonzero() == 0


@pytest.mark.parametrize(
    ("hidden", "inter"),
    [
        (8, 16),  # every stride a multiple of 16 bytes: aten._grouped_mm
        (6, 16),  # hidden is not
        (8, 5),  # the intermediate dim is not
        (1, 1),
    ],
)
@pytest.mark.parametrize("permuted", [False, True])
def test_alignment_of_bf16(hidden: int, inter: int, permuted: bool) -> None:
    check(make_case(hidden=hidden, inter=inter, permuted=permuted, dtype=torch.bfloat16))


def test_weight_of_a_stray_id_is_not_read() -> None:
    case = make_case(ids=torch.tensor([[0, -1], [3, 1]]))
    assert case.weights is not None
    case.weights[0, 1] = float("nan")
    case.weights[1, 0] = float("inf")
    y, grads = run_local(case, "nothing")
    assert y.isfinite().all()
    assert grads["weights"][0, 1] == 0
    assert grads["weights"][1, 0] == 0
    assert all(grad.isfinite().all() for grad in grads.values())


def test_strided_views_and_an_expanded_gradient() -> None:
    case = make_case(num_tokens=6, dtype=torch.float64)
    expected = run_local(case, "nothing")
    case.x = torch.stack((case.x, case.x), dim=2)[:, :, 0]
    case.ids = case.ids.t().contiguous().t()
    case.w_in = torch.cat((case.w_in, case.w_in), dim=2)[:, :, : case.w_in.shape[2]]
    got = run_local(case, "nothing")
    torch.testing.assert_close(got, expected, check_stride=False)
    case.grad_y = torch.ones((), dtype=torch.float64).expand_as(case.x)
    _, expanded = run_local(case, "nothing")
    case.grad_y = case.grad_y.contiguous()
    torch.testing.assert_close(expanded, run_local(case, "nothing")[1])


@pytest.mark.parametrize("index", range(8))
def test_one_gradient_alone_is_the_same(index: int) -> None:
    case = make_case(separate_up=True, biases=True, weight_place="before")
    _, expected = run_local(case, "nothing")
    needs = [i == index for i in range(8)]
    *grads, token = torch.ops.comet.moe_layer_backward(
        case.grad_y,
        *case.tensors(),
        case.x.new_empty(0),
        None,
        **case.options(),
        needs=needs,
        **LOCAL,
    )
    assert token.shape == (0,)
    for name, grad, need in zip(GRAD_NAMES, grads, needs, strict=True):
        if need:
            torch.testing.assert_close(grad, expected[name], rtol=0, atol=0)
        else:
            assert grad.shape == (0,), name


def test_autograd_of_direct_callers() -> None:
    case = make_case(biases=True)
    leaves = {
        name: value.detach().requires_grad_()
        for name in GRAD_NAMES
        if (value := getattr(case, name)) is not None
    }
    for name, leaf in leaves.items():
        setattr(case, name, leaf)
    y, saved, token = torch.ops.comet.moe_layer(
        *case.tensors(),
        None,
        **case.options(),
        out_dtype=torch.float64,
        save="pre_activation",
        **LOCAL,
    )
    assert not saved.requires_grad
    assert token.shape == (0,)
    grads = torch.autograd.grad(y, list(leaves.values()), case.grad_y, create_graph=True)
    _, expected = token_loop(case)
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad.detach(), expected[name])
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grads[0].sum().backward()


def test_same_bits_every_time() -> None:
    case = make_case(num_tokens=64, dtype=torch.bfloat16, biases=True)
    first: Any = run_local(case, "nothing")
    again = run_local(case, "nothing")
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    saved = run_local(case, "pre_activation")
    torch.testing.assert_close(saved, first, rtol=0, atol=0)
