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

from comet_compile.passes.probe import (
    Probe,
    Support,
    Untracked,
    Value,
    common_support,
    make,
    restrict,
    shape_of,
    support_of,
    zero_outside,
)

aten = torch.ops.aten
prims = torch.ops.prims

Handler = Callable[..., Any]
# operation -> what it does to probes; filled here, in probe_moves and in probe_products
HANDLERS: dict[Any, Handler] = {}
# operations of other libraries, by name: they need not be registered here
NAMED_HANDLERS: dict[str, Handler] = {}


def handles(*packets: Any) -> Callable[[Handler], Handler]:
    def register(fn: Handler) -> Handler:
        for packet in packets:
            HANDLERS[packet] = fn
        return fn

    return register


def handles_named(name: str) -> Callable[[Handler], Handler]:
    def register(fn: Handler) -> Handler:
        NAMED_HANDLERS[name] = fn
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
    named = NAMED_HANDLERS.get(target._schema.name)
    if named is not None:
        return named(*args, **kwargs)
    packet = target.overloadpacket
    tracked = _holds_probe(args) or _holds_probe(tuple(kwargs.values()))
    if packet in _ALWAYS or (tracked and packet in HANDLERS):
        return HANDLERS[packet](*args, **kwargs)
    if tracked:
        if torch.Tag.pointwise in target.tags:
            return _pointwise(target, args, kwargs)
        raise Untracked(f"{target} on rows")
    return _plain(target, args, kwargs)


def _holds_probe(values: Sequence[Any]) -> bool:
    return any(
        _holds_probe(value) if isinstance(value, (tuple, list)) else isinstance(value, Probe)
        for value in values
    )


def _mapped(fn: Callable[[Any], Any], value: Any) -> Any:
    """Map what an operation takes or returns: it nests in no other ways, and pytree is slow."""
    if isinstance(value, tuple):
        return tuple(_mapped(fn, one) for one in value)
    if isinstance(value, list):
        return [_mapped(fn, one) for one in value]
    return fn(value)


def _hosted(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hosted = {name: _mapped(_on_host, value) for name, value in kwargs.items()}
    return _mapped(_on_host, tuple(args)), hosted


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
    args, kwargs = _hosted(args, kwargs)
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    return _mapped(_lift, target(*args, **kwargs))


def _filled(shape: Sequence[int], value: Any, dtype: torch.dtype | None) -> torch.Tensor:
    """A constant that costs one element whatever its shape (and is visibly constant)."""
    if dtype is None:
        dtype = torch.float64 if isinstance(value, float) else torch.int64
    dtype = torch.float64 if dtype.is_floating_point else dtype
    return torch.full((), value, dtype=dtype).expand(tuple(shape))


@handles(aten.full)
def _full(shape: Sequence[int], value: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return _filled(shape, value, dtype)


def _uninitialised(shape: Sequence[int], dtype: torch.dtype | None) -> torch.Tensor:
    """Memory nobody wrote yet: NaN, or an index that no table has."""
    floating = dtype is None or dtype.is_floating_point
    return _filled(shape, math.nan if floating else -(2**31), dtype or torch.float64)


@handles(aten.empty, aten.new_empty, aten.empty_strided, aten.new_empty_strided)
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


HANDLERS[aten.empty_like] = _like_handler(None)
HANDLERS[aten.full_like] = _like_handler(None)
HANDLERS[aten.zeros_like] = _like_handler(0)
HANDLERS[aten.ones_like] = _like_handler(1)


@handles(aten._local_scalar_dense)
def _local_scalar_dense(value: Value) -> Any:
    if isinstance(value, Probe):
        raise Untracked("reads a row's value on the host")
    return value.item()


@handles(aten.sym_size)
def _sym_size(value: Value, dim: int | None = None) -> Any:
    return shape_of(value) if dim is None else shape_of(value)[dim]


@handles(aten.sym_numel)
def _sym_numel(value: Value) -> int:
    return math.prod(shape_of(value))


@handles(aten.histc)
def _histc(value: Value, bins: int = 100, low: float = 0, high: float = 0) -> torch.Tensor:
    # counts of integers are spelt on float or int tensors by device; the CPU kernel takes floats
    if isinstance(value, Probe):
        raise Untracked("histogram of rows")
    return torch.histc(value.double(), bins, low, high)


@handles(aten._assert_scalar, aten._assert_async, aten._assert_tensor_metadata)
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


def _is_zero_operand(value: Value, dim: int | None, common: Support) -> bool:
    """Whether an operand is zero outside the `common` columns; one that broadcasts (dim None) is
    one number there."""
    if dim is None:
        return isinstance(value, torch.Tensor) and not bool(value.any())
    if not zero_outside(value, dim):
        return False
    own = support_of(value, dim)
    if own is None or not isinstance(value, Probe):
        return True
    # columns that another operand does not know are dropped: they must be zero, too, or garbage in
    # a row that stays recognisable as such (behind the last rows of a grouped GEMM, say)
    if set(own.cols) <= set(common.cols):
        return True
    is_kept = torch.tensor([col in common.cols for col in own.cols], dtype=torch.bool)
    dropped = value.data.index_select(dim, (~is_kept).nonzero().view(-1))
    if not bool(dropped.any()):
        return True
    kept = value.data.index_select(dim, is_kept.nonzero().view(-1))
    if not kept.shape[dim]:
        return False
    garbage = kept.isnan().all(dim, keepdim=True)
    return bool(((dropped == 0) | (dropped.isnan() & garbage)).all())


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
                flags.append(_is_zero_operand(operands[count], positions.get(count), common))
                count += 1
            elif isinstance(arg, (int, float)) and not isinstance(arg, bool):
                flags.append(None)
        zero = _result_is_zero(target._schema.name, flags)
        supports.append(Support(common.size, common.cols, zero))
    remaining = iter(datas)
    new_args = [next(remaining) if isinstance(a, (Probe, torch.Tensor)) else a for a in args]
    hosted, kwargs = _hosted(new_args, kwargs)
    return make(_lift(target(*hosted, **kwargs)), tuple(supports))


@handles(prims.convert_element_type, aten._to_copy, prims.device_put)
def _convert(value: Value, dtype: Any = None, **kwargs: Any) -> Value:
    assert isinstance(value, Probe)
    dtype = kwargs.get("dtype", dtype)
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise Untracked(f"rows converted to {dtype}")
    return value


@handles(
    aten.clone,
    aten.alias,
    aten.detach,
    aten.contiguous,
    aten.lift_fresh_copy,
    prims.view_of,
)
def _same(value: Value, **_: Any) -> Value:
    return value
