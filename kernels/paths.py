"""Which path a layer takes: the fused kernels where they apply, else plain PyTorch.

The choice needs nothing but dtypes, sizes, strides and the device, so it can be made for fake
tensors while a graph is compiled and is the same again when the graph runs. Importing this module
loads no Triton; asking for a CUDA tensor does.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from comet_compile.kernels import portable
from comet_compile.kernels.experts import (
    ExpertParams,
    LayerMath,
    Matrices,
    Needs,
    weight_gradients,
)
from comet_compile.kernels.grouped import is_grouped_dtype, is_portable_forced, reads_host
from comet_compile.kernels.path_calls import (
    add_up,
    fused,
    fused_backward,
    matrices_of,
    on_device,
    remember,
    replay,
    runs_kernels,
    tensors_of,
    with_matrices,
)
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.validate import describe

_plans: dict[Any, Any] = {}

Refine = Callable[[str, Any, Routed, ExpertParams, LayerMath, Callable[[Any], Any]], Any]
refine: Refine | None = None
"""(direction, plan, layer, how to run it with a plan) -> a plan that is as fast or faster.

Asked before the first call of a layer in each direction, if the user wants that (`refining`)."""
_refined: set[Any] = set()


@dataclasses.dataclass(frozen=True)
class Choice:
    """The path of one layer, and whether running it reads the device on the host.

    `may_keep`: whether a forward that is asked to save has a path that does.
    """

    is_fused: bool
    reads_host: bool
    may_keep: bool
    plan: dict[str, Any]
    """The plan as plain data, for reports; a portable one says `why_portable`."""


def choose_path(
    form: str, routed: Routed, params: ExpertParams, math: LayerMath, *, rows: int
) -> Choice:
    """Return how a layer of these tensors, fake ones included, will run both ways.

    `rows` is the most token rows that any rank receives.
    """
    dtype, device = routed.x.dtype, routed.x.device
    hidden = params.w_in.shape[1]
    plan = portable.plan_for(form, rows=rows, hidden=hidden, dtype=dtype, device=device)
    loops = device.type == "cuda" and (form == "all_to_all" or reads_host(dtype, device))
    reason = why_portable(routed, params, math)
    if reason is None and form == "local":
        reason = _why_slower(params, math, routed, rows // routed.ids.shape[1])
    if reason is not None:
        may_keep = form != "all_to_all"  # whose portable path computes its rows again
        return Choice(False, loops, may_keep, {**plan, "why_portable": reason})
    gemms = fused().plan_layer(
        routed, params, math, num_slots=rows, use_tables=form != "all_to_all"
    )
    # Ranks on several machines, which only the first run can tell, take the portable path.
    on_one_machine = _on_one_machine() if form == "all_to_all" else True
    plan = {**gemms.as_dict(), "form": form}
    if form == "all_to_all":
        plan["source"] = "planned by rule, or by a table that all ranks have"
    return Choice(True, on_one_machine is not True, on_one_machine is not False, plan)


def _on_one_machine() -> bool | None:
    """Whether all processes run on this machine by what the launcher says (torchrun does).

    None if it says nothing.
    """
    if not dist.is_initialized():
        return True
    local = os.environ.get("LOCAL_WORLD_SIZE")
    return None if local is None else local == str(dist.get_world_size())


def why_portable(routed: Routed, params: ExpertParams, math: LayerMath) -> str | None:
    """Return why the experts of this layer run the portable path, None if they run fused."""
    if is_portable_forced():
        return "COMET_PORTABLE is set"
    if not runs_kernels(routed.x.device):
        return f"the tensors are on {routed.x.device.type}, the kernels run on NVIDIA GPUs"
    try:
        return fused().why_not(routed, params, math)
    except ImportError as error:
        return f"Triton cannot be imported ({error})"


def _why_slower(
    params: ExpertParams, math: LayerMath, routed: Routed, num_tokens: int
) -> str | None:
    """Return why torch's operators are expected to be faster, None if they are not.

    Only where they do not read the device on the host, which a CUDA graph of a layer that was
    planned to run fused could not do.
    """
    if not is_grouped_dtype(routed.x.dtype):
        return None
    from comet_compile.kernels.fuse_or_not import why_unfused

    device = fused().read_device(routed.x.device.index or 0)
    return why_unfused(params, math, routed.ids.shape[1], num_tokens, device)


def local_forward(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    out_dtype: torch.dtype,
    *,
    save: bool,
    number: int,
) -> tuple[Tensor, Tensor]:
    """Return (y [T, H] in `out_dtype`, pre-activation rows [S, ...], [0] if not saved).

    `number` is that of `validate.check_again`.
    """
    plan = plan_here(routed, params, math, number, alone=True)
    if plan is not None:
        # Triton launches on the current device, wherever the tensors are.
        with on_device(routed.x.device):
            if refine is not None:
                plan = _refine_once(
                    "forward", plan, routed, params, math, number,
                    lambda plan: fused().local_forward(
                        routed, params, math, out_dtype, save=False, plan=plan
                    )[:1],
                )  # fmt: skip
            y, saved = replay(
                ("local_forward", number, out_dtype, save),
                (*tensors_of(routed), *tensors_of(params)),
                lambda: fused().local_forward(
                    routed, params, math, out_dtype, save=save, plan=plan
                ),
            )
            return y, saved
    y, pre = portable.local_forward(routed, params, math, out_dtype)
    if not save:
        return y, y.new_empty(0, dtype=routed.x.dtype)
    return y, portable.pad_saved(pre, routed.ids.numel())


def local_backward(
    grad_y: Tensor,
    routed: Routed,
    saved: Tensor | None,
    params: ExpertParams,
    math: LayerMath,
    needs: Needs,
    number: int,
    into: Matrices | None = None,
    *,
    frees: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return (d_x, d_weights, d_w_in, d_w_up, d_w_out, d_b_in, d_b_up, d_b_out).

    What `needs` does not ask for is None; the gradients of matrices are `into` if given, added to.
    With `frees`, the memory of the rows `saved` is given back when they have been read. `number` is
    that of `validate.check_again`.
    """
    plan = plan_here(routed, params, math, number, alone=True)
    if plan is not None:
        with on_device(grad_y.device):
            if refine is not None:
                plan = _refine_once(
                    "backward", plan, routed, params, math, number,
                    lambda plan: fused_backward().local_backward(
                        grad_y, routed, saved, params, math, needs, plan
                    ),
                )  # fmt: skip
            grads = replay(
                (
                    "local_backward", number, describe(grad_y), describe(saved), needs,
                    into is None, frees,
                ),
                (grad_y, saved, *tensors_of(routed), *tensors_of(params), *matrices_of(into)),
                lambda: fused_backward().local_backward(
                    grad_y, routed, saved, params, math, needs, plan, into, frees=frees
                ),
            )  # fmt: skip
        return grads if into is None else with_matrices(grads, matrices_of(into))
    d_x, d_weights, part = portable.local_backward(grad_y, routed, saved, params, math, needs)
    return add_up((d_x, d_weights, *weight_gradients([part], params, needs)), into)


