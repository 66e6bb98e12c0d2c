"""What operations that gather, scatter, sum and multiply do to a :class:`Probe`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from comet_compile.passes.probe import (
    Probe,
    Support,
    Untracked,
    Value,
    aligned,
    common_support,
    contract_pair,
    cut_to,
    make,
    normalize_dim,
    shape_of,
    support_of,
    zero_outside,
)
from comet_compile.passes.probe_ops import HANDLERS, Handler, apply, handles, handles_named

aten = torch.ops.aten
prims = torch.ops.prims


@handles(aten.index)
def _index(value: Value, indices: Sequence[torch.Tensor | None]) -> Value:
    if not isinstance(value, Probe) or any(isinstance(i, Probe) for i in indices):
        raise Untracked("indexes with rows")
    used = [d for d, index in enumerate(indices) if index is not None]
    if used != list(range(used[0], used[0] + len(used))):
        raise Untracked("indexes dimensions that are apart")
    first, last = used[0], used[-1] + 1
    if any(value.supports[first:last]):
        raise Untracked("indexes columns")
    data = aten.index(value.data, list(indices))
    tail = value.supports[last:]
    middle = data.ndim - first - len(tail)
    return make(data, (*value.supports[:first], *(None,) * middle, *tail))


@handles(aten.index_put)
def _index_put(
    base: Value, indices: Sequence[torch.Tensor | None], values: Value, accumulate: bool = False
) -> Value:
    if any(isinstance(i, Probe) or i is None for i in indices):
        raise Untracked("writes at rows' values or behind a full dimension")
    # agree on every dimension before any is cut: a constant is only recognised while whole
    commons: dict[int, Support] = {}
    for back in range(1, base.ndim - _num_indexed(indices) + 1):
        spans = back <= values.ndim and shape_of(values)[-back] != 1
        operands = [base, values] if spans else [base]
        common = common_support(operands, [o.ndim - back for o in operands])
        if common is not None:
            commons[back] = common
    covered = {values.ndim - back for back in commons}
    if any(support_of(values, d) and d not in covered for d in range(values.ndim)):
        raise Untracked("scatters columns into rows")
    for back, common in commons.items():
        base = cut_to(base, base.ndim - back, common)
        if back <= values.ndim and shape_of(values)[-back] != 1:
            values = cut_to(values, values.ndim - back, common)
    base_data = base.data if isinstance(base, Probe) else base
    values_data = values.data if isinstance(values, Probe) else values
    out = aten.index_put(base_data.clone(), list(indices), values_data, accumulate)
    return make(out, tuple(commons.get(base.ndim - dim) for dim in range(base.ndim)))


def _num_indexed(indices: Sequence[torch.Tensor | None]) -> int:
    """How many leading dimensions the indices take (a bool mask takes several)."""
    return sum(i.ndim if i.dtype == torch.bool else 1 for i in indices if i is not None)


@handles(aten.index_select)
def _index_select(value: Value, dim: int, index: torch.Tensor) -> Value:
    assert isinstance(value, Probe)
    dim = normalize_dim(dim, value.ndim)
    if value.supports[dim]:
        raise Untracked("indexes columns")
    return make(value.data.index_select(dim, index), value.supports)


@handles(aten.index_add)
def _index_add(
    base: Value, dim: int, index: torch.Tensor, source: Value, *, alpha: float = 1
) -> Value:
    dim = normalize_dim(dim, base.ndim)
    if support_of(base, dim) or support_of(source, dim):
        raise Untracked("indexes columns")
    (base_data, source_data), supports = aligned([base, source], skip=dim)
    return make(base_data.index_add(dim, index, source_data, alpha=alpha), supports)


@handles(aten.gather)
def _gather(value: Value, dim: int, index: Value, **_: Any) -> Value:
    if isinstance(index, Probe) or support_of(value, normalize_dim(dim, value.ndim)):
        raise Untracked("gathers columns")
    dim = normalize_dim(dim, value.ndim)
    (data, index_data), supports = aligned([value, index], skip=dim, carriers=[value])
    return make(data.gather(dim, index_data), supports)


def _scatter_handler(name: str) -> Handler:
    def handler(base: Value, dim: int, index: Value, source: Value) -> Value:
        dim = normalize_dim(dim, base.ndim)
        if isinstance(index, Probe) or not isinstance(source, (Probe, torch.Tensor)):
            raise Untracked("scatters at rows' values, or a number")
        if any(support_of(v, dim) for v in (base, source)):
            raise Untracked("scatters columns")
        (base_data, index_data, source_data), supports = aligned(
            [base, index, source], skip=dim, carriers=[base, source]
        )
        return make(getattr(base_data, name)(dim, index_data, source_data), supports)

    return handler


HANDLERS[aten.scatter_add] = _scatter_handler("scatter_add")
HANDLERS[aten.scatter] = _scatter_handler("scatter")


@handles(aten.slice_scatter)
def _slice_scatter(
    base: Value,
    source: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    """Write `source` over base[start:end:step]; columns that `source` does not track are lost."""
    dim = normalize_dim(dim, base.ndim)
    size = shape_of(base)[dim]
    chosen = range(size)[slice(start, end, step)]
    own = support_of(source, dim)
    (base_data, source_data), supports = aligned([base, source], skip=dim)
    if own is None:
        if support_of(base, dim) is not None:
            raise Untracked("writes a block of rows over columns")
        shape = [*source_data.shape[:dim], size, *source_data.shape[dim + 1 :]]
        rows = base_data.expand(shape).slice_scatter(source_data, dim, start, end, step)
        return make(rows, supports)
    if support_of(base, dim) is None and not zero_outside(base, dim):
        raise Untracked("writes columns over untracked ones")
    written = {chosen[c]: source_data.select(dim, i) for i, c in enumerate(own.cols)}
    kept = {}
    known = support_of(base, dim)
    if known is not None:
        kept = {c: base_data.select(dim, i) for i, c in enumerate(known.cols) if c not in chosen}
    columns = {**kept, **written}
    cols = tuple(sorted(columns))
    data = torch.stack([columns[c].expand(_without(source_data, dim)) for c in cols], dim)
    new = Support(size, cols, own.zero and (known is None or known.zero))
    return make(data, (*supports[:dim], new, *supports[dim + 1 :]))


@handles(aten.select_scatter)
def _select_scatter(base: Value, source: Value, dim: int, index: int) -> Value:
    """Write `source` over one row, or one matrix, of `base`."""
    dim = normalize_dim(dim, base.ndim)
    index %= shape_of(base)[dim]
    row: Value = apply(aten.unsqueeze.default, (source, dim), {})
    return _slice_scatter(base, row, dim, index, index + 1)


def _without(data: torch.Tensor, dim: int) -> list[int]:
    return [s for d, s in enumerate(data.shape) if d != dim]


@handles(aten.constant_pad_nd)
def _pad(value: Value, pad: Sequence[int], fill: float = 0) -> Value:
    assert isinstance(value, Probe)
    for pair in range(len(pad) // 2):
        if value.supports[value.ndim - 1 - pair] and (pad[2 * pair] or pad[2 * pair + 1]):
            raise Untracked("pads columns")
    return make(aten.constant_pad_nd(value.data, list(pad), fill), value.supports)


@handles(aten.sum)
def _sum(
    value: Value, dims: Sequence[int] | int | None = None, keepdim: bool = False, **_: Any
) -> Value:
    assert isinstance(value, Probe)
    if dims is None or (isinstance(dims, Sequence) and not dims):
        dims = range(value.ndim)
    gone = {normalize_dim(d, value.ndim) for d in ([dims] if isinstance(dims, int) else dims)}
    if any(value.supports[d] and not zero_outside(value, d) for d in gone):
        raise Untracked("sums untracked columns")
    supports = [
        None if d in gone else s for d, s in enumerate(value.supports) if keepdim or d not in gone
    ]
    return make(value.data.sum(sorted(gone), keepdim), tuple(supports))


@handles(aten.mean)
def _mean(
    value: Value, dims: Sequence[int] | int | None = None, keepdim: bool = False, **_: Any
) -> Value:
    total = _sum(value, dims, keepdim)
    scale = math.prod(shape_of(total)) / max(1, math.prod(shape_of(value)))
    data = total.data if isinstance(total, Probe) else total
    return make(data * scale, total.supports if isinstance(total, Probe) else (None,) * data.ndim)


@handles(aten.mm)
def _mm(left: Value, right: Value, **_: Any) -> Value:
    a, b = contract_pair(left, 1, right, 0)
    return make(a @ b, (support_of(left, 0), support_of(right, 1)))


@handles(aten.addmm)
def _addmm(bias: Value, left: Value, right: Value, *, beta: Any = 1, alpha: Any = 1) -> Value:
    if (beta, alpha) != (1, 1):
        raise Untracked("scales a product that it adds to")
    added: Value = apply(aten.add.Tensor, (bias, _mm(left, right)), {})
    return added


@handles(aten.bmm)
def _bmm(left: Value, right: Value, **_: Any) -> Value:
    if support_of(left, 0) or support_of(right, 0):
        raise Untracked("batches over columns")
    a, b = contract_pair(left, 2, right, 1)
    return make(torch.bmm(a, b), (None, support_of(left, 1), support_of(right, 2)))


def _segments(offs: torch.Tensor, num_rows: int) -> list[tuple[int, int]]:
    ends = [int(e) for e in offs]
    starts = [0, *ends[:-1]]
    if any(s > e for s, e in zip(starts, ends, strict=True)) or (ends and ends[-1] > num_rows):
        raise ValueError(f"group offsets {ends} of {num_rows} rows")
    return list(zip(starts, ends, strict=True))


@handles(aten._grouped_mm)
def grouped_mm(
    left: Value,
    right: Value,
    offs: torch.Tensor | None = None,
    bias: Value | None = None,
    out_dtype: torch.dtype | None = None,
) -> Value:
    """aten._grouped_mm; rows that no group owns stay NaN, as the kernel leaves them unwritten."""
    if bias is not None or offs is None or left.ndim != 2 or isinstance(offs, Probe):
        raise Untracked("grouped GEMM with a bias or without offsets")
    if right.ndim == 2:
        if support_of(left, 1) or support_of(right, 0):
            raise Untracked("grouped GEMM over columns")
        a = left.data if isinstance(left, Probe) else left
        b = right.data if isinstance(right, Probe) else right
        groups = [a[:, s:e] @ b[s:e] for s, e in _segments(offs, b.shape[0])]
        return make(torch.stack(groups), (None, support_of(left, 0), support_of(right, 1)))
    a, b = contract_pair(left, 1, right, 1)
    if offs.numel() != b.shape[0]:
        raise ValueError(f"{offs.numel()} offsets for {b.shape[0]} experts")
    out = a.new_full((a.shape[0], b.shape[2]), math.nan)
    for expert, (start, end) in enumerate(_segments(offs, a.shape[0])):
        if end > start:
            out[start:end] = a[start:end] @ b[expert]
    return make(out, (support_of(left, 0), support_of(right, 2)))


@handles_named("transformers::grouped_mm_fallback")
def _grouped_mm_fallback(rows: Value, stack: Value, offs: torch.Tensor) -> Value:
    """As aten._grouped_mm, but rows that no group owns are zero."""
    out = grouped_mm(rows, stack, offs)
    return _without_tail(out, offs)


@handles_named("transformers::grouped_mm_fallback_backward")
@handles_named("comet::grouped_mm_fallback_backward")
def _grouped_mm_fallback_backward(
    rows: Value, stack: Value, offs: torch.Tensor, grad: Value
) -> tuple[Value, Value]:
    """Gradients of the rows (zero where no group owns them) and of the stack."""
    grad_rows = grouped_mm(grad, _swapped(stack, 1, 2), offs)
    return _without_tail(grad_rows, offs), grouped_mm(_swapped(rows, 0, 1), grad, offs)


def _swapped(value: Value, a: int, b: int) -> Value:
    """`value` with two dimensions exchanged."""
    if isinstance(value, Probe):
        swapped: Value = HANDLERS[aten.transpose](value, a, b)
        return swapped
    return value.transpose(a, b)


def _without_tail(rows: Value, offs: torch.Tensor) -> Value:
    data = rows.data if isinstance(rows, Probe) else rows
    data[int(offs[-1]) if offs.numel() else 0 :] = 0
    return rows
