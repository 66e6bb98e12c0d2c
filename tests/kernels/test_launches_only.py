"""The fused paths allocate, view and launch, and do nothing else, so their calls can be replayed.

Nothing is launched here: a recording is made of what would be, and refuses by name what it could
not repeat.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from exchange_ranks import LocalWorkspace
from fused_layers import SMALL, math, params, routed, small_case, stored_pair
from moe_cases import GRAD_NAMES, Case
from triton.tools.tensor_descriptor import TensorDescriptor

from comet_compile.kernels import (
    exchange_entry,
    exchange_plan,
    fused,
    fused_backward,
    fused_exchange,
    launch,
    launch_log,
)
from comet_compile.kernels.experts import Matrices, Needs
from comet_compile.kernels.launch_log import LaunchLog, logging_to
from comet_compile.kernels.packed_launch import UnknownLayoutError
from comet_compile.kernels.plan import Device
from comet_compile.kernels.recording import Recording, Results
from comet_compile.kernels.workspace import Layout

H200 = Device(num_sms=132, shared_bytes=232448, capability=(9, 0))


class Packed:
    """Says which arguments of a launch are addresses, whatever the kernel."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        assert len(grid) == 3
        assert 0 not in grid, "Triton leaves such a launch out, the driver would refuse it"
        at = list(enumerate(args))
        self.pointer_args = [i for i, arg in at if arg is None or isinstance(arg, Tensor)]
        self.map_args = [i for i, arg in at if isinstance(arg, TensorDescriptor)]
        self.addresses: dict[int, int] = {}


@pytest.fixture(autouse=True)
def _launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        launch_log.note_launch(SimpleNamespace(module="loaded"), grid, args)

    real = launch.launch
    for name, module in list(sys.modules.items()):
        if name.startswith("comet_compile.kernels.") and vars(module).get("launch") is real:
            monkeypatch.setattr(module, "launch", note)
    monkeypatch.setattr(launch_log, "PackedLaunch", Packed)


def record(
    call: Callable[[], Results], *inputs: Tensor | None, constants: tuple[Tensor, ...] = ()
) -> Recording:
    """Return the recording of a call, which raises UnknownLayoutError where there can be none."""
    noted = LaunchLog(inputs, constants)
    with torch._C._AutoDispatchBelowAutograd(), logging_to(noted):  # as an op is called
        results = call()
    assert noted.launches or noted.obstacle
    return Recording(noted, inputs, constants, results)


def record_backward(
    case: Case, needs: Needs | None = None, gathers: bool = False, into: Matrices | None = None
) -> Recording:
    columns = case.w_in.shape[2] + (0 if case.w_up is None else case.w_up.shape[2])
    saved = torch.empty(case.ids.numel(), columns, dtype=case.x.dtype)
    plan = dataclasses.replace(SMALL, gathers=gathers)
    args = params(case), math(case), needs or Needs(), plan, into
    return record(
        lambda: fused_backward.local_backward(case.grad_y, routed(case), saved, *args),
        *(case.grad_y, saved, *case.tensors()),
        *((into.w_in, into.w_up, into.w_out) if into else ()),
    )


