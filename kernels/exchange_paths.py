"""The all-to-all layers: fused between ranks of one machine, in rounds if need be, else portable.

Everything that decides is known to all ranks alike: what each offered, the numbers of tokens (which
they post on the board), sizes and dtypes. Legend: as in `ops`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from comet_compile.errors import OptionError
from comet_compile.kernels import portable, saved_rows
from comet_compile.kernels.agreement import AGREEMENTS
from comet_compile.kernels.experts import (
    ExpertParams,
    LayerMath,
    Matrices,
    Needs,
    weight_gradients,
)
from comet_compile.kernels.path_calls import (
    add_up,
    fused_exchange,
    is_captured,
    links,
    matrices_of,
    on_device,
    read_later,
    remember,
    replay,
    tensors_of,
    with_matrices,
    workspaces,
)
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.validate import describe


def forward(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    out_dtype: torch.dtype,
    group: dist.ProcessGroup,
    offers: Sequence[str | None],
    number: int,
    save: str,
) -> tuple[Tensor, Tensor]:
    """Return (y [T, H], saved) for tokens sharded over the group, expert e on rank ``e // L``.

    Fused where no rank objects (`offers`) and the ranks share a machine: facts that all ranks have
    in common, so all take one path. `saved` is [0] for `save` "nothing", else it has room for as
    many rows as `saved_rows.room_between` says, and holds the first of them if
    `_ExchangePlan.may_keep`, else NaN.
    """
    saved = routed.x.new_empty(0)
    if save != "nothing":
        room = saved_rows.room_between(routed.ids.numel(), group.size(), save)
        saved = routed.x.new_empty(room, params.in_columns)
    call = _plan_exchange(routed, params, math, group, offers, number)
    may_keep = call is not None and call.may_keep and saved.dim() == 2
    if not may_keep:
        saved.fill_(float("nan"))
    if call is None:
        return portable.all_to_all_forward(routed, params, math, out_dtype, group), saved
    plan, num_rounds = call.plan, call.num_rounds
    workspace = _workspace(call, group, routed.x.device)
    kept = saved if may_keep else None
    deadline = AGREEMENTS.seconds(group)
    y = routed.x.new_empty(routed.x.shape, dtype=out_dtype)
    with on_device(routed.x.device):
        workspace.enter()
        for index in range(num_rounds):
            part, y_part = routed, y
            if num_rounds > 1:
                tokens = slice(index * plan.capacity, (index + 1) * plan.capacity)
                part, y_part = _tokens_of(routed, tokens), y[tokens]
            replay(
                (
                    "all_to_all_forward", number, out_dtype, plan.capacity, index, deadline,
                    kept is None,
                ),
                (*tensors_of(part), *tensors_of(params), y_part, kept),
                functools.partial(
                    fused_exchange().all_to_all_forward,
                    part, params, math, plan, workspace, deadline, y_part, kept,
                ),
                workspace.constants,
            )  # fmt: skip
    return y, saved


def backward(
    grad_y: Tensor,
    routed: Routed,
    saved: Tensor | None,
    params: ExpertParams,
    math: LayerMath,
    needs: Needs,
    group: dist.ProcessGroup,
    offers: Sequence[str | None],
    number: int,
    into: Matrices | None = None,
    *,
    frees: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return (d_x, d_weights, d_w_in, d_w_up, d_w_out, d_b_in, d_b_up, d_b_out).

    Fused as the forward is, where the gradient of x is asked for. The gradients of matrices are
    `into` if given, added to. With `frees`, the memory of the rows `saved` is given back when they
    have been read.
    """
    call = None
    if needs.x:
        call = _plan_exchange(routed, params, math, group, offers, number, backward=True)
    if call is None:
        d_x, d_weights, parts = portable.all_to_all_backward(
            grad_y, routed, params, math, needs, group
        )
        return add_up((d_x, d_weights, *weight_gradients(parts, params, needs)), into)
    plan, workspace = call.plan, _workspace(call, group, grad_y.device)
    deadline = AGREEMENTS.seconds(group)
    # of several rounds the sum is rounded once, and then added
    added = into if call.num_rounds == 1 else None

    def run_round(index: int) -> tuple[Tensor | None, ...]:
        part, grad_part = routed, grad_y
        if call.num_rounds > 1:
            tokens = slice(index * plan.capacity, (index + 1) * plan.capacity)
            part, grad_part = _tokens_of(routed, tokens), grad_y[tokens]
        args = grad_part, part, params, math, needs, plan, workspace, deadline
        what = number, describe(grad_part), plan.capacity, index, deadline
        inputs = grad_part, *tensors_of(part), *tensors_of(params)
        tables = replay(
            ("all_to_all_begin_backward", *what),
            inputs,
            functools.partial(fused_exchange().begin_backward, *args),
            workspace.constants,
        )
        most_kept, num_rows = call.most_slots, None
        is_fetched = False
        if _reads_rows(call, saved, grad_y.device):
            read = read_later(fused_exchange().Tables.of(tables).totals)
            if saved is not None and call.may_keep:
                # what is likely to be needed: it comes while the host waits for the numbers
                is_fetched = True
                replay(
                    ("fetch_for_saved", *what, needs),
                    (*inputs, *tables),
                    functools.partial(fused_exchange().fetch_for_saved, *args, tables),
                    workspace.constants,
                )
            num_tiles, most_kept = read()
            workspace.check()
            num_rows = call.rows_for(num_tiles)
        has_all = saved is not None and call.may_keep and most_kept <= saved.shape[0]
        kept = saved if has_all else None
        return replay(
            (
                "all_to_all_backward", *what, describe(kept), num_rows, needs, added is None,
                is_fetched, frees,
            ),
            (*inputs, *tables, kept, *matrices_of(added)),
            lambda: fused_exchange().all_to_all_backward(
                *args, tables, num_rows, kept, added, is_fetched=is_fetched, frees=frees
            ),
            workspace.constants,
        )  # fmt: skip

    with on_device(grad_y.device):
        workspace.enter()
        if call.num_rounds > 1:
            return add_up(_join_rounds(map(run_round, range(call.num_rounds))), into)
        grads = run_round(0)
        return grads if into is None else with_matrices(grads, matrices_of(into))


