"""Which path a layer takes: the fused kernels where they apply, else plain PyTorch.

The choice needs nothing but dtypes, sizes, strides and the device, so it can be made for fake
tensors while a graph is compiled and is the same again when the graph runs. Importing this module
loads no Triton; asking for a CUDA tensor does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from comet_compile.kernels import portable
from comet_compile.kernels.agreement import AGREEMENTS
from comet_compile.kernels.experts import (
    ExpertParams,
    LayerMath,
    Matrices,
    Needs,
    weight_gradients,
)
from comet_compile.kernels.grouped import is_grouped_dtype
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.validate import describe


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
    dtype, on_gpu = routed.x.dtype, routed.x.device.type == "cuda"
    plan = portable.plan_for(form, rows=rows, hidden=params.w_in.shape[1], dtype=dtype)
    loops = on_gpu and (form == "all_to_all" or not is_grouped_dtype(dtype))
    reason = why_portable(routed, params, math)
    if reason is not None:
        may_keep = form != "all_to_all"  # whose portable path computes its rows again
        return Choice(False, loops, may_keep, {**plan, "why_portable": reason})
    gemms = _fused().plan_layer(routed, params, math, num_slots=rows)
    # Ranks on several machines, which only the first run can tell, take the portable path.
    on_one_machine = _on_one_machine() if form == "all_to_all" else True
    plan = {**gemms.as_dict(), "form": form}
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
    if os.environ.get("COMET_PORTABLE", "0") not in ("", "0"):
        return "COMET_PORTABLE is set"
    if not _runs_kernels(routed.x.device):
        return f"the tensors are on {routed.x.device.type}, the kernels run on NVIDIA GPUs"
    try:
        return _fused().why_not(routed, params, math)
    except ImportError as error:
        return f"Triton cannot be imported ({error})"


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
    plan = _plan_here(routed, params, math, number)
    if plan is not None:
        # Triton launches on the current device, wherever the tensors are.
        with _on_device(routed.x.device):
            y, saved = _replay(
                ("local_forward", number, out_dtype, save),
                (*_tensors(routed), *_tensors(params)),
                lambda: _fused().local_forward(
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
    saved: Tensor,
    params: ExpertParams,
    math: LayerMath,
    needs: Needs,
    number: int,
    into: Matrices | None = None,
) -> tuple[Tensor | None, ...]:
    """Return (d_x, d_weights, d_w_in, d_w_up, d_w_out, d_b_in, d_b_up, d_b_out).

    What `needs` does not ask for is None; the gradients of matrices are `into` if given, added to.
    `number` is that of `validate.check_again`.
    """
    plan = _plan_here(routed, params, math, number)
    if plan is not None:
        with _on_device(grad_y.device):
            grads = _replay(
                ("local_backward", number, describe(grad_y), describe(saved), needs, into is None),
                (grad_y, saved, *_tensors(routed), *_tensors(params), *_matrices(into)),
                lambda: _fused_backward().local_backward(
                    grad_y, routed, saved, params, math, needs, plan, into
                ),
            )
        return grads if into is None else _with_matrices(grads, _matrices(into))
    pre = saved if saved.dim() == 2 else None
    d_x, d_weights, part = portable.local_backward(grad_y, routed, pre, params, math, needs)
    return _add_up((d_x, d_weights, *weight_gradients([part], params, needs)), into)


def _matrices(into: Matrices | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if into is None else (into.w_in, into.w_up, into.w_out)


def _with_matrices(
    grads: tuple[Tensor | None, ...], matrices: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    return (*grads[:2], *matrices, *grads[5:])


def _add_up(grads: tuple[Tensor | None, ...], into: Matrices | None) -> tuple[Tensor | None, ...]:
    """Return the gradients, those of matrices added to `into` if given."""
    if into is None:
        return grads
    for total, grad in zip(_matrices(into), grads[2:5], strict=True):
        if total is not None and grad is not None:
            total.add_(grad)
    return _with_matrices(grads, _matrices(into))


def why_portable_here(
    routed: Routed, params: ExpertParams, math: LayerMath, number: int
) -> str | None:
    """`why_portable` for a real call, looked up where it runs fused."""
    if _plan_here(routed, params, math, number) is not None:
        return None
    return why_portable(routed, params, math)


def all_to_all_forward(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    out_dtype: torch.dtype,
    group: dist.ProcessGroup,
    offers: Sequence[str | None],
    number: int,
    *,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Return (y [T, H], saved) for tokens sharded over the group, expert e on rank ``e // L``.

    Fused where no rank objects (`offers`) and the ranks share a machine: facts that all ranks have
    in common, so all take one path. `saved`, [0] unless asked for, has room for as many slots as
    there would be if all ranks had this rank's tokens, and holds rows if `_ExchangePlan.keeps`,
    else NaN.
    """
    saved = routed.x.new_empty(0)
    if save:
        columns = params.w_in.shape[2] + (0 if params.w_up is None else params.w_up.shape[2])
        saved = routed.x.new_empty(group.size() * routed.ids.numel(), columns)
    call = _plan_exchange(routed, params, math, group, offers, number)
    if save and (call is None or not call.keeps):
        saved.fill_(float("nan"))
    if call is None:
        return portable.all_to_all_forward(routed, params, math, out_dtype, group), saved
    plan, num_rounds = call.plan, call.num_rounds
    workspace = _workspace(call, group, routed.x.device)
    kept = saved if save and call.keeps else None
    deadline = AGREEMENTS.seconds(group)
    y = routed.x.new_empty(routed.x.shape, dtype=out_dtype)
    with _on_device(routed.x.device):
        workspace.enter()
        for index in range(num_rounds):
            part, y_part = routed, y
            if num_rounds > 1:
                tokens = slice(index * plan.capacity, (index + 1) * plan.capacity)
                part, y_part = _tokens_of(routed, tokens), y[tokens]
            _replay(
                (
                    "all_to_all_forward", number, out_dtype, plan.capacity, index, deadline,
                    kept is None,
                ),
                (*_tensors(part), *_tensors(params), y_part, kept),
                functools.partial(
                    _fused_exchange().all_to_all_forward,
                    part, params, math, plan, workspace, deadline, y_part, kept,
                ),
                workspace.constants,
            )  # fmt: skip
    return y, saved


