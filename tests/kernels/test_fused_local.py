"""The whole fused path on one device, in Triton's interpreter, against reference and portable path.

float16 and float32: bfloat16 goes wrong in the interpreter, and runs in `test_moe_layer_gpu.py`.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from covering import covering
from fused_layers import (
    ACTIVATIONS,
    SMALL,
    check_fused,
    math,
    params,
    routed,
    small_case,
    small_plan,
    stored_pair,
    tiles,
)

from comet_compile.kernels import fused, layer0
from comet_compile.kernels.activation import GATED_KINDS, PLAIN_KINDS
from comet_compile.kernels.plan import Device, Plan, choose_plan
from comet_compile.kernels.route_tiles import max_tiles, route_tiles

pytestmark = pytest.mark.usefixtures("interpreted")


def test_every_activation_is_tested() -> None:
    assert {name.split(":")[0] for name in ACTIVATIONS} == {*GATED_KINDS, *PLAIN_KINDS}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    check_fused(small_case(activation=activation, biases=True))


@pytest.mark.parametrize("activation", ["silu_glu:up_first", "silu_glu:interleaved", "gelu"])
def test_weights_with_contiguous_rows_of_k(activation: str) -> None:
    check_fused(small_case(activation=activation, permuted=True, biases=True))


@pytest.mark.parametrize(
    ("activation", "permuted", "up_before"),
    covering(["silu_glu", "gelu_glu:up_first:limit=0.5"], [False, True], [False, True]),
)
def test_separate_up(activation: str, permuted: bool, up_before: bool) -> None:
    case = small_case(activation=activation, permuted=permuted, biases=True, separate_up=True)
    check_fused(stored_pair(case, up_before))


@pytest.mark.parametrize(
    ("weight_place", "biases", "product_dtype", "out_dtype"),
    covering(
        ["before", "between", "after"],
        [False, True],
        [torch.float16, torch.float32],
        [torch.float16, torch.float32],
    ),
)
def test_weight_places(
    weight_place: str, biases: bool, product_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    check_fused(
        small_case(
            weight_place=weight_place,
            biases=biases,
            product_dtype=product_dtype,
            out_dtype=out_dtype,
            activation="silu_glu:interleaved",
        )
    )


@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
def test_no_routing_weights(weight_place: str) -> None:
    check_fused(small_case(with_weights=False, weight_place=weight_place, biases=True))


@pytest.mark.parametrize("weights_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes(weights_dtype: torch.dtype, dtype: torch.dtype) -> None:
    check_fused(small_case(dtype=dtype, weights_dtype=weights_dtype, biases=True))


@pytest.mark.parametrize("top_k", range(1, 9))
def test_top_k(top_k: int) -> None:
    check_fused(small_case(num_tokens=9, top_k=top_k, num_experts=5))


@pytest.mark.parametrize(
    ("num_tokens", "num_experts"),
    [
        (1, 3),
        (3, 40),  # more experts than slots
        (70, 1),  # one expert, several tiles, the last partial
        (32, 2),
    ],
)
def test_token_counts(num_tokens: int, num_experts: int) -> None:
    check_fused(small_case(num_tokens=num_tokens, num_experts=num_experts))


def test_a_token_row_summed_in_two_blocks() -> None:
    plan = small_plan(tiles(16, 16, 512), tiles(16, 512, 16))
    check_fused(small_case(num_tokens=5, hidden=2056, permuted=True), plan)


@pytest.mark.parametrize("save", [False, True])
def test_no_tokens(save: bool) -> None:
    case = small_case(num_tokens=0)
    y, saved = fused.local_forward(
        routed(case), params(case), math(case), torch.float16, save=save, plan=SMALL
    )
    assert y.shape == case.x.shape
    assert saved.shape == ((0, 48) if save else (0,))


@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize(
    "ids",
    [
        [[0, 2], [2, 0], [0, 0]],  # expert 1 is empty
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
    # a weight beside a stray id may be anything
    case.weights[(case.ids < 0) | (case.ids > 2)] = float("nan")
    y = check_fused(case)
    assert y.isfinite().all()


@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_stays_in_its_token(weight_place: str, value: float) -> None:
    case = small_case(ids=torch.tensor([[0, 1], [1, 2], [2, -1], [0, 2]]))
    case.weight_place = weight_place
    assert case.weights is not None
    case.weights[0, 1] = float("nan")  # token 0 also fills the rows of padding
    case.weights[2, 1] = value  # stray
    y = check_fused(case)
    assert y.isfinite().all(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_goes_through_every_activation(activation: str) -> None:
    case = small_case(ids=torch.tensor([[0, 1], [1, 2], [2, 0]]), activation=activation)
    case.x[0, 3] = float("nan")
    y = check_fused(case)
    assert y.isnan().all(1).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("plan", "activation", "permuted"),
    covering(
        [
            small_plan(tiles(16, 16, 64), tiles(16, 16, 64)),  # one step of K
            small_plan(tiles(32, 64, 16, num_programs=1), tiles(32, 64, 32, num_programs=1)),
            small_plan(
                tiles(16, 32, 16, num_programs=50), tiles(16, 16, 16, num_programs=50)
            ),  # idle ones
        ],
        ["silu_glu", "silu_glu:interleaved", "relu2"],
        [False, True],
    ),
)
def test_tilings(plan: Plan, activation: str, permuted: bool) -> None:
    check_fused(small_case(activation=activation, permuted=permuted, biases=True), plan)


@pytest.mark.parametrize("num_tokens", [4, 60, 150])
def test_chosen_plans(num_tokens: int) -> None:
    case = small_case(
        num_tokens=num_tokens, hidden=40, inter=72, permuted=True, dtype=torch.float32
    )
    device = Device(num_sms=2, shared_bytes=232448, capability=(9, 0))
    plan = choose_plan(num_tokens * 2, 3, 40, 72, gated=True, interleaved=False, device=device)
    check_fused(case, plan)


@pytest.mark.parametrize("activation", ["silu_glu", "silu_glu:up_first"])
def test_strided_tensors(activation: str) -> None:
    case = small_case(activation=activation, biases=True, separate_up=True)
    expected = check_fused(case)
    assert case.weights is not None
    assert case.b_in is not None
    assert case.b_out is not None
    strided = dataclasses.replace(
        case,
        x=torch.stack((case.x, case.x), 2)[:, :, 0],
        ids=case.ids.t().contiguous().t(),
        weights=case.weights.t().contiguous().t(),
        # unlike b_up: half of a fused bias, and every other column of one
        b_in=torch.cat((case.b_in, case.b_in), 1)[:, :24],
        b_out=torch.stack((case.b_out, case.b_out), 2)[:, :, 1],
    )
    torch.testing.assert_close(check_fused(strided), expected, rtol=0, atol=0)
    rows = dataclasses.replace(case, x=torch.cat((case.x, case.x), 1)[:, :40])
    torch.testing.assert_close(check_fused(rows), expected, rtol=0, atol=0)


def test_an_expanded_token_row() -> None:
    case = small_case()
    check_fused(dataclasses.replace(case, x=case.x[:1].expand(21, 40)))


def test_same_bits_every_time() -> None:
    case = small_case(num_tokens=40, biases=True)
    torch.testing.assert_close(check_fused(case), check_fused(case), rtol=0, atol=0)


def test_tiles_that_keep_pace() -> None:
    """In the interpreter nobody comes while a program waits: it goes on after some rounds."""
    paced = dataclasses.replace(SMALL, layer0=dataclasses.replace(SMALL.layer0, paced=True))
    case = small_case(num_tokens=70, num_experts=5)
    assert torch.equal(check_fused(case, paced), check_fused(case))


def test_every_tile_arrives_once_where_it_is_counted() -> None:
    paced = dataclasses.replace(SMALL.layer0, paced=True)
    case = small_case(num_tokens=70, num_experts=5)
    inter, num_slots = case.w_out.shape[1], case.ids.numel()
    num_arrivals = paced.num_arrivals(max_tiles(num_slots, 5, paced.block_m), inter)
    routing = route_tiles(case.ids, 5, paced.block_m, num_arrivals)
    assert routing.arrive.shape == (num_arrivals,)
    assert not routing.arrive.any()
    args = case.x, case.weights, routing, params(case), math(case), paced, case.ids.shape[1]
    layer0.gather_gemm_act(*args)
    num_tiles = int(routing.num_tiles) * -(-inter // paced.block_n)
    full, rest = divmod(num_tiles, paced.group_m)
    wanted = [paced.group_m] * full + [rest] * (rest > 0)
    assert routing.arrive.tolist() == wanted + [0] * (num_arrivals - len(wanted))