# While the host waits for the number of rows, it launches nothing. Less memory is not worth it.
_WORTH_READING = 256 * 2**20


def _reads_rows(call: _ExchangePlan, saved: Tensor | None, device: torch.device) -> bool:
    """Whether a backward asks the device how many rows there are, to have memory for no more.

    Not while a CUDA graph is captured: its replays may have more. Rows that may have been too many
    to be kept, it must ask about.
    """
    if call.num_rounds > 1 or is_captured(device):
        return False
    if saved is not None and call.may_keep and call.most_slots > saved.shape[0]:
        return True
    return call.spare_bytes >= _WORTH_READING


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


_exchange_plans: dict[Any, Any] = {}
ROW_MEMORY = "COMET_ROW_MEMORY"


@functools.cache
def row_bytes() -> tuple[int, int]:
    """Return what the rows of a forward and of a backward may take, if all tokens chose one rank.

    A call that would need more runs in rounds of fewer tokens. COMET_ROW_MEMORY gives both in MiB;
    it is read once: a backward must find what its forward has kept.
    """
    text = os.environ.get(ROW_MEMORY, "").strip()
    if not text:
        return 4 * 2**30, 12 * 2**30
    if not text.isdecimal() or int(text) == 0:
        raise OptionError(
            f"environment variable {ROW_MEMORY} is {text!r}; allowed: an integer of at least 1, "
            "the MiB that the rows of one fused call between ranks may take"
        )
    return int(text) * 2**20, int(text) * 2**20


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
    link = links().link_of(group, routed.x.device)
    if link.board is None:
        return None
    workspaces().raise_if_lost(group)
    tokens = link.board.exchange(routed.x.shape[0], AGREEMENTS.seconds(group))
    key = (number, backward, group.size(), *tokens)
    known = _exchange_plans.get(key)
    if known is None:
        known = _new_exchange_plan(
            routed, params, math, group, tokens, backward, use_tables=link.same_tables
        )
        remember(_exchange_plans, key, known)
    return known


@dataclasses.dataclass(frozen=True)
class _ExchangePlan:
    """How one call between ranks runs; the same on all of them."""

    plan: Any
    num_rounds: int
    num_bytes: int  # of the workspace
    max_rows: int
    """As many rows as one rank can have."""
    tiles_step: int
    """A small part of the tiles that a rank has if all have as many."""
    spare_bytes: int
    """Of the rows of a backward, if all ranks have as many, and there is memory for `max_rows`."""
    most_slots: int
    """As many slots as one rank can have a row for, now that the ranks' tokens are known."""
    may_keep: bool
    """Whether a forward that is asked to save keeps rows: where both directions take one round."""

    def rows_for(self, num_tiles: int) -> int | None:
        """Return how many rows to have memory for; None for `max_rows`.

        Rounded, so that calls of similar routings are the same.
        """
        num_rows = -(-num_tiles // self.tiles_step) * self.tiles_step * self.plan.gemms.block_m
        return num_rows if num_rows < self.max_rows else None


def _workspace(call: _ExchangePlan, group: dist.ProcessGroup, device: torch.device) -> Any:
    return workspaces().workspace_for(call.num_bytes, group, device)


def _new_exchange_plan(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    group: dist.ProcessGroup,
    tokens: Sequence[int],
    backward: bool,
    *,
    use_tables: bool,
) -> _ExchangePlan:
    from comet_compile.kernels import exchange_plan

    x, num_ranks = routed.x, group.size()
    capacity, top_k = exchange_plan.capacity_for(tokens), routed.ids.shape[1]

    def rounds_of(backward: bool) -> int:
        needed = exchange_plan.row_bytes(params, capacity, top_k, num_ranks, backward=backward)
        return max(1, -(-needed // row_bytes()[backward]))

    may_keep = rounds_of(backward=False) == rounds_of(backward=True) == 1
    num_rounds = rounds_of(backward)
    if num_rounds > 1:
        capacity = exchange_plan.capacity_for([-(-max(tokens) // num_rounds)])
        num_rounds = -(-max(tokens) // capacity)
    index = x.device.index or 0
    plan = exchange_plan.plan_exchange(
        params, math, top_k, capacity, num_ranks, index, use_tables=use_tables
    )
    layout = workspaces().Layout.of(
        capacity, top_k, x.shape[1], num_ranks, x.element_size(), backward=backward
    )
    num_slots, block_m = capacity * top_k, plan.gemms.block_m
    max_rows = exchange_plan.max_rows(params, capacity, top_k, num_ranks, block_m)
    needed = exchange_plan.row_bytes(params, capacity, top_k, num_ranks, backward=backward)
    return _ExchangePlan(
        plan,
        num_rounds,
        layout.num_bytes,
        max_rows,
        tiles_step=max(1, num_slots // 32 // block_m),
        spare_bytes=needed - needed // num_ranks,
        most_slots=sum(tokens) * top_k,
        may_keep=may_keep,
    )