def all_to_all_backward(
    grad_y: Tensor,
    routed: Routed,
    saved: Tensor,
    params: ExpertParams,
    math: LayerMath,
    needs: Needs,
    group: dist.ProcessGroup,
    offers: Sequence[str | None],
    number: int,
    into: Matrices | None = None,
) -> tuple[Tensor | None, ...]:
    """Return (d_x, d_weights, d_w_in, d_w_up, d_w_out, d_b_in, d_b_up, d_b_out).

    Fused as the forward is, where the gradient of x is asked for. The gradients of matrices are
    `into` if given, added to.
    """
    call = None
    if needs.x:
        call = _plan_exchange(routed, params, math, group, offers, number, backward=True)
    if call is None:
        d_x, d_weights, parts = portable.all_to_all_backward(
            grad_y, routed, params, math, needs, group
        )
        return _add_up((d_x, d_weights, *weight_gradients(parts, params, needs)), into)
    plan, workspace = call.plan, _workspace(call, group, grad_y.device)
    kept = saved if saved.dim() == 2 and call.keeps else None
    deadline = AGREEMENTS.seconds(group)

    # of several rounds the sum is rounded once, and then added
    added = into if call.num_rounds == 1 else None

    def run_round(index: int) -> tuple[Tensor | None, ...]:
        part, grad_part = routed, grad_y
        if call.num_rounds > 1:
            tokens = slice(index * plan.capacity, (index + 1) * plan.capacity)
            part, grad_part = _tokens_of(routed, tokens), grad_y[tokens]
        return _replay(
            (
                "all_to_all_backward", number, describe(grad_part), describe(kept), plan.capacity,
                index, needs, deadline, added is None,
            ),
            (grad_part, *_tensors(part), *_tensors(params), kept, *_matrices(added)),
            lambda: _fused_exchange().all_to_all_backward(
                grad_part, part, params, math, needs, plan, workspace, deadline, kept, added
            ),
            workspace.constants,
        )  # fmt: skip

    with _on_device(grad_y.device):
        workspace.enter()
        if call.num_rounds > 1:
            return _add_up(_join_rounds(map(run_round, range(call.num_rounds))), into)
        grads = run_round(0)
        return grads if into is None else _with_matrices(grads, _matrices(into))


