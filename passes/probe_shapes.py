"""What operations that reshape, cut and join do to a :class:`Probe`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from comet_compile.passes.probe import (
    Probe,
    Support,
    Supports,
    Untracked,
    Value,
    aligned,
    make,
    normalize_dim,
    shape_of,
    support_of,
)
from comet_compile.passes.probe_ops import handles

aten = torch.ops.aten
prims = torch.ops.prims


def _resolve_shape(shape: Sequence[int], numel: int) -> tuple[int, ...]:
    shape = tuple(int(s) for s in shape)
    if -1 in shape:
        known = math.prod(s for s in shape if s != -1)
        shape = tuple(numel // known if s == -1 else s for s in shape)
    if math.prod(shape) != numel:
        raise ValueError(f"view of {numel} elements as {shape}")
    return shape


def _view_groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pair runs of old and new dimensions that hold the same elements."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        a = b = 1
        if i < len(old):
            left, a, i = [i], old[i], i + 1
        if j < len(new):
            right, b, j = [j], new[j], j + 1
        while a != b:
            if (a < b and i < len(old)) or j == len(new):
                left.append(i)
                a, i = a * old[i], i + 1
            else:
                right.append(j)
                b, j = b * new[j], j + 1
        groups.append((left, right))
    return groups


@handles(aten.view, aten.reshape, aten._unsafe_view)
def _view(value: Value, shape: Sequence[int]) -> Value:
    assert isinstance(value, Probe)
    old = value.shape
    new = _resolve_shape(shape, math.prod(old))
    if not any(value.supports[:-1]) and old[-1] == new[-1]:
        # rows reshaped, columns untouched; also the only case with zero rows
        data = value.data.reshape(*new[:-1], value.data.shape[-1])
        return Probe(data, (None,) * (len(new) - 1) + (value.supports[-1],))
    if 0 in old:
        raise Untracked("reshapes the columns of no rows")
    sizes = list(new)
    supports: list[Support | None] = [None] * len(new)
    for left, right in _view_groups(old, new):
        partial = [i for i in left if value.supports[i]]
        if not partial:
            continue
        before, after = ([i for i in left if old[i] != 1], [j for j in right if new[j] != 1])
        support = value.supports[partial[0]]
        assert support is not None
        if len(partial) == 1 and len(before) == 1 and len(after) == 2:
            support = _inner(support, new[after[1]])
        elif len(partial) == 1 and len(before) == 2 and len(after) == 1 and partial == before[1:]:
            support = _repeated(support, old[before[0]])
        elif len(partial) != 1 or len(after) != 1 or new[after[0]] != support.size:
            raise Untracked("mixes rows and columns in a view")
        supports[after[-1]] = support
        sizes[after[-1]] = len(support.cols)
    return make(value.data.reshape(sizes), tuple(supports))


def _inner(support: Support, size: int) -> Support:
    """The columns of each of the rows of `size` that lie side by side in one dimension."""
    first = tuple(col for col in support.cols if col < size)
    inner = Support(size, first, support.zero)
    if _repeated(inner, support.size // size) != support:
        raise Untracked("splits columns that differ from row to row")
    return inner


def _repeated(support: Support, rows: int) -> Support:
    """The columns of `rows` rows that are put side by side."""
    cols = tuple(row * support.size + col for row in range(rows) for col in support.cols)
    return Support(rows * support.size, cols, support.zero)


@handles(aten.permute)
def _permute(value: Value, dims: Sequence[int]) -> Value:
    assert isinstance(value, Probe)
    order = [normalize_dim(d, value.ndim) for d in dims]
    return make(value.data.permute(order), tuple(value.supports[d] for d in order))


@handles(aten.transpose, aten.t)
def _transpose(value: Value, dim0: int = 0, dim1: int = 1) -> Value:
    order = list(range(value.ndim))
    a, b = normalize_dim(dim0, value.ndim), normalize_dim(dim1, value.ndim)
    order[a], order[b] = order[b], order[a]
    return _permute(value, order)


@handles(aten.unsqueeze)
def _unsqueeze(value: Value, dim: int) -> Value:
    assert isinstance(value, Probe)
    dim = normalize_dim(dim, value.ndim + 1)
    supports = (*value.supports[:dim], None, *value.supports[dim:])
    return make(value.data.unsqueeze(dim), supports)


@handles(aten.squeeze)
def _squeeze(value: Value, dim: int | Sequence[int] | None = None) -> Value:
    assert isinstance(value, Probe)
    shape = value.shape
    dims = range(len(shape)) if dim is None else ([dim] if isinstance(dim, int) else dim)
    gone = {d for raw in dims if shape[d := normalize_dim(raw, len(shape))] == 1}
    kept = [d for d in range(len(shape)) if d not in gone]
    data = value.data.reshape([value.data.shape[d] for d in kept])
    return make(data, tuple(value.supports[d] for d in kept))


@handles(aten.expand)
def _expand(value: Value, shape: Sequence[int], **_: Any) -> Value:
    assert isinstance(value, Probe)
    lead = len(shape) - value.ndim
    supports: Supports = (None,) * lead + value.supports
    sizes = [-1 if dim >= lead and supports[dim] else size for dim, size in enumerate(shape)]
    return make(value.data.expand(sizes), supports)


@handles(aten.repeat)
def _repeat(value: Value, repeats: Sequence[int]) -> Value:
    assert isinstance(value, Probe)
    lead = len(repeats) - value.ndim
    supports: Supports = (None,) * lead + value.supports
    if any(s and r != 1 for s, r in zip(supports, repeats, strict=True)):
        raise Untracked("repeats columns")
    return make(value.data.repeat(*repeats), supports)


def _cut(value: Value, dim: int, start: int, end: int, step: int) -> Value:
    """Columns or rows start:end:step of `dim`."""
    assert isinstance(value, Probe)
    support = value.supports[dim]
    if support is None:
        index = [slice(None)] * value.ndim
        index[dim] = slice(start, end, step)
        return make(value.data[tuple(index)], value.supports)
    chosen = range(support.size)[start:end:step]
    positions = [i for i, col in enumerate(support.cols) if col in chosen]
    cols = tuple(chosen.index(support.cols[i]) for i in positions)
    data = value.data.index_select(dim, torch.tensor(positions, dtype=torch.int64))
    new = Support(len(chosen), cols, support.zero)
    return make(data, (*value.supports[:dim], new, *value.supports[dim + 1 :]))


@handles(aten.slice)
def _slice(
    value: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    dim = normalize_dim(dim, value.ndim)
    size = shape_of(value)[dim]
    bounds = slice(start, end, step).indices(size)
    return _cut(value, dim, *bounds)


@handles(aten.select)
def _select(value: Value, dim: int, index: int) -> Value:
    assert isinstance(value, Probe)
    dim = normalize_dim(dim, value.ndim)
    if value.supports[dim]:
        raise Untracked("selects one column")
    supports = value.supports[:dim] + value.supports[dim + 1 :]
    return make(value.data.select(dim, index), supports)


@handles(aten.split_with_sizes)
def _split_with_sizes(value: Value, sizes: Sequence[int], dim: int = 0) -> list[Value]:
    dim = normalize_dim(dim, value.ndim)
    if sum(sizes) != shape_of(value)[dim]:
        raise ValueError(f"split of {shape_of(value)[dim]} into {list(sizes)}")
    parts, start = [], 0
    for size in sizes:
        parts.append(_cut(value, dim, start, start + size, 1))
        start += size
    return parts


@handles(aten.split, aten.chunk)
def _split(value: Value, size: int, dim: int = 0) -> list[Value]:
    dim = normalize_dim(dim, value.ndim)
    total = shape_of(value)[dim]
    return [_cut(value, dim, at, min(at + size, total), 1) for at in range(0, total, size)]


@handles(aten.unbind)
def _unbind(value: Value, dim: int = 0) -> list[Value]:
    return [_select(value, dim, i) for i in range(shape_of(value)[dim])]


@handles(aten.cat)
def _cat(values: Sequence[Value], dim: int = 0) -> Value:
    ndim = max(v.ndim for v in values)
    values = [v for v in values if v.ndim == ndim]
    dim = normalize_dim(dim, ndim)
    datas, supports = aligned(values, skip=dim)
    if not any(support_of(v, dim) for v in values):
        return make(torch.cat(datas, dim), supports)
    cols: list[int] = []
    parts, offset, zero = [], 0, True
    for value, data in zip(values, datas, strict=True):
        own = support_of(value, dim)
        size = shape_of(value)[dim]
        if own is None and size > 64:
            raise Untracked("joins tracked and untracked columns")
        cols += [offset + c for c in (own.cols if own else range(size))]
        zero = zero and (own is None or own.zero)
        parts.append(data)
        offset += size
    joined = Support(offset, tuple(cols), zero)
    return make(torch.cat(parts, dim), (*supports[:dim], joined, *supports[dim + 1 :]))
