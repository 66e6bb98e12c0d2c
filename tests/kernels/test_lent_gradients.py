"""Gradients that are lent to a backward: who gets them, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from moe_cases import make_case
from torch import Tensor, nn

import comet_compile
from comet_compile.kernels import ops  # noqa: F401, registers the ops
from comet_compile.kernels.lent_gradients import LOANS

E, H, N = 3, 8, 32


@pytest.fixture(autouse=True)
def _nothing_stays_lent() -> Iterator[None]:
    yield
    assert LOANS.are_none


def parameter(*shape: int, value: float = 1.0) -> nn.Parameter:
    result = nn.Parameter(torch.zeros(shape or (E, H, N)))
    result.grad = torch.full_like(result, value)
    return result


def lend(*parameters: nn.Parameter) -> list[bool]:
    """Which of them lend their gradient; they get it back."""
    with comet_compile.accumulate_gradients(parameters):
        return [p.grad is None for p in parameters]


def test_what_is_lent() -> None:
    shared = parameter()
    twin = nn.Parameter(shared.detach())
    twin.grad = torch.ones_like(twin)
    hooked, watched, none, narrow = parameter(), parameter(), parameter(), parameter()
    hooked.register_hook(lambda grad: grad)
    watched.register_post_accumulate_grad_hook(lambda p: None)
    none.grad = None
    narrow.grad = torch.ones(E, N, H).transpose(1, 2)  # in other strides than the parameter
    parameters = shared, twin, hooked, watched, none, narrow, parameter(4, 4)
    assert lend(*parameters) == [True, False, False, False, True, False, False]
    assert none.grad is None
    for one in (shared, twin, hooked, watched, narrow):
        assert one.grad is not None
        assert (one.grad == 1).all()


def test_views_of_the_whole_parameter_take_its_gradient() -> None:
    whole = parameter()
    with comet_compile.accumulate_gradients([whole]):
        for part in (whole[1:], whole[:, :, :16], whole.double(), whole.detach().clone()):
            assert LOANS.take([part]) is None
        assert LOANS.take([whole.transpose(1, 2), parameter()]) is None, "all or none"
        assert LOANS.take([whole, whole]) is None, "one memory for two"
        (taken,) = LOANS.take([whole.detach().transpose(1, 2)]) or []
        assert taken.shape == (E, N, H)
        taken[0, 5, 2] = 7
        assert LOANS.take([whole]) is None, "lent once"
        assert whole.grad is None
    assert whole.grad is not None  # no backward has put it back
    assert whole.grad[0, 2, 5] == 7


def test_what_nobody_takes_is_added_at_the_end() -> None:
    weight = parameter(value=2.0)
    before = weight.grad
    with comet_compile.accumulate_gradients([weight]):
        (3 * weight).sum().backward()
        assert weight.grad is not None
        assert (weight.grad == 3).all()
    assert weight.grad is before
    assert (before == 5).all()


def test_it_ends_after_an_error_too() -> None:
    weight = parameter()
    with pytest.raises(KeyError), comet_compile.accumulate_gradients([weight]):
        raise KeyError
    assert weight.grad is not None
    assert (weight.grad == 1).all()


def test_a_parameter_that_moves_leaves_nothing_lent() -> None:
    weight = parameter(value=2.0)
    with comet_compile.accumulate_gradients([weight]):
        weight.data = weight.data.clone()
    assert LOANS.are_none
    assert weight.grad is not None
    assert (weight.grad == 2).all()


def run_twice(accumulates: bool, permuted: bool, separate_up: bool) -> dict[str, Tensor | None]:
    """The gradients after two passes over two layers that share their matrices."""
    case = make_case(permuted=permuted, separate_up=separate_up, dtype=torch.float64)
    leaves = {}
    for name in ("w_in", "w_up", "w_out"):
        value = getattr(case, name)
        if value is None:
            continue
        # as a model has them: contiguous parameters, of which the op sees a view
        held = value.transpose(1, 2).contiguous() if permuted else value.contiguous()
        leaves[name] = nn.Parameter(held)
        setattr(case, name, leaves[name].transpose(1, 2) if permuted else leaves[name])
    options = {**case.options(), "form": "local", "group_name": "", "save": "pre_activation"}
    for _ in range(2):
        y = case.x
        for _ in range(2):
            y, *_ = torch.ops.comet.moe_layer(
                y, *case.tensors()[1:], None, **options, out_dtype=torch.float64
            )
        if accumulates:
            with comet_compile.accumulate_gradients(leaves.values()):
                y.backward(case.grad_y)
        else:
            y.backward(case.grad_y)
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("separate_up", [False, True])
def test_gradients_are_what_they_would_be(permuted: bool, separate_up: bool) -> None:
    lent = run_twice(True, permuted, separate_up)
    for name, grad in run_twice(False, permuted, separate_up).items():
        torch.testing.assert_close(lent[name], grad, rtol=1e-12, atol=1e-12, msg=name)


def test_a_backward_adds_where_the_gradient_lies() -> None:
    case = make_case(dtype=torch.float64)
    case.w_in, case.w_out = nn.Parameter(case.w_in), nn.Parameter(case.w_out)
    memory = []
    for _ in range(2):
        y, *_ = torch.ops.comet.moe_layer(
            *case.tensors(), None, **case.options(), out_dtype=torch.float64, form="local",
            group_name="", save="nothing",
        )  # fmt: skip
        with comet_compile.accumulate_gradients([case.w_in, case.w_out]):
            y.backward(case.grad_y)
            assert LOANS.are_none, "the backward took what was lent"
        memory.append([case.w_in.grad.data_ptr(), case.w_out.grad.data_ptr()])
    assert memory[0] == memory[1]
