"""Values of the interpreter: tensors that are known on a few columns only.

The prover runs a region of the graph for real, in float64, but on a sparse instance of it: the
tokens, the weights and the incoming gradients are zero outside a handful of feature columns. A
:class:`Probe` holds only those columns of a tensor and remembers, per dimension, which they are.
Rows (tokens, slots, experts) are kept in full, so index arithmetic is exact and runs at the sizes
that the graph was traced with, while [S, 2I] costs as much as [S, 12].

Example: x [T, H] with H = 2048 tracked on columns (0, 1025, 2047) is a Probe of data [T, 3] with
supports (None, Support(2048, (0, 1025, 2047), zero=True)). Splitting a [S, 2I] probe at I keeps
the columns below I on one side and renumbers the others.

Plain `torch.Tensor` values (indices, routing weights, constants) are known everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch


class Untracked(Exception):
    """The operation cannot be followed on tracked columns; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class Support:
    """The columns of one dimension that are tracked.

    `size` is the dimension's real size, `cols` the tracked positions in ascending order, `zero`
    whether every other entry is exactly zero (then contracting over the dimension is exact).
    """

    size: int
    cols: tuple[int, ...]
    zero: bool


Supports = tuple[Support | None, ...]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A tensor known on the columns of its supports (None: known along the whole dimension)."""

    data: torch.Tensor
    supports: Supports

    @property
    def shape(self) -> tuple[int, ...]:
        """The real shape, as in the graph."""
        return tuple(
            support.size if support else size
            for support, size in zip(self.supports, self.data.shape, strict=True)
        )

    @property
    def ndim(self) -> int:
        return self.data.ndim


Value = Probe | torch.Tensor


def make(data: torch.Tensor, supports: Supports) -> Value:
    """Wrap `data` unless every dimension is known in full."""
    return Probe(data, supports) if any(supports) else data


def support_of(value: Value, dim: int) -> Support | None:
    return value.supports[dim] if isinstance(value, Probe) else None


def shape_of(value: Value) -> tuple[int, ...]:
    return tuple(value.shape)


def normalize_dim(dim: int, ndim: int) -> int:
    if not -ndim <= dim < max(ndim, 1):
        raise Untracked(f"dimension {dim} of a {ndim}-d tensor")
    return dim % ndim if ndim else 0


def restrict(value: Value, dim: int, cols: tuple[int, ...], size: int) -> torch.Tensor:
    """Data of `value` on `cols` of `dim` (a dimension of real size `size`, or 1: broadcast).

    Columns that `value` does not track are zeros if its support says so, else an error.
    """
    data = value.data if isinstance(value, Probe) else value
    support = support_of(value, dim)
    if support is None:
        if data.shape[dim] == 1 and size != 1:
            return data
        if data.shape[dim] != size:
            raise Untracked(f"sizes {data.shape[dim]} and {size} meet in one dimension")
        if data.stride(dim) == 0:
            # one number seen along the whole dimension: copied, it would be as large as the graph's
            sizes = [len(cols) if d == dim else -1 for d in range(data.ndim)]
            return data.narrow(dim, 0, min(1, size)).expand(sizes)
        return data.index_select(dim, torch.tensor(cols, dtype=torch.int64))
    if support.size != size:
        raise Untracked(f"sizes {support.size} and {size} meet in one dimension")
    if support.cols == cols:
        return data
    place = {col: i for i, col in enumerate(support.cols)}
    if not support.zero and not set(cols) <= set(place):
        raise Untracked("reads columns that are not tracked")
    positions = torch.tensor([place.get(col, len(place)) for col in cols], dtype=torch.int64)
    zeros = data.new_zeros([1 if d == dim else s for d, s in enumerate(data.shape)])
    return torch.cat([data, zeros], dim).index_select(dim, positions)


def zero_outside(value: Value, dim: int) -> bool:
    """Whether `value` is exactly zero on every untracked column of `dim`."""
    if isinstance(value, Probe):
        support = value.supports[dim]
        if support is not None:
            return support.zero
        return False
    # a constant made by full/zeros: one number seen along the whole dimension
    if value.stride(dim) != 0:
        return False
    return not bool(value.narrow(dim, 0, min(1, value.shape[dim])).any())


def common_support(values: Sequence[Value], dims: Sequence[int]) -> Support | None:
    """The columns that all `values` know along their `dims`; None if none of them is partial.

    A value that is zero outside its columns knows every column. `zero` is set when every value
    is zero outside.
    """
    partial = [s for v, d in zip(values, dims, strict=True) if (s := support_of(v, d))]
    if not partial:
        return None
    size = partial[0].size
    if any(support.size != size for support in partial):
        raise Untracked(f"sizes {sorted({s.size for s in partial})} meet in one dimension")
    known = [set(support.cols) for support in partial if not support.zero]
    cols = set.intersection(*known) if known else {c for s in partial for c in s.cols}
    zero = all(zero_outside(v, d) for v, d in zip(values, dims, strict=True))
    return Support(size, tuple(sorted(cols)), zero)


def contraction(left: Value, left_dim: int, right: Value, right_dim: int) -> Support | None:
    """The columns over which a product of `left` and `right` may be summed exactly: every other
    product must have a factor that is known to be zero."""
    sides = [support_of(left, left_dim), support_of(right, right_dim)]
    partial = [s for s in sides if s is not None]
    if not partial:
        return None
    common = common_support([left, right], [left_dim, right_dim])
    assert common is not None
    zeros = [s for s in partial if s.zero]
    if len(zeros) == len(partial):
        return common
    if len(zeros) == 1 and set(zeros[0].cols) <= set(common.cols):
        return zeros[0]
    raise Untracked("contracts over columns that are not tracked")


def contract_pair(
    left: Value, left_dim: int, right: Value, right_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Data of both operands on the columns of their :func:`contraction`."""
    support = contraction(left, left_dim, right, right_dim)
    if support is None:
        left_data = left.data if isinstance(left, Probe) else left
        right_data = right.data if isinstance(right, Probe) else right
        return left_data, right_data
    return (
        restrict(left, left_dim, support.cols, support.size),
        restrict(right, right_dim, support.cols, support.size),
    )


def cut_to(value: Value, dim: int, support: Support) -> Value:
    """`value` with `dim` cut down to `support`."""
    own: list[Support | None] = [None] * value.ndim
    if isinstance(value, Probe):
        own = list(value.supports)
    data = restrict(value, dim, support.cols, support.size)
    own[dim] = support
    return make(data, tuple(own))


def aligned(
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
            currents = [cut_to(current, dim, common) for current in currents]
    datas = [c.data if isinstance(c, Probe) else c for c in currents]
    return datas, tuple(commons.get(d) for d in range(values[0].ndim))
