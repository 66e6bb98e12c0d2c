"""The fused path of comet::moe_layer on one GPU: values, bits, no host read, CUDA graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from device_layers import DEVICE, make_layer
from fused_layers import ACTIVATIONS, math, params, routed, small_case, stored_pair
from moe_cases import Case
from numerics import assert_matches_ref
from poison import poisoned_memory
from tile_tables import Tables, route_tiles_ref

from comet_compile.kernels import (
    ops,  # noqa: F401, registers the ops
    paths,
    portable,
)
from comet_compile.kernels.refs import moe_layer_ref
from comet_compile.kernels.route_tiles import route_tiles
from comet_compile.kernels.saved_rows import unpack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPT_OSS = "swiglu_oai:interleaved:alpha=1.702:limit=7.0"


def run(case: Case, save: str = "pre_activation") -> tuple[Tensor, Tensor]:
    """Run the op on poisoned memory and return (y, the saved rows that have an expert)."""
    with poisoned_memory():
        y, saved, _ = torch.ops.comet.moe_layer(*case.tensors(), None, **op_options(case, save))
    return y, rows_of(saved, case)


def rows_of(saved: Tensor, case: Case) -> Tensor:
    rows = unpack(saved, case.x.dtype)
    return saved if rows is None else rows[: num_rows(case)]


def op_options(case: Case, save: str) -> dict[str, Any]:
    options: dict[str, Any] = {**case.options(), "out_dtype": case.out_dtype, "save": save}
    return {**options, "form": "local", "group_name": ""}


def num_rows(case: Case) -> int:
    return int(((case.ids >= 0) & (case.ids < case.w_in.shape[0])).sum())


def why_portable(case: Case) -> str | None:
    return paths.why_portable(routed(case), params(case), math(case))


def check(case: Case) -> tuple[Tensor, Tensor]:
    """Assert that the op runs fused and errs at most twice as much as the portable path."""
    assert why_portable(case) is None
    y, saved = run(case)
    ref = moe_layer_ref(*case.tensors(), activation=case.activation, weight_place=case.weight_place)
    eager, eager_saved = portable.local_forward(
        routed(case), params(case), math(case), case.out_dtype
    )
    # as float64: a float32 result is made of 16 bit rows, and errs as they do
    assert_matches_ref(y, ref.double(), eager, what="y")
    if not (case.weight_place == "before" and case.weights is not None):
        assert_close_rows(saved, eager_saved[: num_rows(case)])
    return y, saved


def assert_close_rows(got: Tensor, eager: Tensor) -> None:
    """Two roundings of one float32 sum, and one of a bias: three steps of the largest value."""
    assert got.shape == eager.shape
    if got.numel() == 0:
        return
    bound = 3 * torch.finfo(got.dtype).eps * eager.float().abs().max()
    assert (got.float() - eager.float()).abs().max() <= bound


CASES: dict[str, dict[str, Any]] = {
    "odd_multiples_of_8": {"sizes": (20, 2, 3, 40, 24)},
    "olmoe_like": {"sizes": (777, 4, 60, 2048, 1408)},
    "strays": {"sizes": (300, 8, 16, 256, 192), "strays": True},
    "strays_many_experts": {"sizes": (2000, 2, 256, 512, 256), "strays": True},
    "n_contiguous": {"sizes": (1000, 2, 8, 512, 256), "k_contiguous": False},
    "n_contiguous_apart": {
        "sizes": (1000, 2, 8, 512, 256), "k_contiguous": False, "apart": True, "biases": True,
    },
    "k_contiguous_apart": {
        "sizes": (1000, 2, 8, 512, 264), "activation": "silu_glu:up_first", "apart": True,
        "biases": True,
    },
    "gpt_oss": {
        "sizes": (500, 4, 32, 2880, 2880), "activation": GPT_OSS, "k_contiguous": False,
        "biases": True,
    },
    "before": {
        "sizes": (500, 4, 8, 512, 256), "activation": "silu_glu:interleaved", "biases": True,
        "weight_place": "before",
    },
    "between": {
        "sizes": (500, 1, 8, 512, 256), "activation": "gelu_glu", "weight_place": "between",
    },
    "relu2": {"sizes": (500, 2, 8, 520, 200), "activation": "relu2", "biases": True},
    "gelu_fp16": {"sizes": (500, 2, 8, 512, 256), "activation": "gelu", "dtype": torch.float16},
    "gelu_tanh_glu": {"sizes": (500, 2, 8, 512, 256), "activation": "gelu_tanh_glu"},
    "relu_glu": {"sizes": (500, 2, 8, 512, 256), "activation": "relu_glu"},
    "sigmoid_glu": {"sizes": (500, 2, 8, 512, 256), "activation": "sigmoid_glu:limit=1.0"},
    "one_expert": {"sizes": (5000, 1, 1, 512, 256), "activation": "identity"},
    "bf16_products": {"sizes": (900, 8, 64, 512, 256), "weights_dtype": torch.bfloat16},
    "sum_in_several_blocks": {"sizes": (64, 2, 4, 4104, 64)},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_and_bits(name: str) -> None:
    options = dict(CASES[name])
    case = make_layer(*options.pop("sizes"), **options)
    y, saved = check(case)
    again, saved_again = run(case)
    assert torch.equal(again, y)
    assert torch.equal(saved_again, saved)
    without, nothing = run(case, "nothing")
    assert torch.equal(without, y)
    assert nothing.numel() == 0


@pytest.mark.parametrize("num_tokens", [1, 3, 64, 256])
def test_decode_sizes(num_tokens: int) -> None:
    check(make_layer(num_tokens, 8, 128, 2048, 768))


@pytest.mark.parametrize("ids", [[[-1, 9]] * 5, [[1, 1]] * 300], ids=["no_expert", "one_expert"])
def test_routing_edges(ids: list[list[int]]) -> None:
    case = make_layer(len(ids), 2, 4, 128, 64, biases=True)
    y, _ = check(dataclasses.replace(case, ids=torch.tensor(ids, device=DEVICE)))
    assert y.isfinite().all()


def test_no_tokens() -> None:
    y, saved = run(make_layer(0, 2, 4, 64, 64))
    assert y.shape == (0, 64)
    assert saved.shape == (0, 128)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    case = small_case(dtype=torch.bfloat16, activation=activation, biases=True).on(DEVICE)
    check(case)
    case.x[2, 3] = float("nan")
    case.ids[2] = 1
    y, _ = run(case)
    assert y.isnan().all(1).nonzero().flatten().tolist() == [2]


def test_not_a_number_stays_in_its_token() -> None:
    case = make_layer(200, 2, 4, 128, 64)
    assert case.weights is not None
    case.weights[0, 1] = float("nan")  # token 0 also fills the rows of padding
    case.x[17, 5] = float("nan")
    y, _ = run(case)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [0, 17]


@pytest.mark.parametrize("strays", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_routing_tables_of_65536_tokens(strays: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    low, high = (-2, 131) if strays else (0, 128)
    ids = torch.randint(low, high, (65536, 8), generator=generator, device=DEVICE, dtype=dtype)
    with poisoned_memory():
        first, again = (route_tiles(ids, 128, 128) for _ in range(2))
    got = Tables.read(first)
    expected = route_tiles_ref(ids, 128, 128)
    for field in dataclasses.fields(Tables):  # without the texts of lists of half a million
        same = getattr(got, field.name) == getattr(expected, field.name)
        assert same, field.name
    assert Tables.read(again) == got


@pytest.mark.parametrize("save", ["nothing", "pre_activation"])
def test_the_host_never_waits(save: str) -> None:
    case = make_layer(300, 8, 16, 256, 192, strays=True, biases=True)
    options = op_options(case, save)
    torch.ops.comet.moe_layer(*case.tensors(), None, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ops.comet.moe_layer(*case.tensors(), None, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_tokens", [4, 500])
def test_a_cuda_graph_replays_other_routings(num_tokens: int) -> None:
    static = make_layer(num_tokens, 4, 16, 256, 192, biases=True)
    assert static.weights is not None
    options = op_options(static, "pre_activation")

    def call() -> tuple[Tensor, Tensor]:
        return torch.ops.comet.moe_layer(*static.tensors(), None, **options)[:2]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with poisoned_memory(), torch.cuda.graph(graph):
        y, saved = call()

    def fresh(seed: int) -> Case:
        return make_layer(num_tokens, 4, 16, 256, 192, strays=seed == 1, seed=seed)

    one, few = fresh(2), fresh(3)
    one.ids.fill_(11)
    few.ids.remainder_(3)  # experts 3 to 15 are empty
    for case in (fresh(1), one, few, fresh(4)):
        assert case.weights is not None
        static.x.copy_(case.x)
        static.ids.copy_(case.ids)
        static.weights.copy_(case.weights)
        graph.replay()
        expected, expected_saved = run(static)
        assert torch.equal(y, expected)
        assert torch.equal(rows_of(saved, static), expected_saved)
        assert y.isfinite().all()


def test_token_rows_at_any_address() -> None:
    case = make_layer(100, 2, 8, 256, 128)
    expected, _ = check(case)
    storage = torch.empty(case.x.numel() + 1, dtype=case.x.dtype, device=DEVICE)
    shifted = storage[1:].view_as(case.x).copy_(case.x)
    y, _ = check(dataclasses.replace(case, x=shifted))
    assert torch.equal(y, expected)


def test_calls_that_differ_in_one_thing_share_no_kernel() -> None:
    case = make_layer(130, 2, 4, 64, 48, apart=True, biases=True)
    other = make_layer(130, 2, 4, 64, 48, apart=True, biases=True, seed=1)
    assert case.weights is not None
    assert case.b_in is not None
    storage = torch.empty(case.x.numel() + 1, dtype=case.x.dtype, device=DEVICE)
    variants = {
        "first": case,
        "other_values": dataclasses.replace(other, ids=case.ids),
        "shifted_rows": dataclasses.replace(case, x=storage[1:].view_as(case.x).copy_(case.x)),
        "strided_rows": dataclasses.replace(case, x=torch.cat((case.x, case.x), 1)[:, :64]),
        "int32_ids": dataclasses.replace(case, ids=case.ids.int()),
        "strided_ids": dataclasses.replace(case, ids=case.ids.t().contiguous().t()),
        "narrow_weights": dataclasses.replace(case, weights=case.weights.to(case.x.dtype)),
        "no_weights": dataclasses.replace(case, weights=None),
        "strided_bias": dataclasses.replace(case, b_in=torch.cat((case.b_in,) * 2, 1)[:, :48]),
        "no_biases": dataclasses.replace(case, b_in=None, b_up=None, b_out=None),
        "up_in_front": stored_pair(case, True),
        "up_behind": stored_pair(case, False),
        "up_first": dataclasses.replace(case, activation="silu_glu:up_first"),
        "clamped": dataclasses.replace(case, activation="silu_glu:limit=0.5"),
        "clamped_elsewhere": dataclasses.replace(case, activation="silu_glu:limit=0.25"),
        "wide_result": dataclasses.replace(case, out_dtype=torch.float32),
        "one_token_less": dataclasses.replace(
            case, x=case.x[1:], ids=case.ids[1:], weights=case.weights[1:]
        ),
    }
    expected = {name: check(variant) for name, variant in variants.items()}
    for name in reversed(variants):
        y, saved = run(variants[name])
        assert torch.equal(y, expected[name][0]), name
        assert torch.equal(saved, expected[name][1]), name
    for name in ("shifted_rows", "strided_rows", "int32_ids", "strided_ids", "strided_bias"):
        assert torch.equal(expected[name][0], expected["first"][0]), name


@pytest.mark.parametrize("name", ["w_in", "w_out"])
def test_unaligned_weights_take_the_portable_path(name: str) -> None:
    case = make_layer(100, 2, 8, 256, 128, k_contiguous=False)
    weight = getattr(case, name)
    storage = torch.empty(weight.numel() + 4, dtype=weight.dtype, device=DEVICE)
    shifted = dataclasses.replace(case, **{name: storage[4:].view_as(weight).copy_(weight)})
    assert "multiple of 16 bytes" in str(why_portable(shifted))
    y, _, _ = torch.ops.comet.moe_layer(*shifted.tensors(), None, **op_options(shifted, "nothing"))
    ref = moe_layer_ref(*case.tensors(), activation="silu_glu", weight_place="after")
    eager, _ = portable.local_forward(routed(case), params(case), math(case), case.out_dtype)
    assert_matches_ref(y, ref, eager)


def test_the_switch_takes_the_portable_path(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_layer(100, 2, 8, 256, 128)
    monkeypatch.setenv("COMET_PORTABLE", "1")
    assert why_portable(case) == "COMET_PORTABLE is set"
    y, _, _ = torch.ops.comet.moe_layer(*case.tensors(), None, **op_options(case, "nothing"))
    eager, _ = portable.local_forward(routed(case), params(case), math(case), case.out_dtype)
    assert torch.equal(y, eager)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_on_another_gpu_than_the_current_one() -> None:
    case = make_layer(100, 2, 8, 256, 128, biases=True)
    expected, _ = check(case)
    with torch.cuda.device(0):
        y, _ = run(case.on("cuda:1"))
    assert torch.equal(y.cpu(), expected.cpu())
