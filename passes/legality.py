"""What `comet::moe_layer` can take, whatever a region computes: groups, layouts, sizes.

Only facts that every rank of a job shares are looked at.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from comet_compile.passes.graph_view import concrete, numel, val, widens
from comet_compile.passes.instance import Form
from comet_compile.passes.reasons import Rejection, RejectReason
from comet_compile.passes.region import Candidate, collectives
from comet_compile.passes.samples import size_choices
from comet_compile.passes.simulate import World

c10d = torch.ops._c10d_functional

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def form_of(candidate: Candidate, group_size: Callable[[str], int | None]) -> Form | Rejection:
    nodes = collectives(candidate)
    if not nodes:
        return Form("local", World("", 1))
    groups = {n.args[-1] if isinstance(n.args[-1], str) else _group_name(n) for n in nodes}
    if len(groups) > 1:
        names = ", ".join(f"{n.name} on {n.args[-1]!r}" for n in nodes)
        return Rejection(RejectReason.MIXED_GROUPS, names)
    (group,) = groups
    size = group_size(group)
    if size is None:
        detail = f"{nodes[0].name} names group {group!r}, which is not initialised here"
        return Rejection(RejectReason.UNKNOWN_GROUP, detail)
    kinds = {n.target.overloadpacket for n in nodes}
    travels = kinds & {c10d.all_to_all_single}
    return Form("all_to_all" if travels else "replicated", World(group, size))


def _group_name(node: fx.Node) -> str:
    """The name of a group that stands in the graph as an object (compile_on_one_rank)."""
    return str(getattr(node.args[-1], "group_name", node.args[-1]))


def check_layout(candidate: Candidate) -> Rejection | None:
    pair = candidate.pair
    dtype = val(pair.out.stack).dtype
    for stack in pair.stacks:
        if val(stack).dtype not in _DTYPES:
            detail = f"{stack.name} is {val(stack).dtype}"
            return Rejection(RejectReason.UNSUPPORTED_DTYPE, detail)
    same = all(val(n).dtype == dtype for n in (*pair.stacks, *candidate.biases))
    if not same or not widens(val(candidate.x).dtype, dtype):
        detail = f"{candidate.x.name}, the expert stacks and their biases differ in dtype"
        return Rejection(RejectReason.UNSUPPORTED_DTYPE, detail)
    shapes = [val(s).shape for s in pair.stacks]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return Rejection(RejectReason.UNSUPPORTED_LAYOUT, "expert stacks of symbolic size")
    columns = [gemm.out_features for gemm in pair.ins]
    inner, hidden = pair.out.in_features, pair.ins[0].in_features
    fits = columns in ([inner], [2 * inner], [inner, inner])
    same_experts = len({gemm.num_experts for gemm in pair.gemms}) == 1
    same_hidden = all(gemm.in_features == hidden for gemm in pair.ins)
    if not (fits and same_experts and same_hidden and pair.out.out_features == hidden):
        text = " -> ".join(str(list(shape)) for shape in shapes)
        return Rejection(RejectReason.UNSUPPORTED_LAYOUT, f"expert stacks {text}")
    return None


def check_size(candidate: Candidate, form: Form, max_rows: int) -> Rejection | None:
    pair = candidate.pair
    per_token = pair.out.num_experts if pair.dense else candidate.top_k
    try:
        choices = size_choices(candidate.nodes)
        rows = max(concrete(numel(val(candidate.x).shape[:-1]), s) * per_token for s in choices)
    except ValueError as error:
        return Rejection(RejectReason.DYNAMIC_SPLITS, f"{candidate.x.name}: {error}")
    # tokens differ by rank, so between ranks their number must not decide
    if rows > max_rows and form.name == "local":
        detail = f"{rows} rows, allowed {max_rows}"
        return Rejection(RejectReason.TOO_LARGE, detail)
    return None