def _refine_once(
    direction: str,
    plan: Any,
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    number: int,
    run: Callable[[Any], Any],
) -> Any:
    """Return the plan to go on with; it is asked for once, and not while a graph is captured."""
    key = (number, direction)
    if refine is None or key in _refined or torch.cuda.is_current_stream_capturing():
        return plan
    _refined.add(key)
    found = refine(direction, plan, routed, params, math, run)
    _plans[_plan_key(number, alone=True)] = found
    return found


def _plan_key(number: int, *, alone: bool) -> Any:
    return number, alone, os.environ.get("COMET_PORTABLE")


def why_portable_here(
    routed: Routed, params: ExpertParams, math: LayerMath, number: int
) -> str | None:
    """`why_portable` for a real call, looked up where it runs fused."""
    if plan_here(routed, params, math, number) is not None:
        return None
    return why_portable(routed, params, math)


def plan_here(
    routed: Routed, params: ExpertParams, math: LayerMath, number: int, *, alone: bool = False
) -> Any | None:
    """Return the plan of a real call, None if it runs the portable path.

    `alone`: nothing but this device's experts depends on it, so what is faster may be taken.
    """
    if not runs_kernels(routed.x.device):
        return None
    key = _plan_key(number, alone=alone)
    if key not in _plans:
        reason = why_portable(routed, params, math)
        if reason is None and alone:
            reason = _why_slower(params, math, routed, routed.x.shape[0])
        plan = None if reason is not None else fused().plan_layer(routed, params, math)
        return remember(_plans, key, plan)
    return _plans[key]
