"""When the fused path is taken: one test per reason, the same for fake and for real tensors.

No GPU is asked: the tensors are fake CUDA tensors, and the device is described.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

pytest.importorskip("triton", reason="triton is not installed")

from comet_compile.errors import OptionError
from comet_compile.kernels import exchange_paths, expert_weights, fused, paths
from comet_compile.kernels.activation import Activation
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.plan import Device
from comet_compile.kernels.portable import Routed

H200 = Device(num_sms=132, shared_bytes=232448, capability=(9, 0))
MATH = LayerMath(Activation.parse("silu_glu"), "after", torch.float32)


@pytest.fixture(autouse=True)
def _fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("COMET_PORTABLE", raising=False)
    monkeypatch.setattr(fused, "read_device", lambda index: H200)
    with FakeTensorMode():
        yield


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def layer(
    hidden: int = 64, inter: int = 32, dtype: torch.dtype = torch.bfloat16, apart: bool = False
) -> tuple[Routed, ExpertParams]:
    ids = torch.empty(8, 2, dtype=torch.int64, device="cuda")
    columns = inter if apart else 2 * inter
    params = ExpertParams(
        empty(4, hidden, columns, dtype=dtype),
        empty(4, hidden, inter, dtype=dtype) if apart else None,
        empty(4, inter, hidden, dtype=dtype),
    )
    return Routed(empty(8, hidden, dtype=dtype), ids, empty(8, 2, dtype=torch.float32)), params


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fake_tensors_are_taken_and_planned(apart: bool, dtype: torch.dtype) -> None:
    routed, params = layer(dtype=dtype, apart=apart)
    assert paths.why_portable(routed, params, MATH) is None
    plan = fused.plan_layer(routed, params, MATH).as_dict()
    assert plan["path"] == "fused"
    assert plan["layer0"]["block_m"] == plan["layer1"]["block_m"]


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMET_PORTABLE", "1")
    assert paths.why_portable(*layer(), MATH) == "COMET_PORTABLE is set"
    monkeypatch.setenv("COMET_PORTABLE", "0")
    assert paths.why_portable(*layer(), MATH) is None


def test_tensors_on_the_cpu() -> None:
    routed, params = layer()
    cpu = dataclasses.replace(routed, x=torch.empty(8, 64, dtype=torch.bfloat16))
    assert "on cpu" in str(paths.why_portable(cpu, params, MATH))


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    old = dataclasses.replace(H200, capability=(7, 5))
    monkeypatch.setattr(fused, "read_device", lambda index: old)
    assert "compute capability (7, 5)" in str(paths.why_portable(*layer(), MATH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes(dtype: torch.dtype) -> None:
    assert f"dtype {dtype}" in str(paths.why_portable(*layer(dtype=dtype), MATH))


def test_products_in_float64() -> None:
    math = dataclasses.replace(MATH, product_dtype=torch.float64)
    assert "multiplied in torch.float64" in str(paths.why_portable(*layer(), math))


@pytest.mark.parametrize(("hidden", "inter"), [(60, 32), (64, 36)])
def test_sizes_that_are_no_multiples_of_8(hidden: int, inter: int) -> None:
    assert "multiples of 8" in str(paths.why_portable(*layer(hidden, inter), MATH))


# strides of [4, rows, columns] weights
def _broadcast(rows: int, columns: int) -> tuple[int, int, int]:
    return (0, columns, 1)


def _every_other_column(rows: int, columns: int) -> tuple[int, int, int]:
    return (2 * rows * columns, 2 * columns, 2)


def _odd_pitch(rows: int, columns: int) -> tuple[int, int, int]:
    return (rows * (columns + 1), columns + 1, 1)


def _odd_expert(rows: int, columns: int) -> tuple[int, int, int]:
    return (rows * columns + 4, columns, 1)


@pytest.mark.parametrize("name", ["w_in", "w_up", "w_out"])
@pytest.mark.parametrize(
    ("strides", "reason"),
    [
        (_broadcast, "broadcast"),
        (_every_other_column, "neither dim of the weights is contiguous"),
        (_odd_pitch, "not multiples of 16 bytes apart"),
        (_odd_expert, "not multiples of 16 bytes apart"),
    ],
)
def test_strides_that_no_box_has(
    name: str, strides: Callable[[int, int], tuple[int, int, int]], reason: str
) -> None:
    routed, params = layer(apart=True)
    shape = getattr(params, name).shape
    weight = torch.empty_strided(
        shape, strides(shape[1], shape[2]), dtype=torch.bfloat16, device="cuda"
    )
    params = dataclasses.replace(params, **{name: weight})
    assert reason in str(paths.why_portable(routed, params, MATH))


def test_gate_and_up_of_different_layout() -> None:
    routed, params = layer(apart=True)
    up = empty(4, 32, 64).transpose(1, 2)
    params = dataclasses.replace(params, w_up=up)
    assert paths.why_portable(routed, params, MATH) == "w_in and w_up differ in layout"


def test_a_bias_of_gate_or_up_alone() -> None:
    routed, params = layer(apart=True)
    bias = empty(4, 32)
    for names in ((), ("b_in", "b_up")):
        both = dataclasses.replace(params, **dict.fromkeys(names, bias))
        assert paths.why_portable(routed, both, MATH) is None
    for name, weight in (("b_in", "w_in"), ("b_up", "w_up")):
        one = dataclasses.replace(params, **{name: bias})
        reason = f"of w_in and w_up, {weight} alone has a bias"
        assert paths.why_portable(routed, one, MATH) == reason
    routed, params = layer()
    fused_pair = dataclasses.replace(params, b_in=empty(4, 64))
    assert paths.why_portable(routed, fused_pair, MATH) is None


def test_weights_that_begin_between_two_boxes() -> None:
    with unset_fake_temporarily():  # fake tensors have no address
        storage = torch.empty(4 * 64 * 32 + 8, dtype=torch.bfloat16)
        start = 4 if storage.data_ptr() % 16 == 0 else 0
        weight = storage[start : start + 4 * 64 * 32].view(4, 64, 32)
        assert "16 bytes" in str(expert_weights.why_not(weight))
        assert expert_weights.why_not(torch.empty(4, 64, 32, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize(
    ("form", "launcher", "portable", "reads_host", "may_keep"),
    [
        ("all_to_all", "2", "0", False, True),
        ("all_to_all", "1", "0", True, False),  # one process on each machine
        ("all_to_all", None, "0", True, True),  # who knows
        ("all_to_all", "2", "1", True, False),
        ("replicated", "1", "0", False, True),
        ("replicated", "1", "1", False, True),
    ],
)
def test_what_a_graph_is_told_of_the_path(
    form: str,
    launcher: str | None,
    portable: str,
    reads_host: bool,
    may_keep: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if launcher is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", launcher)
    monkeypatch.setenv("COMET_PORTABLE", portable)
    monkeypatch.setattr(paths.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(paths.dist, "get_world_size", lambda: 2)
    found = paths.choose_path(form, *layer(), MATH, rows=16)
    assert found.is_fused == (portable == "0")
    assert (found.reads_host, found.may_keep) == (reads_host, may_keep)
    assert ("why_portable" in found.plan) == (portable == "1")


def test_row_memory_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    read = exchange_paths.row_bytes.__wrapped__
    monkeypatch.delenv(exchange_paths.ROW_MEMORY, raising=False)
    assert read() == (4 * 2**30, 12 * 2**30)
    monkeypatch.setenv(exchange_paths.ROW_MEMORY, "256")
    assert read() == (2**28, 2**28)
    for text in ("0", "-1", "1.5", "much"):
        monkeypatch.setenv(exchange_paths.ROW_MEMORY, text)
        with pytest.raises(OptionError, match=f"COMET_ROW_MEMORY is '{text}'; allowed: an integer"):
            read()
