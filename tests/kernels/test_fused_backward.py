"""The fused backward on one device, in Triton's interpreter, against reference and portable path.

float16 only: bfloat16 goes wrong in the interpreter, and runs in `test_fused_backward_gpu.py`.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from covering import covering
from fused_layers import (
    ACTIVATIONS,
    math,
    params,
    routed,
    small_case,
    small_plan,
    stored_pair,
    tiles,
)
from moe_cases import GRAD_NAMES, Case
from numerics import assert_matches_ref

from comet_compile.kernels import fused, fused_backward, layer1, portable
from comet_compile.kernels.experts import Matrices, Needs, weight_gradients
from comet_compile.kernels.plan import Device, Plan, choose_plan
from comet_compile.kernels.refs import moe_layer_backward_ref

pytestmark = pytest.mark.usefixtures("interpreted")

SMALL = small_plan(tiles(16, 16, 32), tiles(16, 64, 16))


def run(case: Case, needs: Needs | None = None, plan: Plan = SMALL) -> tuple[Tensor | None, ...]:
    """The gradients by the fused path, from the rows that the fused forward saved."""
    args = routed(case), params(case), math(case)
    _, saved = fused.local_forward(*args, case.out_dtype, save=True, plan=plan)
    return fused_backward.local_backward(
        case.grad_y, args[0], saved, *args[1:], needs or Needs(), plan
    )


def portable_grads(case: Case) -> tuple[Tensor | None, ...]:
    """The gradients by the portable path, from the rows that its forward saved."""
    args = routed(case), params(case), math(case)
    _, saved = portable.local_forward(*args, case.out_dtype)
    d_x, d_weights, part = portable.local_backward(case.grad_y, args[0], saved, *args[1:], Needs())
    return d_x, d_weights, *weight_gradients([part], args[1], Needs())


def check(case: Case, plan: Plan = SMALL) -> dict[str, Tensor]:
    """Assert that every gradient errs at most as `numerics` allows; return them by name.

    The reference is in float64, "eager" is the portable path on the same tensors.
    """
    got = run(case, plan=plan)
    wide = case.to(torch.float64)
    refs = moe_layer_backward_ref(
        wide.grad_y, *wide.tensors(), activation=case.activation, weight_place=case.weight_place
    )
    grads = {}
    for name, grad, ref, eager in zip(GRAD_NAMES, got, refs, portable_grads(case), strict=True):
        leaf = getattr(case, name)
        if leaf is None:
            assert grad is None, name
            continue
        assert grad is not None, name
        assert eager is not None, name
        assert grad.dtype == leaf.dtype, name
        if name not in ("x", "weights"):
            assert grad.stride() == torch.empty_like(leaf).stride(), name
        assert_matches_ref(grad, ref, eager, what=f"d_{name}", rounded_to=case.x.dtype)
        grads[name] = grad
    return grads


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    check(small_case(activation=activation))


@pytest.mark.parametrize("activation", ["silu_glu:up_first", "silu_glu:interleaved", "gelu"])
def test_weights_with_contiguous_rows_of_k(activation: str) -> None:
    check(small_case(activation=activation, permuted=True))


@pytest.mark.parametrize(
    ("activation", "permuted", "up_before"),
    covering(["silu_glu", "gelu_glu:up_first:limit=0.5"], [False, True], [False, True]),
)
def test_separate_up(activation: str, permuted: bool, up_before: bool) -> None:
    case = small_case(activation=activation, permuted=permuted, separate_up=True)
    check(stored_pair(case, up_before))


@pytest.mark.parametrize("activation", ["silu_glu:interleaved", "relu2"])
@pytest.mark.parametrize("weights_dtype", [torch.float16, torch.float32])
def test_weights_between_the_gemms(activation: str, weights_dtype: torch.dtype) -> None:
    check(small_case(weight_place="between", activation=activation, weights_dtype=weights_dtype))


@pytest.mark.parametrize("activation", ["silu_glu:interleaved", "relu2"])
@pytest.mark.parametrize("weights_dtype", [torch.float16, torch.float32])
def test_weights_before_the_gemms(activation: str, weights_dtype: torch.dtype) -> None:
    check(small_case(weight_place="before", activation=activation, weights_dtype=weights_dtype))


@pytest.mark.parametrize("permuted", [False, True], ids=["n_contiguous", "k_contiguous"])
def test_weights_before_a_separate_up(permuted: bool) -> None:
    check(small_case(weight_place="before", separate_up=True, permuted=permuted))


@pytest.mark.parametrize("biases", [False, True])
def test_a_weight_of_zero_before_the_gemms_has_a_gradient(biases: bool) -> None:
    # without biases a gate and an up of zeros would leave no gradient
    activation = "silu_glu" if biases else "identity"
    case = small_case(weight_place="before", biases=biases, activation=activation)
    assert case.weights is not None
    case.weights[::2] = 0
    is_routed = (case.ids >= 0) & (case.ids < 3)
    assert torch.equal(check(case)["weights"] != 0, is_routed)


@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize(
    ("activation", "separate_up"),
    [
        ("silu_glu", False),
        ("silu_glu:up_first", True),
        ("swiglu_oai:interleaved:alpha=1.702:limit=1.5", False),
        ("relu2", False),
    ],
)
def test_biases(activation: str, separate_up: bool, weight_place: str) -> None:
    options = {"activation": activation, "separate_up": separate_up, "biases": True}
    grads = check(small_case(**options, weight_place=weight_place))
    assert ("b_up" in grads) == separate_up


@pytest.mark.parametrize("biases", [{"b_in", "b_up"}, {"b_out"}])
def test_some_biases(biases: set[str]) -> None:
    case = small_case(separate_up=True, biases=True)
    kept = {name: getattr(case, name) if name in biases else None for name in GRAD_NAMES[5:]}
    assert biases < check(dataclasses.replace(case, **kept)).keys()


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
def test_no_routing_weights(weight_place: str, biases: bool) -> None:
    grads = check(small_case(with_weights=False, weight_place=weight_place, biases=biases))
    assert "weights" not in grads


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "hidden", "inter"),
    [
        (1, 1, 1, 8, 8),
        (1, 3, 9, 40, 24),
        (2, 3, 20, 40, 24),  # more experts than slots
        (50, 1, 1, 40, 24),  # one expert, several tiles, the last partial
        (32, 2, 2, 64, 64),  # whole tiles
        (3, 4, 3, 72, 136),  # three column tiles of d_h, the last partial
    ],
)
def test_sizes(num_tokens: int, top_k: int, num_experts: int, hidden: int, inter: int) -> None:
    check(
        small_case(
            num_tokens=num_tokens,
            top_k=top_k,
            num_experts=num_experts,
            hidden=hidden,
            inter=inter,
            # the errors of one token's weights say too little: eager's may all be small by chance
            biases=num_tokens > 1,
        )
    )


@pytest.mark.parametrize("weight_place", ["before", "after"])
def test_no_tokens_give_zero_gradients(weight_place: str) -> None:
    case = small_case(num_tokens=0, biases=True, weight_place=weight_place)
    d_x, d_weights, *d_params = run(case)
    assert d_x is not None
    assert d_x.shape == case.x.shape
    assert d_weights is not None
    assert d_weights.shape == (0, 2)
    for name, grad in zip(GRAD_NAMES[2:], d_params, strict=True):
        leaf = getattr(case, name)
        assert (grad is None) == (leaf is None), name
        assert grad is None or torch.equal(grad, torch.zeros_like(leaf)), name


@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize(
    "ids",
    [
        [[0, 2], [2, 0], [0, 0]] * 5,  # expert 1 is empty
        [[1, 1]] * 20,
        [[-1, 3], [7, 2**40]],
        [[2**32, 0], [-(2**32) + 1, 1]],  # 0 and 1 in 32 bits
        [[0, 1], [-1, 2**32], [1, 3]],
    ],
    ids=["empty_expert", "all_to_one", "only_strays", "wraps_in_int32", "token_without_expert"],
)
def test_routing_edges(ids: list[list[int]], weight_place: str) -> None:
    case = small_case(ids=torch.tensor(ids), weight_place=weight_place, biases=True)
    assert case.weights is not None
    stray = (case.ids < 0) | (case.ids > 2)
    case.weights[stray] = float("nan")  # a weight beside a stray id may be anything
    grads = check(case)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["weights"][stray] == 0).all()
    for expert in set(range(3)) - {i for row in ids for i in row}:
        for name in ("w_in", "w_out", "b_in", "b_out"):
            assert not grads[name][expert].any(), name


def test_a_stray_among_several_column_tiles_has_no_gradient() -> None:
    # of the three tiles that any routing may need, two are never written
    case = small_case(ids=torch.tensor([[0, 3], [-1, 0]]), inter=72)
    assert check(case)["weights"].count_nonzero() == 2


@pytest.mark.parametrize("weight_place", [None, "before", "after"])
@pytest.mark.parametrize("name", ["x", "grad_y"])
def test_not_a_number_stays_in_its_token_and_experts(name: str, weight_place: str | None) -> None:
    options = {"with_weights": weight_place is not None, "weight_place": weight_place or "after"}
    ids = torch.tensor([[0, 3], *[[1, 1], [2, 1], [1, 2]] * 5])
    case = small_case(ids=ids, biases=True, **options)
    getattr(case, name)[0, 5] = float("nan")  # token 0 also fills the rows of padding
    grads = check(case)
    assert grads["x"].isfinite().all(1).tolist() == [False] + [True] * 15
    for param in ("w_in", "w_out", "b_in"):
        assert grads[param].flatten(1).isfinite().all(1).tolist() == [False, True, True]


@pytest.mark.parametrize("weight_place", ["before", "after"])
def test_only_what_is_needed(weight_place: str) -> None:
    case = small_case(num_tokens=5, separate_up=True, biases=True, weight_place=weight_place)
    everything = run(case)
    for asked in (*((name,) for name in GRAD_NAMES), ("x", "w_out"), ("w_in", "b_up"), ()):
        needs = Needs(**{name: name in asked for name in GRAD_NAMES})
        for name, grad, full in zip(GRAD_NAMES, run(case, needs), everything, strict=True):
            if name not in asked:
                assert grad is None, (asked, name)
                continue
            assert grad is not None, (asked, name)
            assert full is not None, (asked, name)
            assert torch.equal(grad, full), (asked, name)


@pytest.mark.parametrize("with_weights", [False, True])
def test_sums_of_two_kinds_of_rows_are_rounded_once(with_weights: bool) -> None:
    # the first sums are 2048 + 1, the second -2048: float16 has 2048 and 2050, not 2049
    rows = torch.tensor([[2048.0], [1.0], [7.0]], dtype=torch.float16).expand(3, 40).contiguous()
    others = torch.tensor([[-1024.0], [-1024.0], [9.0]], dtype=torch.float16).expand(3, 40)
    row_S = torch.tensor([0, 1, 2, -1], dtype=torch.int32)
    weights = torch.tensor([[1.0, 1.0], [0.5, float("nan")]]) if with_weights else None
    args = rows, row_S, weights, (2, 2), torch.float32, torch.float16
    y = layer1.sum_slots(*args, others.contiguous())
    expected = [1.0, 8.0 if with_weights else 16.0]
    assert torch.equal(y, torch.tensor(expected, dtype=torch.float16)[:, None].expand(2, 40))


@pytest.mark.parametrize("weight_place", ["before", "after"])
@pytest.mark.parametrize("activation", ["silu_glu", "silu_glu:interleaved", "relu2"])
def test_the_same_bits_again(activation: str, weight_place: str) -> None:
    case = small_case(activation=activation, weight_place=weight_place, biases=True)
    for first, again in zip(run(case), run(case), strict=True):
        assert (first is None and again is None) or torch.equal(first, again)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "plan",
    [
        small_plan(tiles(16, 16, 64), tiles(16, 16, 64)),  # one step of K
        small_plan(tiles(32, 64, 16, num_programs=1), tiles(32, 128, 32, num_programs=1)),
        small_plan(
            tiles(16, 32, 16, num_programs=50), tiles(16, 16, 16, num_programs=50)
        ),  # idle ones
    ],
    ids=["wide_k", "one_program", "more_programs_than_tiles"],
)
@pytest.mark.parametrize("activation", ["silu_glu", "silu_glu:interleaved"])
def test_tilings(plan: Plan, activation: str) -> None:
    check(small_case(activation=activation), plan)


def test_the_chosen_tiles_of_the_weight_gradients() -> None:
    device = Device(num_sms=2, shared_bytes=2**18, capability=(9, 0))
    chosen = choose_plan(40, 3, 136, 136, gated=True, interleaved=False, device=device).grad_weight
    assert chosen.block_m >= 128
    check(
        small_case(num_tokens=20, hidden=136, inter=136),
        dataclasses.replace(SMALL, grad_weight=chosen),
    )


@pytest.mark.parametrize("weight_place", ["before", "after"])
def test_row_sums_of_several_blocks_of_columns(weight_place: str) -> None:
    check(small_case(num_tokens=5, hidden=264, biases=True, weight_place=weight_place))


@pytest.mark.parametrize(
    ("activation", "permuted", "weight_place"),
    covering(["silu_glu", "silu_glu:interleaved", "relu2"], [False, True], ["before", "after"]),
)
def test_gathering_the_tokens_first_gives_the_same_bits(
    activation: str, permuted: bool, weight_place: str
) -> None:
    # 13 tokens of 2 choices, some stray: padding in every expert's last tile
    options = {"activation": activation, "permuted": permuted, "weight_place": weight_place}
    case = small_case(num_tokens=13, biases=True, **options)
    row_by_row = check(case)
    gathered_once = check(case, dataclasses.replace(SMALL, gathers=True))
    for name, grad in gathered_once.items():
        assert torch.equal(grad, row_by_row[name]), name


def test_strided_tensors() -> None:
    case = small_case(num_tokens=9)
    expected = check(case)
    assert case.weights is not None
    strided = dataclasses.replace(
        case,
        x=torch.stack((case.x, case.x), 2)[:, :, 0],
        ids=case.ids.t().contiguous().t(),
        weights=case.weights.t().contiguous().t(),
        grad_y=torch.cat((case.grad_y, case.grad_y), 1)[:, :40],
    )
    for name, grad in check(strided).items():
        assert torch.equal(grad, expected[name]), name
    columns = torch.stack((case.grad_y, case.grad_y), 2)[:, :, 1]
    for name, grad in check(dataclasses.replace(case, grad_y=columns)).items():
        assert torch.equal(grad, expected[name]), name


def test_strided_biases() -> None:
    case = small_case(num_tokens=9, biases=True)
    expected = check(case)
    assert case.b_in is not None
    assert case.b_out is not None
    strided = dataclasses.replace(
        case,
        b_in=case.b_in.t().contiguous().t(),
        b_out=torch.stack((case.b_out, case.b_out), 2)[:, :, 0],
    )
    for name, grad in check(strided).items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize(
    ("activation", "permuted", "weight_place"),
    covering(
        ["silu_glu", "silu_glu:interleaved", "relu2"],
        [False, True],
        ["before", "between", "after"],
    ),
)
def test_rows_computed_again_give_the_same_bits(
    activation: str, permuted: bool, weight_place: str
) -> None:
    options = {"activation": activation, "permuted": permuted, "weight_place": weight_place}
    case = small_case(num_tokens=13, biases=True, **options)
    assert_same_bits_from_computed_rows(case, Needs())


def test_rows_computed_again_for_some_gradients() -> None:
    case = small_case(num_tokens=50, separate_up=True)
    for needs in (Needs(w_in=False), Needs(w_out=False)):
        assert_same_bits_from_computed_rows(case, needs)


@pytest.mark.parametrize("gathers", [False, True])
def test_rows_are_freed_when_they_have_been_read(gathers: bool) -> None:
    case = small_case(num_tokens=13, biases=True)
    plan = dataclasses.replace(SMALL, gathers=gathers)
    args = routed(case), params(case), math(case)
    _, saved = fused.local_forward(*args, case.out_dtype, save=True, plan=plan)
    got = fused_backward.local_backward(
        case.grad_y, args[0], saved, *args[1:], Needs(), plan, frees=True
    )
    assert saved.untyped_storage().nbytes() == 0
    for name, grad, kept in zip(GRAD_NAMES, got, run(case, plan=plan), strict=True):
        assert (grad is None) == (kept is None), name
        assert grad is None or torch.equal(grad, kept), name


@pytest.mark.parametrize(
    ("permuted", "separate_up", "saves"),
    covering([False, True], [False, True], [False, True]),
)
def test_gradients_of_matrices_are_added_to_others(
    permuted: bool, separate_up: bool, saves: bool
) -> None:
    case = small_case(num_tokens=13, permuted=permuted, separate_up=separate_up, biases=True)
    alone = dict(zip(GRAD_NAMES, run(case), strict=True))
    generator = torch.Generator().manual_seed(9)
    before = {}
    for name in ("w_in", "w_up", "w_out"):
        if alone[name] is not None:
            noise = torch.randn(alone[name].shape, generator=generator)
            before[name] = torch.empty_like(alone[name]).copy_(noise)
    into = {name: grad.clone() for name, grad in before.items()}
    args = routed(case), params(case), math(case)
    saved = None
    if saves:
        _, saved = fused.local_forward(*args, case.out_dtype, save=True, plan=SMALL)
    got = fused_backward.local_backward(
        case.grad_y, args[0], saved, *args[1:], Needs(), SMALL,
        Matrices(into["w_in"], into.get("w_up"), into["w_out"], has_values=True),
    )  # fmt: skip
    for name, grad in zip(GRAD_NAMES, got, strict=True):
        if name not in before:
            assert (grad is None) == (alone[name] is None), name
            assert grad is None or torch.equal(grad, alone[name]), name
            continue
        assert grad is None, name
        expected = before[name].double() + alone[name].double()
        # one rounding of the sum, and that of `alone`
        bound = 2.0**-10 * (expected.abs() + alone[name].double().abs()) + 1e-6
        assert ((into[name].double() - expected).abs() <= bound).all(), name
        assert not torch.equal(into[name], before[name]), name


def assert_same_bits_from_computed_rows(case: Case, needs: Needs) -> None:
    args = routed(case), None, params(case), math(case), needs, SMALL
    got = fused_backward.local_backward(case.grad_y, *args)
    for name, grad, kept in zip(GRAD_NAMES, got, run(case, needs), strict=True):
        assert (grad is None) == (kept is None), name
        assert grad is None or torch.equal(grad, kept), name
