"""What ATen operations do to a :class:`Probe`.

Contract: a handler returns exactly the tracked part of what the real operation would return, or
raises :class:`Untracked`. Nothing is matched by the spelling of a model: pointwise operations go
by their ATen tag, everything else is plain tensor algebra on the data with the partial dimensions
carried along.

Operations on plain tensors only (index arithmetic, routing weights) run for real and need no
handler; see :func:`apply`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from comet_compile.passes.probe import (
    Probe,
    Support,
    Supports,
    Untracked,
    Value,
    common_support,
    contract_pair,
    make,
    normalize_dim,
    restrict,
    shape_of,
    support_of,
    zero_outside,
)

aten = torch.ops.aten
prims = torch.ops.prims

Handler = Callable[..., Any]
_HANDLERS: dict[Any, Handler] = {}


def _handles(*packets: Any) -> Callable[[Handler], Handler]:
    def register(fn: Handler) -> Handler:
        for packet in packets:
            _HANDLERS[packet] = fn
        return fn

    return register


def apply(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one graph operation on probes and plain tensors.

    Raises :class:`Untracked` when the operation cannot be followed; errors of the real operation
    (an index out of range, sizes that do not fit) pass through.
    """
    if target in _PYTHON_TARGETS:
        return target(*args, **kwargs)
    if not isinstance(target, torch._ops.OpOverload):
        raise Untracked(f"{getattr(target, '__name__', target)} is not an ATen operation")
    packet = target.overloadpacket
    leaves = pytree.tree_leaves((args, kwargs))
    tracked = any(isinstance(leaf, Probe) for leaf in leaves)
    if packet in _ALWAYS or (tracked and packet in _HANDLERS):
        return _HANDLERS[packet](*args, **kwargs)
    if tracked:
        if torch.Tag.pointwise in target.tags:
            return _pointwise(target, args, kwargs)
        raise Untracked(f"{target} on rows")
    return _plain(target, args, kwargs)


_PYTHON_TARGETS: frozenset[Any] = frozenset(
    {
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.mod,
        operator.neg,
        operator.pow,
        operator.truediv,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
        torch.sym_max,
        torch.sym_min,
        torch.sym_sum,
        torch.sym_not,
        torch.sym_int,
        math.floor,
        math.ceil,
        max,
        min,
    }
)


# -- plain tensors ----------------------------------------------------------------------------


def _lift(value: Any) -> Any:
    """Floating point runs in float64: rounding is no part of what is proven."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and 0 in value.stride():
        # functional scatters copy a broadcast base with its overlapping strides
        return value.contiguous()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value


def _plain(target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `target` for real on the CPU: index arithmetic is data, not pattern."""
    if target.namespace not in ("aten", "prims"):
        raise Untracked(f"custom operation {target}")
    if target._schema.is_mutable:
        raise Untracked(f"{target} writes into its input")
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise Untracked(f"{target} draws random numbers")
    args, kwargs = pytree.tree_map(_on_host, (args, kwargs))
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    return pytree.tree_map(_lift, target(*args, **kwargs))


def _filled(shape: Sequence[int], value: Any, dtype: torch.dtype | None) -> torch.Tensor:
    """A constant that costs one element whatever its shape (and is visibly constant)."""
    if dtype is None:
        dtype = torch.float64 if isinstance(value, float) else torch.int64
    dtype = torch.float64 if dtype.is_floating_point else dtype
    return torch.full((), value, dtype=dtype).expand(tuple(shape))


@_handles(aten.full)
def _full(
    shape: Sequence[int], value: Any, *, dtype: torch.dtype | None = None, **_: Any
) -> Any:
    return _filled(shape, value, dtype)


def _uninitialised(shape: Sequence[int], dtype: torch.dtype | None) -> torch.Tensor:
    """Memory nobody wrote yet: NaN, or an index that no table has."""
    floating = dtype is None or dtype.is_floating_point
    return _filled(shape, math.nan if floating else -(2**31), dtype or torch.float64)


