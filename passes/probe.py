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
    """Data of `value` on `cols` of `dim` (a dimension of real size `size`, or 1: broadcast)."""
    data = value.data if isinstance(value, Probe) else value
    support = support_of(value, dim)
    if support is not None:
        if support.size != size:
            raise Untracked(f"sizes {support.size} and {size} meet in one dimension")
        if support.cols == cols:
            return data
        positions = {col: i for i, col in enumerate(support.cols)}
        return data.index_select(dim, torch.tensor([positions[col] for col in cols]))
    if data.shape[dim] == 1 and size != 1:
        return data
    if data.shape[dim] != size:
        raise Untracked(f"sizes {data.shape[dim]} and {size} meet in one dimension")
    return data.index_select(dim, torch.tensor(cols, dtype=torch.int64))


def zero_outside(value: Value, dim: int) -> bool:
    """Whether `value` is exactly zero on every untracked column of `dim`."""
    if isinstance(value, Probe):
        support = value.supports[dim]
        if support is not None:
            return support.zero
        return False
    # a constant made by full/zeros: one number seen along the whole dimension
    return value.stride(dim) == 0 and not bool(value.any())


def common_support(values: Sequence[Value], dims: Sequence[int]) -> Support | None:
    """The columns that all `values` know along their `dims`; None if none of them is partial.

    `zero` is set when every value is zero outside.
    """
    partial = [s for v, d in zip(values, dims, strict=True) if (s := support_of(v, d))]
    if not partial:
        return None
    size = partial[0].size
    cols = set(partial[0].cols)
    for support in partial[1:]:
        if support.size != size:
            raise Untracked(f"sizes {size} and {support.size} meet in one dimension")
        cols &= set(support.cols)
    zero = all(zero_outside(v, d) for v, d in zip(values, dims, strict=True))
    return Support(size, tuple(sorted(cols)), zero)


def contraction(left: Value, left_dim: int, right: Value, right_dim: int) -> Support | None:
    """The columns over which a product of `left` and `right` may be summed exactly.

    A column that only one side tracks (or neither) must be zero on an untracked side.
    """
    a, b = support_of(left, left_dim), support_of(right, right_dim)
    if a is None and b is None:
        return None
    common = common_support([left, right], [left_dim, right_dim])
    assert common is not None
    kept = set(common.cols)
    a_cols = set(a.cols) if a else set(range(common.size))
    b_cols = set(b.cols) if b else set(range(common.size))
    a_zero, b_zero = a is not None and a.zero, b is not None and b.zero
    if (a_cols - kept and not b_zero) or (b_cols - kept and not a_zero):
        raise Untracked("contracts over columns that are not tracked")
    if len(a_cols | b_cols) < common.size and not (a_zero or b_zero):
        raise Untracked("contracts over columns that are not tracked")
    return common


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