def test_backward_that_adds_to_gradients() -> None:
    case = small_case(num_tokens=5, biases=True)
    into = Matrices(torch.empty_like(case.w_in), None, torch.empty_like(case.w_out), True)
    record_backward(case, into=into)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "silu_glu:interleaved", "permuted": True},
        {"activation": "relu2", "with_weights": False},
        {"out_dtype": torch.float32, "num_tokens": 300, "ids_dtype": torch.int32},
        {"separate_up": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("biases", [False, True])
def test_forward(options: dict[str, Any], biases: bool, weight_place: str, save: bool) -> None:
    case = small_case(**options, biases=biases, weight_place=weight_place)
    args = routed(case), params(case), math(case), case.out_dtype
    record(
        lambda: fused.local_forward(*args, save=save, plan=SMALL),
        *case.tensors(),
    )


@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("up_before", [False, True], ids=["in_memory_after", "in_memory_before"])
def test_backward_with_a_separate_up_for_any_needs(
    up_before: bool, biases: bool, weight_place: str
) -> None:
    case = small_case(num_tokens=5, separate_up=True, biases=biases, weight_place=weight_place)
    case = stored_pair(case, up_before)
    for asked in itertools.product((False, True), repeat=len(GRAD_NAMES)):
        record_backward(case, Needs(*asked))


@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize("activation", ["silu_glu", "silu_glu:interleaved", "relu2"])
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
def test_backward(activation: str, weight_place: str, gathers: bool, with_weights: bool) -> None:
    options = {"activation": activation, "weight_place": weight_place}
    case = small_case(num_tokens=300, biases=True, with_weights=with_weights, **options)
    record_backward(case, gathers=gathers)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("weight_place", ["before", "between", "after"])
@pytest.mark.parametrize("separate_up", [False, True])
def test_exchange(
    separate_up: bool, weight_place: str, biases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (exchange_plan, exchange_entry):
        monkeypatch.setattr(module, "read_device", lambda index: H200)
    case = small_case(separate_up=separate_up, weight_place=weight_place, biases=biases)
    (num_tokens, top_k), hidden = case.ids.shape, case.x.shape[1]
    capacity = exchange_plan.capacity_for([num_tokens, 80])
    plan = exchange_plan.plan_exchange(params(case), math(case), top_k, capacity, 2, 0)
    layout = Layout.of(capacity, top_k, hidden, 2, case.x.element_size())
    workspace = LocalWorkspace(layout.num_bytes, 1, 2)
    y = torch.empty_like(case.x)
    args = routed(case), params(case), math(case), plan, workspace, 60.0, y
    record(
        lambda: fused_exchange.all_to_all_forward(*args),
        *case.tensors(),
        y,
        constants=workspace.constants,
    )


@pytest.mark.parametrize("weight_place", ["before", "after"])
@pytest.mark.parametrize(("gathers", "saves"), [(True, True), (False, False)])
def test_exchange_backward(
    gathers: bool, saves: bool, weight_place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (exchange_plan, exchange_entry):
        monkeypatch.setattr(module, "read_device", lambda index: H200)
    case = small_case(weight_place=weight_place, biases=True)
    (num_tokens, top_k), hidden = case.ids.shape, case.x.shape[1]
    capacity = exchange_plan.capacity_for([num_tokens, 80])
    plan = exchange_plan.plan_exchange(params(case), math(case), top_k, capacity, 2, 0)
    gemms = dataclasses.replace(plan.gemms, gathers=gathers)
    plan = dataclasses.replace(plan, gemms=gemms)
    layout = Layout.of(capacity, top_k, hidden, 2, case.x.element_size(), backward=True)
    workspace = LocalWorkspace(layout.num_bytes, 1, 2)
    args = case.grad_y, routed(case), params(case), math(case), Needs(), plan, workspace, 60.0
    inputs, constants = (case.grad_y, *case.tensors()), workspace.constants
    tables: Results = ()

    def begin() -> Results:
        nonlocal tables
        tables = fused_exchange.begin_backward(*args)
        return tables

    record(begin, *inputs, constants=constants)
    saved = case.x.new_empty(2 * capacity * top_k, params(case).in_columns) if saves else None
    record(
        lambda: fused_exchange.all_to_all_backward(
            *args, tables, 4 * gemms.block_m, saved, frees=saves
        ),
        *(*inputs, *tables, saved),
        constants=constants,
    )
    assert saved is None or saved.untyped_storage().nbytes() == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"x": torch.empty(21, 80, dtype=torch.float16)[:, ::2]}, r"aten\.contiguous"),
        ({"grad_y": torch.empty(21, 40)}, r"aten\.to\.dtype"),
    ],
)
def test_what_must_be_copied_first_is_seen(changes: dict[str, Tensor], reason: str) -> None:
    case = dataclasses.replace(small_case(), **changes)
    with pytest.raises(UnknownLayoutError, match=reason):
        record_backward(case)