@_handles(aten.empty, aten.new_empty, aten.empty_strided, aten.new_empty_strided)
def _empty(*args: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    if isinstance(args[0], (Probe, torch.Tensor)):
        dtype = dtype or (args[0].dtype if isinstance(args[0], torch.Tensor) else None)
        args = args[1:]
    return _uninitialised(args[0], dtype)


def _like_handler(fill: float | None) -> Handler:
    def handler(
        value: Value, given: Any = None, *, dtype: torch.dtype | None = None, **_: Any
    ) -> torch.Tensor:
        own = torch.float64 if isinstance(value, Probe) else value.dtype
        if fill is None and given is None:
            return _uninitialised(shape_of(value), dtype or own)
        return _filled(shape_of(value), given if fill is None else fill, dtype or own)

    return handler


_HANDLERS[aten.empty_like] = _like_handler(None)
_HANDLERS[aten.full_like] = _like_handler(None)
_HANDLERS[aten.zeros_like] = _like_handler(0)
_HANDLERS[aten.ones_like] = _like_handler(1)


@_handles(aten._local_scalar_dense)
def _local_scalar_dense(value: Value) -> Any:
    if isinstance(value, Probe):
        raise Untracked("reads a row's value on the host")
    return value.item()


@_handles(aten.sym_size)
def _sym_size(value: Value, dim: int | None = None) -> Any:
    return shape_of(value) if dim is None else shape_of(value)[dim]


@_handles(aten.sym_numel)
def _sym_numel(value: Value) -> int:
    return math.prod(shape_of(value))


@_handles(aten.histc)
def _histc(value: Value, bins: int = 100, low: float = 0, high: float = 0) -> torch.Tensor:
    # counts of integers are spelt on float or int tensors by device; the CPU kernel takes floats
    if isinstance(value, Probe):
        raise Untracked("histogram of rows")
    return torch.histc(value.double(), bins, low, high)


@_handles(aten._assert_scalar, aten._assert_async, aten._assert_tensor_metadata)
def _assertion(*_: Any, **__: Any) -> None:
    return None


# these take the same meaning whether or not a row is among their inputs
_ALWAYS = frozenset(
    {
        aten.full,
        aten.empty,
        aten.new_empty,
        aten.empty_strided,
        aten.new_empty_strided,
        aten.empty_like,
        aten.full_like,
        aten.zeros_like,
        aten.ones_like,
        aten._local_scalar_dense,
        aten.sym_size,
        aten.sym_numel,
        aten.histc,
        aten._assert_scalar,
        aten._assert_async,
        aten._assert_tensor_metadata,
        aten._grouped_mm,
    }
)


# -- pointwise --------------------------------------------------------------------------------

_ZERO_IF_ANY = {"aten::mul"}
_ZERO_IF_ALL = {
    "aten::add",
    "aten::sub",
    "aten::neg",
    "aten::where",
    "aten::relu",
    "aten::abs",
    "aten::alias",
    "aten::maximum",
    "aten::minimum",
}


def _result_is_zero(name: str, flags: list[bool | None]) -> bool:
    """Whether f(operands) is zero where the flagged operands are (None: a scalar argument)."""
    tensors = [flag for flag in flags if flag is not None]
    if name in _ZERO_IF_ANY:
        return any(tensors)
    if name == "aten::div":
        return bool(flags[0])
    if name == "prims::fma":
        return bool((flags[0] or flags[1]) and flags[2])
    if name == "aten::where":
        return bool(flags[1] and flags[2])
    return name in _ZERO_IF_ALL and len(tensors) == len(flags) and all(tensors)


def _is_zero_operand(value: Value, dim: int | None) -> bool:
    """Whether an operand is zero outside its columns; one that broadcasts (dim None) is one
    number there."""
    if dim is not None:
        return zero_outside(value, dim)
    return isinstance(value, torch.Tensor) and not bool(value.any())


def _pointwise(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Apply a broadcasting elementwise operation to the columns that all its operands track."""
    operands = [a for a in args if isinstance(a, (Probe, torch.Tensor))]
    ndim = max(operand.ndim for operand in operands)
    datas: list[torch.Tensor] = []
    for operand in operands:
        data = operand.data if isinstance(operand, Probe) else operand
        datas.append(data)
    supports: list[Support | None] = []
    for dim in range(ndim):
        spanning = [
            (i, dim - ndim + o.ndim)
            for i, o in enumerate(operands)
            if dim - ndim + o.ndim >= 0 and shape_of(o)[dim - ndim + o.ndim] != 1
        ]
        common = common_support([operands[i] for i, _ in spanning], [d for _, d in spanning])
        if common is None:
            supports.append(None)
            continue
        for i, d in spanning:
            current = make(
                datas[i],
                tuple(support_of(operands[i], k) if k == d else None for k in range(datas[i].ndim)),
            )
            datas[i] = restrict(current, d, common.cols, common.size)
        flags: list[bool | None] = []
        positions = dict(spanning)
        count = 0
        for arg in args:
            if isinstance(arg, (Probe, torch.Tensor)):
                flags.append(_is_zero_operand(operands[count], positions.get(count)))
                count += 1
            elif isinstance(arg, (int, float)) and not isinstance(arg, bool):
                flags.append(None)
        zero = _result_is_zero(target._schema.name, flags)
        supports.append(Support(common.size, common.cols, zero))
    remaining = iter(datas)
    new_args = [next(remaining) if isinstance(a, (Probe, torch.Tensor)) else a for a in args]
    new_args, kwargs = pytree.tree_map(_on_host, (new_args, kwargs))
    return make(_lift(target(*new_args, **kwargs)), tuple(supports))


@_handles(prims.convert_element_type, aten._to_copy, prims.device_put)
def _convert(value: Value, dtype: Any = None, **kwargs: Any) -> Value:
    assert isinstance(value, Probe)
    dtype = kwargs.get("dtype", dtype)
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise Untracked(f"rows converted to {dtype}")
    return value


@_handles(
    aten.clone,
    aten.alias,
    aten.detach,
    aten.contiguous,
    aten.lift_fresh_copy,
    prims.view_of,
)
def _same(value: Value, **_: Any) -> Value:
    return value


# -- shapes -----------------------------------------------------------------------------------


def _resolve_shape(shape: Sequence[int], numel: int) -> tuple[int, ...]:
    shape = tuple(int(s) for s in shape)
    if -1 in shape:
        known = math.prod(s for s in shape if s != -1)
        shape = tuple(numel // known if s == -1 else s for s in shape)
    if math.prod(shape) != numel:
        raise ValueError(f"view of {numel} elements as {shape}")
    return shape


def _view_groups(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:
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


@_handles(aten.view, aten.reshape, aten._unsafe_view)
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
    sizes, supports = list(new), [None] * len(new)
    for left, right in _view_groups(old, new):
        partial = [i for i in left if value.supports[i]]
        if not partial:
            continue
        kept = [j for j in right if new[j] != 1]
        if len(partial) != 1 or len(kept) != 1 or new[kept[0]] != old[partial[0]]:
            raise Untracked("mixes rows and columns in a view")
        supports[kept[0]] = value.supports[partial[0]]  # type: ignore[call-overload]
        sizes[kept[0]] = value.data.shape[partial[0]]
    return make(value.data.reshape(sizes), tuple(supports))


@_handles(aten.permute)
def _permute(value: Value, dims: Sequence[int]) -> Value:
    assert isinstance(value, Probe)
    order = [normalize_dim(d, value.ndim) for d in dims]
    return make(value.data.permute(order), tuple(value.supports[d] for d in order))


@_handles(aten.transpose, aten.t)
def _transpose(value: Value, dim0: int = 0, dim1: int = 1) -> Value:
    order = list(range(value.ndim))
    a, b = normalize_dim(dim0, value.ndim), normalize_dim(dim1, value.ndim)
    order[a], order[b] = order[b], order[a]
    return _permute(value, order)


@_handles(aten.unsqueeze)
def _unsqueeze(value: Value, dim: int) -> Value:
    assert isinstance(value, Probe)
    dim = normalize_dim(dim, value.ndim + 1)
    supports = (*value.supports[:dim], None, *value.supports[dim:])
    return make(value.data.unsqueeze(dim), supports)


@_handles(aten.squeeze)
def _squeeze(value: Value, dim: int | Sequence[int] | None = None) -> Value:
    assert isinstance(value, Probe)
    shape = value.shape
    dims = range(len(shape)) if dim is None else ([dim] if isinstance(dim, int) else dim)
    gone = {d for raw in dims if shape[d := normalize_dim(raw, len(shape))] == 1}
    kept = [d for d in range(len(shape)) if d not in gone]
    data = value.data.reshape([value.data.shape[d] for d in kept])
    return make(data, tuple(value.supports[d] for d in kept))


@_handles(aten.expand)
def _expand(value: Value, shape: Sequence[int], **_: Any) -> Value:
    assert isinstance(value, Probe)
    lead = len(shape) - value.ndim
    supports: Supports = (None,) * lead + value.supports
    sizes = [
        -1 if dim >= lead and supports[dim] else size for dim, size in enumerate(shape)
    ]
    return make(value.data.expand(sizes), supports)


@_handles(aten.repeat)
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


@_handles(aten.slice)
def _slice(
    value: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    dim = normalize_dim(dim, value.ndim)
    size = shape_of(value)[dim]
    bounds = slice(start, end, step).indices(size)
    return _cut(value, dim, *bounds)


@_handles(aten.select)
def _select(value: Value, dim: int, index: int) -> Value:
    assert isinstance(value, Probe)
    dim = normalize_dim(dim, value.ndim)
    if value.supports[dim]:
        raise Untracked("selects one column")
    supports = value.supports[:dim] + value.supports[dim + 1 :]
    return make(value.data.select(dim, index), supports)


@_handles(aten.split_with_sizes)
def _split_with_sizes(value: Value, sizes: Sequence[int], dim: int = 0) -> list[Value]:
    dim = normalize_dim(dim, value.ndim)
    if sum(sizes) != shape_of(value)[dim]:
        raise ValueError(f"split of {shape_of(value)[dim]} into {list(sizes)}")
    parts, start = [], 0
    for size in sizes:
        parts.append(_cut(value, dim, start, start + size, 1))
        start += size
    return parts


@_handles(aten.split, aten.chunk)
def _split(value: Value, size: int, dim: int = 0) -> list[Value]:
    dim = normalize_dim(dim, value.ndim)
    total = shape_of(value)[dim]
    return [_cut(value, dim, at, min(at + size, total), 1) for at in range(0, total, size)]


@_handles(aten.unbind)
def _unbind(value: Value, dim: int = 0) -> list[Value]:
    return [_select(value, dim, i) for i in range(shape_of(value)[dim])]


@_handles(aten.cat)
def _cat(values: Sequence[Value], dim: int = 0) -> Value:
    ndim = max(v.ndim for v in values)
    values = [v for v in values if v.ndim == ndim]
    dim = normalize_dim(dim, ndim)
    datas, supports = _aligned(values, skip=dim)
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


def _aligned(
    values: Sequence[Value], skip: int, carriers: Sequence[Value] | None = None
) -> tuple[list[torch.Tensor], Supports]:
    """Restrict tensors of one rank to common columns in every dimension but `skip`.

    The supports returned have None at `skip`, and are zero where all `carriers` are (default: all
    values; indices are given as values but carry none).
    """
    carriers = values if carriers is None else carriers
    dims = [d for d in range(values[0].ndim) if d != skip]
    # agree on every dimension before any is cut: a constant is only recognised while whole
    commons: dict[int, Support | None] = {}
    for dim in dims:
        common = common_support(values, [dim] * len(values))
        if common is not None:
            zero = all(zero_outside(v, dim) for v in carriers)
            common = Support(common.size, common.cols, zero)
        commons[dim] = common
    currents = list(values)
    for dim, common in commons.items():
        if common is not None:
            currents = [_restricted(current, dim, common) for current in currents]
    datas = [c.data if isinstance(c, Probe) else c for c in currents]
    return datas, tuple(commons.get(d) for d in range(values[0].ndim))


# -- gathers and scatters ---------------------------------------------------------------------


@_handles(aten.index)
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


@_handles(aten.index_put)
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
        base = _restricted(base, base.ndim - back, common)
        if back <= values.ndim and shape_of(values)[-back] != 1:
            values = _restricted(values, values.ndim - back, common)
    base_data = base.data if isinstance(base, Probe) else base
    values_data = values.data if isinstance(values, Probe) else values
    out = aten.index_put(base_data.clone(), list(indices), values_data, accumulate)
    return make(out, tuple(commons.get(base.ndim - dim) for dim in range(base.ndim)))


def _num_indexed(indices: Sequence[torch.Tensor | None]) -> int:
    """How many leading dimensions the indices take (a bool mask takes several)."""
    return sum(i.ndim if i.dtype == torch.bool else 1 for i in indices if i is not None)


def _restricted(value: Value, dim: int, support: Support) -> Value:
    """`value` with `dim` cut down to `support`."""
    own = list(value.supports) if isinstance(value, Probe) else [None] * value.ndim
    data = restrict(value, dim, support.cols, support.size)
    own[dim] = support
    return make(data, tuple(own))


@_handles(aten.index_select)
def _index_select(value: Value, dim: int, index: torch.Tensor) -> Value:
    assert isinstance(value, Probe)
    dim = normalize_dim(dim, value.ndim)
    if value.supports[dim]:
        raise Untracked("indexes columns")
    return make(value.data.index_select(dim, index), value.supports)


@_handles(aten.index_add)
def _index_add(
    base: Value, dim: int, index: torch.Tensor, source: Value, *, alpha: float = 1
) -> Value:
    dim = normalize_dim(dim, base.ndim)
    if support_of(base, dim) or support_of(source, dim):
        raise Untracked("indexes columns")
    (base_data, source_data), supports = _aligned([base, source], skip=dim)
    return make(base_data.index_add(dim, index, source_data, alpha=alpha), supports)


@_handles(aten.gather)
def _gather(value: Value, dim: int, index: Value, **_: Any) -> Value:
    if isinstance(index, Probe) or support_of(value, normalize_dim(dim, value.ndim)):
        raise Untracked("gathers columns")
    dim = normalize_dim(dim, value.ndim)
    (data, index_data), supports = _aligned([value, index], skip=dim, carriers=[value])
    return make(data.gather(dim, index_data), supports)


def _scatter_handler(name: str) -> Handler:
    def handler(base: Value, dim: int, index: Value, source: Value) -> Value:
        dim = normalize_dim(dim, base.ndim)
        if isinstance(index, Probe) or not isinstance(source, (Probe, torch.Tensor)):
            raise Untracked("scatters at rows' values, or a number")
        if any(support_of(v, dim) for v in (base, source)):
            raise Untracked("scatters columns")
        (base_data, index_data, source_data), supports = _aligned(
            [base, index, source], skip=dim, carriers=[base, source]
        )
        return make(getattr(base_data, name)(dim, index_data, source_data), supports)

    return handler


_HANDLERS[aten.scatter_add] = _scatter_handler("scatter_add")
_HANDLERS[aten.scatter] = _scatter_handler("scatter")


@_handles(aten.slice_scatter)
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
    if own is None:
        raise Untracked("writes a block of rows")
    (base_data, source_data), supports = _aligned([base, source], skip=dim)
    if support_of(base, dim) is None and not zero_outside(base, dim):
        raise Untracked("writes columns over untracked ones")
    written = {chosen[c]: source_data.select(dim, i) for i, c in enumerate(own.cols)}
    kept = {}
    known = support_of(base, dim)
    if known is not None:
        kept = {
            c: base_data.select(dim, i) for i, c in enumerate(known.cols) if c not in chosen
        }
    columns = {**kept, **written}
    cols = tuple(sorted(columns))
    data = torch.stack([columns[c].expand(_without(source_data, dim)) for c in cols], dim)
    new = Support(size, cols, own.zero and (known is None or known.zero))
    return make(data, (*supports[:dim], new, *supports[dim + 1 :]))


def _without(data: torch.Tensor, dim: int) -> list[int]:
    return [s for d, s in enumerate(data.shape) if d != dim]


@_handles(aten.constant_pad_nd)
def _pad(value: Value, pad: Sequence[int], fill: float = 0) -> Value:
    assert isinstance(value, Probe)
    for pair in range(len(pad) // 2):
        if value.supports[value.ndim - 1 - pair] and (pad[2 * pair] or pad[2 * pair + 1]):
            raise Untracked("pads columns")
    return make(aten.constant_pad_nd(value.data, list(pad), fill), value.supports)


# -- reductions and products ------------------------------------------------------------------


@_handles(aten.sum)
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
        None if d in gone else s
        for d, s in enumerate(value.supports)
        if keepdim or d not in gone
    ]
    return make(value.data.sum(sorted(gone), keepdim), tuple(supports))


@_handles(aten.mm)
def _mm(left: Value, right: Value, **_: Any) -> Value:
    a, b = contract_pair(left, 1, right, 0)
    return make(a @ b, (support_of(left, 0), support_of(right, 1)))


@_handles(aten.bmm)
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


@_handles(aten._grouped_mm)
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