def _join_rounds(rounds: Iterable[tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """Return the gradients of all tokens: those of tokens one after the other, of parameters
    added up in float32, round by round."""
    of_tokens: list[list[Tensor]] = [[], []]
    sums: list[Tensor | None] = []
    dtypes: list[torch.dtype | None] = []
    for grads in rounds:
        for kept, grad in zip(of_tokens, grads, strict=False):
            if grad is not None:
                kept.append(grad)
        if not sums:
            dtypes = [None if grad is None else grad.dtype for grad in grads[2:]]
            sums = [None if grad is None else grad.float() for grad in grads[2:]]
            continue
        for total, grad in zip(sums, grads[2:], strict=True):
            if total is not None and grad is not None:
                total.add_(grad)
    rounded = (
        None if total is None else total.to(dtype)
        for total, dtype in zip(sums, dtypes, strict=True)
    )
    return *(torch.cat(kept) if kept else None for kept in of_tokens), *rounded


def _tokens_of(routed: Routed, tokens: slice) -> Routed:
    weights = None if routed.weights is None else routed.weights[tokens]
    return Routed(routed.x[tokens], routed.ids[tokens], weights)


# Decisions taken, by all that they depend on: taking one again would cost more than a small GEMM.
_MAX_KNOWN = 4096
_plans: dict[Any, Any] = {}
_exchange_plans: dict[Any, Any] = {}
# Of all rows, if all tokens chose one rank. A call that would need more runs in rounds of fewer
# tokens.
_MAX_ROW_BYTES, _MAX_BACKWARD_ROW_BYTES = 4 * 2**30, 12 * 2**30


def _plan_exchange(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    group: dist.ProcessGroup,
    offers: Sequence[str | None],
    number: int,
    *,
    backward: bool = False,
) -> _ExchangePlan | None:
    """Return how a call runs between the ranks, None for the portable path."""
    if any(offer is not None for offer in offers):
        return None
    from comet_compile.kernels.links import link_of
    from comet_compile.kernels.workspace import raise_if_lost

    link = link_of(group, routed.x.device)
    if link.board is None:
        return None
    raise_if_lost(group)
    tokens = link.board.exchange(routed.x.shape[0], AGREEMENTS.seconds(group))
    key = (number, backward, group.size(), *tokens)
    known = _exchange_plans.get(key)
    if known is None:
        known = _new_exchange_plan(routed, params, math, group, tokens, backward)
        _keep(_exchange_plans, key, known)
    return known


@dataclasses.dataclass(frozen=True)
class _ExchangePlan:
    """How one call between ranks runs; all but `keeps` is the same on all of them."""

    plan: Any
    num_rounds: int
    num_bytes: int  # of the workspace
    keeps: bool
    """Whether a forward that is asked to save has this rank's rows kept: where both directions
    take one round, and they surely fit into memory sized by this rank's own tokens."""


def _workspace(call: _ExchangePlan, group: dist.ProcessGroup, device: torch.device) -> Any:
    from comet_compile.kernels.workspace import workspace_for

    return workspace_for(call.num_bytes, group, device)


def _new_exchange_plan(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    group: dist.ProcessGroup,
    tokens: Sequence[int],
    backward: bool,
) -> _ExchangePlan:
    from comet_compile.kernels import exchange_plan
    from comet_compile.kernels.workspace import Layout

    x, num_ranks = routed.x, group.size()
    capacity, top_k = exchange_plan.capacity_for(tokens), routed.ids.shape[1]

    def rounds_of(backward: bool) -> int:
        needed = exchange_plan.row_bytes(params, capacity, top_k, num_ranks, backward=backward)
        return max(1, -(-needed // (_MAX_BACKWARD_ROW_BYTES if backward else _MAX_ROW_BYTES)))

    in_one_round = rounds_of(backward=False) == rounds_of(backward=True) == 1
    keeps = in_one_round and sum(tokens) <= num_ranks * x.shape[0]
    num_rounds = rounds_of(backward)
    if num_rounds > 1:
        capacity = exchange_plan.capacity_for([-(-max(tokens) // num_rounds)])
        num_rounds = -(-max(tokens) // capacity)
    index = x.device.index or 0
    plan = exchange_plan.plan_exchange(params, math, top_k, capacity, num_ranks, index)
    layout = Layout.of(capacity, top_k, x.shape[1], num_ranks, x.element_size(), backward=backward)
    return _ExchangePlan(plan, num_rounds, layout.num_bytes, keeps)


def _plan_here(routed: Routed, params: ExpertParams, math: LayerMath, number: int) -> Any | None:
    """Return the plan of a real call, None if it runs the portable path."""
    if not _runs_kernels(routed.x.device):
        return None
    key = (number, os.environ.get("COMET_PORTABLE"))
    if key not in _plans:
        reason = why_portable(routed, params, math)
        plan = None if reason is not None else _fused().plan_layer(routed, params, math)
        return _keep(_plans, key, plan)
    return _plans[key]


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> Any:
    if len(kept) >= _MAX_KNOWN:
        kept.clear()
    kept[key] = value
    return value


def _tensors(record: Routed | ExpertParams) -> tuple[Tensor | None, ...]:
    return tuple(record.__dict__.values())


def _replay(*args: Any) -> Any:
    from comet_compile.kernels.recording import replay

    return replay(*args)


def _runs_kernels(device: torch.device) -> bool:
    return device.type == "cuda"


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _fused_backward() -> ModuleType:
    from comet_compile.kernels import fused_backward

    return fused_backward


def _fused_exchange() -> ModuleType:
    from comet_compile.kernels import fused_exchange

    return fused_exchange


def _fused() -> ModuleType:
    from comet_compile.kernels import fused

    return fused
