"""What the compiler relies on: schemas, fakes, symbolic sizes, FLOPs, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_cases import Case, make_case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.flop_counter import FlopCounterMode

from comet_compile.kernels import ops  # noqa: F401, registers the ops
from comet_compile.kernels.portable import plan_for

LOCAL = {"form": "local", "group_name": ""}
CASES = {
    "fused_gate": {},
    "no_tokens": {"num_tokens": 0},
    "biases": {"biases": True},
    "separate_up": {"separate_up": True, "biases": True, "weight_place": "before"},
    "permuted_bf16": {"permuted": True, "dtype": torch.bfloat16, "weights_dtype": torch.float32},
    "no_weights": {"with_weights": False, "activation": "relu2"},
    "int32_ids": {"ids_dtype": torch.int32, "weight_place": "between"},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("save", ["nothing", "pre_activation"])
def test_opcheck_forward(name: str, save: str) -> None:
    case = make_case(**CASES[name])
    for tensor in case.tensors():
        if tensor is not None and tensor.is_floating_point():
            tensor.requires_grad_()
    torch.library.opcheck(
        torch.ops.comet.moe_layer.default,
        (*case.tensors(), None),
        {**case.options(), "out_dtype": case.out_dtype, "save": save, **LOCAL},
        # bf16: the compared runs differ by nothing, but no gradient is exact in it
        rtol=1e-2,
        atol=1e-2,
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("needs", [[True] * 8, [True, False] * 4])
def test_opcheck_backward(name: str, needs: list[bool]) -> None:
    case = make_case(**CASES[name])
    torch.library.opcheck(
        torch.ops.comet.moe_layer_backward.default,
        (case.grad_y, *case.tensors(), case.x.new_empty(0), None),
        {**case.options(), "needs": needs, **LOCAL},
    )


def _fake_case(num_tokens: Any, top_k: Any) -> Case:
    case = make_case(permuted=True)
    for name in ("x", "ids", "weights", "grad_y", "w_in", "w_out"):
        real = getattr(case, name)
        if name.startswith("w_"):
            fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype)
        else:
            last = top_k if name in ("ids", "weights") else real.shape[1]
            fake = torch.empty(num_tokens, last, dtype=real.dtype)
        setattr(case, name, fake)
    return case


@pytest.mark.parametrize("form", ["local", "all_to_all", "replicated"])
def test_fakes_bind_no_symbol(form: str) -> None:
    env = ShapeEnv()
    save = "nothing" if form == "all_to_all" else "pre_activation"  # which asks for the group
    where = {"form": form, "group_name": "" if form == "local" else "some group"}
    with FakeTensorMode(shape_env=env):
        num_tokens, top_k = env.create_unbacked_symint(), env.create_unbacked_symint()
        torch._check(num_tokens >= 0)
        torch._check(top_k >= 0)
        case = _fake_case(num_tokens, top_k)
        guards = len(env.guards)
        y, saved, token = torch.ops.comet.moe_layer(
            *case.tensors(), None, **case.options(), out_dtype=torch.float32, save=save, **where
        )
        grads = torch.ops.comet.moe_layer_backward(
            case.grad_y, *case.tensors(), saved, token, **case.options(), needs=[True] * 8, **where
        )
    assert len(env.guards) == guards
    assert y.dtype == torch.float32
    assert y.shape[0].node.expr == num_tokens.node.expr
    assert token.shape == ((0,) if form == "local" else (1,))
    if save == "pre_activation":
        assert saved.shape[0].node.expr == (num_tokens * top_k).node.expr
    assert grads[0].shape[0].node.expr == num_tokens.node.expr
    assert grads[2].stride() == case.w_in.stride()


@pytest.mark.parametrize("save", ["nothing", "pre_activation"])
@pytest.mark.parametrize("separate_up", [False, True])
def test_flops(save: str, separate_up: bool) -> None:
    case = make_case(separate_up=separate_up)
    options = {**case.options(), **LOCAL}
    slots, hidden, inter = 7 * 3, 8, 16
    with FlopCounterMode(display=False) as counter:
        _, saved, _ = torch.ops.comet.moe_layer(
            *case.tensors(), None, out_dtype=case.out_dtype, save=save, **options
        )
    forward = 2 * slots * hidden * 3 * inter
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        torch.ops.comet.moe_layer_backward(
            case.grad_y, *case.tensors(), saved, None, needs=[True] * 8, **options
        )
    recomputed = 2 * slots * hidden * 2 * inter if save == "nothing" else 0
    assert counter.get_total_flops() == 2 * forward + recomputed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "ring"}, r"form is 'ring'; allowed: 'local', 'all_to_all', 'replicated'"),
        ({"form": "all_to_all"}, r"group_name is '' with form 'all_to_all'"),
        ({"group_name": "0"}, r"group_name is '0' with form 'local'; allowed: ''"),
        ({"weight_place": "under"}, r"weight_place is 'under'; allowed: 'before'"),
        ({"save": "all"}, r"save is 'all'; allowed: 'nothing', 'pre_activation'"),
        ({"activation": "swish"}, r"unknown activation 'swish'"),
        ({"activation": "silu"}, r"w_in has shape \[3, 8, 32\]; allowed: \[3, 8, 16\]"),
        ({"product_dtype": torch.int32}, r"product_dtype is torch.int32; allowed"),
        ({"x": torch.zeros(7, 9, dtype=torch.float64)}, r"x has shape \[7, 9\]; allowed: \[7, 8\]"),
        ({"x": torch.zeros(7, 8)}, r"dtype of w_in beside that of x is torch.float64; allowed"),
        ({"ids": torch.zeros(7, 3)}, r"dtype of ids is torch.float32; allowed: torch.int64"),
        ({"ids": torch.zeros(7, 0).long()}, r"ids has shape \[7, 0\]; allowed: an expert or more"),
        ({"ids": torch.zeros(7).long()}, r"ids has shape \[7\]; allowed: 2 dims"),
        ({"weights": torch.zeros(7, 2)}, r"weights has shape \[7, 2\]; allowed: \[7, 3\]"),
        ({"b_up": torch.zeros(3, 16)}, r"b_up is given without w_up"),
    ],
)
def test_errors_say_what_got_and_allowed(changes: dict[str, Any], message: str) -> None:
    case = make_case()
    options = {**case.options(), "out_dtype": case.out_dtype, "save": "nothing", **LOCAL}
    for name, value in changes.items():
        if hasattr(case, name) and name not in options:
            setattr(case, name, value)
        else:
            options[name] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.comet.moe_layer(*case.tensors(), None, **options)


def test_needs_of_wrong_length() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="needs has 3 flags; allowed: 8"):
        torch.ops.comet.moe_layer_backward(
            case.grad_y,
            *case.tensors(),
            case.x.new_empty(0),
            None,
            **case.options(),
            needs=[True] * 3,
            **LOCAL,
        )


@pytest.mark.parametrize(("rows", "num_chunks"), [(0, 1), (8191, 1), (16384, 4), (10**6, 8)])
def test_plan_chunks_grow_with_what_is_moved(rows: int, num_chunks: int) -> None:
    sizes = {"rows": rows, "hidden": 2048, "device": torch.device("cpu")}
    plan = plan_for("all_to_all", dtype=torch.bfloat16, **sizes)
    assert plan["num_chunks"] == num_chunks
    assert plan["gemm"] == "aten._grouped_mm"
    local = plan_for("local", dtype=torch.float32, **sizes)
    assert "num_chunks" not in local
    assert local["gemm"] == "mm per expert"
