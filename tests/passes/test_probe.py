"""The interpreter against ATen: what it tracks is exactly what the real operation gives.

Full tensors are drawn, zero outside of the tracked columns where a support says so; every handler
must return the columns of the real result, know which columns those are, and claim zeros only
where there are zeros. Or it must refuse, by `Untracked`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from comet_compile.passes.probe import (
    Probe,
    Support,
    Untracked,
    Value,
    common_support,
    contract_pair,
    make,
    restrict,
    zero_outside,
)
from comet_compile.passes.probe_ops import apply

aten = torch.ops.aten
prims = torch.ops.prims

S, H, E = 6, 10, 3
COLS = (0, 3, 9)
ZERO = Support(H, COLS, zero=True)
OPEN = Support(H, COLS, zero=False)


def full(shape: Sequence[int], supports: Sequence[Support | None], seed: int = 0) -> Tensor:
    """A tensor that is zero outside of the columns of its `zero` supports."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(tuple(shape), dtype=torch.float64, generator=generator)
    for dim, support in enumerate(supports):
        if support is not None and support.zero:
            mask = torch.zeros(support.size, dtype=torch.bool)
            mask[list(support.cols)] = True
            value = value * mask.view([-1 if d == dim else 1 for d in range(len(shape))])
    return value


def probe(value: Tensor, supports: Sequence[Support | None]) -> Value:
    """What the interpreter holds of `value`."""
    for dim, support in enumerate(supports):
        if support is not None:
            value = value.index_select(dim, torch.tensor(support.cols))
    return make(value, tuple(supports))


class Both:
    """The same tensor twice: in full, and as the interpreter holds it."""

    def __init__(self, shape: Sequence[int], supports: Sequence[Support | None], seed: int = 0):
        self.real = full(shape, supports, seed)
        self.held = probe(self.real, supports)


def check(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Apply `target` to both and compare; returns what the interpreter holds of the result."""

    def pick(name: str) -> tuple[Any, Any]:
        return pytree.tree_map(
            lambda a: getattr(a, name) if isinstance(a, Both) else a, (args, kwargs)
        )

    real_args, real_kwargs = pick("real")
    held_args, held_kwargs = pick("held")
    real = target(*real_args, **real_kwargs)
    held = apply(target, tuple(held_args), held_kwargs)
    many = isinstance(real, (list, tuple))
    for one, other in zip(held if many else [held], real if many else [real], strict=True):
        assert_holds(one, other)
    return held


def assert_holds(held: Value, real: Tensor) -> None:
    assert tuple(held.shape) == tuple(real.shape)
    if not isinstance(held, Probe):
        torch.testing.assert_close(held.to(real.dtype), real)
        return
    assert any(held.supports)
    tracked = real
    for dim, support in enumerate(held.supports):
        if support is None:
            continue
        assert list(support.cols) == sorted(set(support.cols))
        tracked = tracked.index_select(dim, torch.tensor(support.cols, dtype=torch.int64))
        if support.zero:
            others = [c for c in range(support.size) if c not in support.cols]
            rest = real.index_select(dim, torch.tensor(others, dtype=torch.int64))
            assert not rest.any(), "claims zeros where there are none"
    torch.testing.assert_close(held.data, tracked)


def rows(support: Support = ZERO, seed: int = 0) -> Both:
    return Both((S, H), (None, support), seed)


each_support = pytest.mark.parametrize("support", [ZERO, OPEN], ids=["zero", "open"])

PERM = torch.tensor([2, 0, 5, 1, 4, 3])
TOKENS = torch.tensor([0, 0, 1, 1, 1, 2])
COLUMN = torch.linspace(-1, 1, S, dtype=torch.float64).unsqueeze(1)


# -- pointwise ---------------------------------------------------------------------------------

POINTWISE = {
    "add": lambda x, y: (aten.add.Tensor, x, y),
    "add_number": lambda x, y: (aten.add.Tensor, x, 1),
    "add_scaled": lambda x, y: (aten.add.Tensor, x, y),
    "sub": lambda x, y: (aten.sub.Tensor, x, y),
    "mul": lambda x, y: (aten.mul.Tensor, x, y),
    "mul_number": lambda x, y: (aten.mul.Tensor, x, 2),
    "mul_column": lambda x, y: (aten.mul.Tensor, x, COLUMN),
    "add_column": lambda x, y: (aten.add.Tensor, x, COLUMN),
    "div_number": lambda x, y: (aten.div.Tensor, x, 3.0),
    "div_column": lambda x, y: (aten.div.Tensor, x, COLUMN + 2),
    "number_minus": lambda x, y: (aten.rsub.Scalar, x, 1),
    "neg": lambda x, y: (aten.neg.default, x),
    "abs": lambda x, y: (aten.abs.default, x),
    "exp": lambda x, y: (aten.exp.default, x),
    "sigmoid": lambda x, y: (aten.sigmoid.default, x),
    "relu": lambda x, y: (aten.relu.default, x),
    "silu": lambda x, y: (aten.silu.default, x),
    "gelu": lambda x, y: (aten.gelu.default, x),
    "erf": lambda x, y: (aten.erf.default, x),
    "tanh": lambda x, y: (aten.tanh.default, x),
    "square": lambda x, y: (aten.pow.Tensor_Scalar, x, 2),
    "to_the_zero": lambda x, y: (aten.pow.Tensor_Scalar, x, 0),
    "clamp": lambda x, y: (aten.clamp.default, x, -0.5, 0.5),
    "clamp_above_zero": lambda x, y: (aten.clamp.default, x, 0.5, 1.0),
    "clamp_min": lambda x, y: (aten.clamp_min.default, x, 0.25),
    "clamp_max": lambda x, y: (aten.clamp_max.default, x, -0.25),
    "maximum": lambda x, y: (aten.maximum.default, x, y),
    "minimum": lambda x, y: (aten.minimum.default, x, y),
    "less": lambda x, y: (aten.lt.Tensor, x, y),
    "equal_zero": lambda x, y: (aten.eq.Scalar, x, 0),
    "where_rows": lambda x, y: (aten.where.self, COLUMN > 0, x, y),
    "where_number": lambda x, y: (
        aten.where.self, COLUMN > 0, x, torch.ones((), dtype=torch.float64)
    ),
    "where_zero": lambda x, y: (
        aten.where.self, COLUMN > 0, x, torch.zeros((), dtype=torch.float64)
    ),
    "masked_fill": lambda x, y: (aten.masked_fill.Scalar, x, COLUMN > 0, 0.0),
    "masked_fill_one": lambda x, y: (aten.masked_fill.Scalar, x, COLUMN > 0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("supports", [(ZERO, ZERO), (ZERO, OPEN), (OPEN, OPEN)], ids=str)
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name: str, supports: tuple[Support, Support]) -> None:
    target, *args = POINTWISE[name](rows(supports[0]), rows(supports[1], seed=1))
    check(target, *args)


def test_pointwise_on_different_columns() -> None:
    wide = Support(H, (0, 1, 3, 7), zero=True)
    held = check(aten.add.Tensor, rows(ZERO), rows(wide, seed=1))
    assert held.supports[1].cols == (0, 1, 3, 7, 9)
    held = check(aten.mul.Tensor, rows(ZERO), rows(Support(H, (0, 1, 3, 7), zero=False), seed=1))
    assert set(held.supports[1].cols) >= {0, 3}
    check(aten.add.Tensor, rows(OPEN), rows(wide, seed=1))


def test_pointwise_with_a_row_of_constants() -> None:
    bias = torch.randn(1, H, dtype=torch.float64)
    check(aten.add.Tensor, rows(), bias)
    check(aten.mul.Tensor, rows(OPEN), bias)


def test_fused_multiply_add() -> None:
    pytest.importorskip("torch._inductor.inductor_prims")
    if not hasattr(prims, "fma"):
        pytest.skip("this torch has no prims.fma")
    for first in (ZERO, OPEN):
        for last in (ZERO, OPEN):
            check(prims.fma.default, rows(first), rows(OPEN, 1), rows(last, 2))


# -- shapes ------------------------------------------------------------------------------------


@each_support
def test_rows_side_by_side(support: Support) -> None:
    x = rows(support)
    check(aten.view.default, x, [S * H])
    check(aten.view.default, Both((2, 3, H), (None, None, support)), [2, 3 * H])
    twice = Both((S, 2 * H), (None, Support(2 * H, (0, 3, 9, 10, 13, 19), support.zero)))
    check(aten.view.default, twice, [S, 2, H])
    check(aten.view.default, twice, [2, 3, 2, H])


@each_support
def test_shapes(support: Support) -> None:
    x = rows(support)
    check(aten.view.default, x, [2, 3, H])
    check(aten.view.default, x, [-1, 1, H])
    check(aten.view.default, x, [S, 1, H, 1])
    check(aten.permute.default, x, [1, 0])
    check(aten.transpose.int, x, 0, 1)
    check(aten.t.default, x)
    check(aten.unsqueeze.default, x, 1)
    check(aten.unsqueeze.default, x, -1)
    check(aten.clone.default, x)
    cube = Both((S, 1, H), (None, None, support))
    check(aten.squeeze.dim, cube, 1)
    check(aten.squeeze.default, cube)
    check(aten.expand.default, cube, [S, 2, H])
    check(aten.expand.default, cube, [S, 2, -1])
    check(aten.repeat.default, x, [2, 1])
    check(aten.select.int, x, 0, 2)
    check(aten.unbind.int, x, 0)
    check(aten.constant_pad_nd.default, x, [0, 0, 0, 2])


@each_support
def test_slices_of_columns(support: Support) -> None:
    x = rows(support)
    check(aten.slice.Tensor, x, 1, 0, 5)
    check(aten.slice.Tensor, x, 1, 5, 2**63 - 1)
    check(aten.slice.Tensor, x, -1, 0, H, 2)
    check(aten.slice.Tensor, x, 1, 1, H, 2)
    check(aten.slice.Tensor, x, 0, 1, 4)
    check(aten.slice.Tensor, x, 0, -2)
    check(aten.split.Tensor, x, 5, 1)
    check(aten.split.Tensor, x, 4, 0)
    check(aten.split_with_sizes.default, x, [2, 8], 1)


@each_support
def test_joins(support: Support) -> None:
    x, y = rows(support), rows(support, seed=1)
    check(aten.cat.default, [x, y], 1)
    check(aten.cat.default, [x, y], 0)
    check(aten.cat.default, [x, torch.zeros(2, H, dtype=torch.float64)], 0)
    check(aten.cat.default, [x, torch.ones(S, 2, dtype=torch.float64)], 1)


@each_support
def test_written_columns(support: Support) -> None:
    """Autograd undoes slices of columns so: the gradient of an interleaved gate."""
    half = Both((S, 5), (None, Support(5, (0, 2), support.zero)))
    base = torch.zeros((), dtype=torch.float64).expand(S, H)
    for start, step in ((0, 2), (1, 2), (0, 1), (5, 1)):
        end = H if step == 2 else start + 5
        check(aten.slice_scatter.default, base, half, 1, start, end, step)
        check(aten.slice_scatter.default, rows(), half, 1, start, end, step)


@each_support
def test_written_rows(support: Support) -> None:
    """Autograd undoes slices of rows so: the gradient of rows without the padding."""
    some = Both((S - 2, H), (None, support))
    for base in (rows(support, seed=1), torch.zeros((), dtype=torch.float64).expand(S, H)):
        check(aten.slice_scatter.default, base, some, 0, 0, -2)
        check(aten.slice_scatter.default, base, some, 0, 2, S)


@each_support
def test_select_scatter(support: Support) -> None:
    matrix = Both((S, H), (None, support))
    for index in (0, 2, -1):
        check(aten.select_scatter.default, torch.zeros(E, S, H).double(), matrix, 0, index)
        check(aten.select_scatter.default, Both((E, S, H), (None, None, ZERO)), matrix, 0, index)
    flipped = Both((H, E), (support, None))
    check(aten.select_scatter.default, torch.zeros(S, H, E).double(), flipped, 0, 1)


@each_support
def test_addmm(support: Support) -> None:
    x, matrix = rows(), Both((H, E), (ZERO, None))
    check(aten.addmm.default, torch.ones(E).double(), x, matrix)
    wide = Both((H, H), (ZERO, support))
    check(aten.addmm.default, Both((H,), (support,)), x, wide)
    with pytest.raises(Untracked):
        apply(aten.addmm.default, (torch.ones(E).double(), x.held, matrix.held), {"beta": 2})


# -- gathers and scatters ----------------------------------------------------------------------


@each_support
def test_gathers(support: Support) -> None:
    x = rows(support)
    check(aten.index.Tensor, x, [PERM])
    check(aten.index.Tensor, x, [PERM.view(2, 3)])
    check(aten.index_select.default, x, 0, TOKENS)
    check(aten.gather.default, x, 0, PERM.unsqueeze(1).expand(S, H))
    stack = Both((E, H, 4), (None, support, None))
    check(aten.index.Tensor, stack, [TOKENS])


@each_support
def test_scatters(support: Support) -> None:
    x = rows(support)
    zeros = torch.zeros((), dtype=torch.float64).expand(S, H)
    for base in (zeros, rows(ZERO, seed=2), rows(OPEN, seed=3)):
        check(aten.index_put.default, base, [PERM], x)
        check(aten.index_put.default, base, [TOKENS], x, True)
        check(aten.index_add.default, base, 0, TOKENS, x)
        check(aten.scatter_add.default, base, 0, TOKENS.unsqueeze(1).expand(S, H), x)
        check(aten.scatter.src, base, 0, PERM.unsqueeze(1).expand(S, H), x)


@each_support
def test_overwriting_is_not_adding(support: Support) -> None:
    """A scatter with a repeated index is not the sum that accumulate makes of it."""
    x = rows(support)
    zeros = torch.zeros((), dtype=torch.float64).expand(S, H)
    put = apply(aten.index_put.default, (zeros, [TOKENS], x.held), {})
    added = apply(aten.index_put.default, (zeros, [TOKENS], x.held, True), {})
    assert not torch.equal(put.data, added.data)


# -- products and sums -------------------------------------------------------------------------


def test_products() -> None:
    weight = Both((H, 7), (ZERO, Support(7, (1, 6), zero=True)))
    check(aten.mm.default, rows(ZERO), weight)
    check(aten.mm.default, rows(OPEN), weight)
    x, stack = Both((S, 1, H), (None, None, ZERO)), Both((S, H, 4), (None, ZERO, None))
    check(aten.bmm.default, x, stack)
    # the contraction over rows of a weight gradient
    left = Both((H, S), (ZERO, None))
    check(aten.mm.default, left, rows(OPEN, seed=1))


def test_means() -> None:
    check(aten.mean.dim, rows(OPEN), [0])
    check(aten.mean.dim, rows(ZERO), [1], True)
    check(aten.mean.default, rows(ZERO))


def test_sums() -> None:
    check(aten.sum.dim_IntList, rows(OPEN), [0])
    check(aten.sum.dim_IntList, rows(ZERO), [1])
    check(aten.sum.dim_IntList, rows(ZERO), [1], True)
    check(aten.sum.default, rows(ZERO))
    check(aten.sum.dim_IntList, Both((2, 3, H), (None, None, OPEN)), [1])


def grouped(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """aten._grouped_mm in float64, which the real one does not take."""
    ends = offs.tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    if right.ndim == 2:
        return torch.stack([left[:, a:b] @ right[a:b] for a, b in bounds])
    return torch.cat([left[a:b] @ right[e] for e, (a, b) in enumerate(bounds)])


@each_support
def test_grouped_products(support: Support) -> None:
    offs = torch.tensor([2, 2, 6], dtype=torch.int32)
    x = rows(support)
    stack = Both((E, H, 8), (None, ZERO, Support(8, (0, 4, 5), zero=True)))
    held = apply(aten._grouped_mm.default, (x.held, stack.held, offs), {})
    assert_holds(held, grouped(x.real, stack.real, offs))
    gradient = Both((S, 8), (None, Support(8, (0, 4), zero=False)), seed=1)
    left = probe(x.real.t(), (support, None))
    held = apply(aten._grouped_mm.default, (left, gradient.held, offs), {})
    assert_holds(held, grouped(x.real.t(), gradient.real, offs))


def test_rows_of_no_group_are_unwritten() -> None:
    offs = torch.tensor([1, 2, 4], dtype=torch.int32)
    stack = Both((E, H, 8), (None, ZERO, Support(8, (0,), zero=True)))
    held = apply(aten._grouped_mm.default, (rows().held, stack.held, offs), {})
    assert held.data[4:].isnan().all()
    assert not held.data[:4].isnan().any()


@pytest.mark.parametrize("offs", [[3, 2, 6], [2, 4, 7]], ids=["decreasing", "too_many"])
def test_bad_offsets_fail(offs: list[int]) -> None:
    stack = Both((E, H, 8), (None, ZERO, Support(8, (0,), zero=True)))
    with pytest.raises(ValueError, match="group offsets"):
        apply(aten._grouped_mm.default, (rows().held, stack.held, torch.tensor(offs)), {})


# -- what must not be followed -----------------------------------------------------------------

UNTRACKED: dict[str, tuple[Any, ...]] = {
    "sum_of_open_columns": (aten.sum.dim_IntList, rows(OPEN), [1]),
    "sum_of_everything": (aten.sum.default, rows(OPEN)),
    "mean_of_open_columns": (aten.mean.dim, rows(OPEN), [1]),
    "product_of_open_columns": (
        aten.mm.default, rows(OPEN), Both((H, 4), (OPEN, None), 1)
    ),
    "product_with_more_columns": (
        aten.mm.default, rows(OPEN), Both((H, 4), (Support(H, (0, 5), zero=True), None), 1)
    ),
    "softmax_of_columns": (aten._softmax.default, rows(), -1, False),
    "cumsum_of_columns": (aten.cumsum.default, rows(), 1),
    "sort_of_columns": (aten.sort.default, rows(), 1),
    "roll_of_columns": (aten.roll.default, rows(), [1], [1]),
    "flip_of_columns": (aten.flip.default, rows(), [1]),
    "view_across_columns": (aten.view.default, rows(), [S * 2, H // 2]),
    "three_dimensions_in_one": (aten.view.default, Both((2, 3, H), (None, None, ZERO)), [-1]),
    "columns_that_differ_by_row": (
        aten.view.default,
        Both((S, 2 * H), (None, Support(2 * H, (0, 3, 9, 10), zero=True))),
        [S, 2, H],
    ),
    "pad_of_columns": (aten.constant_pad_nd.default, rows(), [0, 1]),
    "index_of_columns": (aten.index.Tensor, rows(), [None, torch.tensor([0, 1])]),
    "gather_of_columns": (aten.gather.default, rows(), 1, torch.zeros(S, 2, dtype=torch.int64)),
    "one_column": (aten.select.int, rows(), 1, 0),
    "repeated_columns": (aten.repeat.default, rows(), [1, 2]),
    "number_on_the_host": (aten._local_scalar_dense.default, rows()),
    "rows_as_integers": (prims.convert_element_type.default, rows(), torch.int64),
    "columns_as_batches": (
        aten.bmm.default, Both((H, 2, 3), (ZERO, None, None)), torch.ones(H, 3, 2).double()
    ),
    "scatter_into_columns": (
        aten.scatter.src, rows(), 1, torch.zeros(S, H, dtype=torch.int64), rows(seed=1)
    ),
    "dropout": (aten.native_dropout.default, rows(), 0.5, True),
    "random": (aten.rand.default, [2, 2]),
    "in_place": (aten.add_.Tensor, torch.zeros(2), torch.ones(2)),
    "custom": (torch.ops.comet.moe_layer.default, torch.zeros(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNTRACKED)
def test_refuses_to_follow(name: str) -> None:
    target, *args = UNTRACKED[name]
    held = tuple(a.held if isinstance(a, Both) else a for a in args)
    with pytest.raises(Untracked):
        apply(target, held, {})


def test_python_functions_other_than_arithmetic_are_not_followed() -> None:
    with pytest.raises(Untracked, match="not an ATen operation"):
        apply(print, (1,), {})


# -- plain tensors and constants ---------------------------------------------------------------


def test_plain_tensors_run_for_real() -> None:
    values, positions = apply(aten.sort.default, (torch.tensor([3, 1, 2]),), {})
    assert values.tolist() == [1, 2, 3]
    assert positions.tolist() == [1, 2, 0]
    counts = apply(aten.histc.default, (torch.tensor([0, 1, 1], dtype=torch.int32), 3, 0, 2), {})
    assert counts.tolist() == [1, 2, 0]


def test_floating_point_is_float64() -> None:
    x = torch.ones(3, dtype=torch.bfloat16)
    assert apply(aten.add.Tensor, (x, 1), {}).dtype == torch.float64
    assert apply(aten.full.default, ([3], 1.0), {"dtype": torch.bfloat16}).dtype == torch.float64


def test_constants_know_their_zeros() -> None:
    zeros = apply(aten.full.default, ([4, H], 0), {"dtype": torch.float32})
    ones = apply(aten.full.default, ([4, H], 1), {"dtype": torch.float32})
    assert zero_outside(zeros, 1)
    assert not zero_outside(ones, 1)
    assert not zero_outside(torch.zeros(4, H), 1), "zeros by chance are no constant"


def test_unwritten_memory_shows() -> None:
    for target, args in (
        (aten.empty.memory_format, ([2, 3],)),
        (aten.empty_like.default, (rows().held,)),
        (aten.new_empty.default, (rows().held, [2, 3])),
    ):
        assert apply(target, args, {"dtype": torch.float32}).isnan().all()
    index = apply(aten.empty.memory_format, ([2],), {"dtype": torch.int64})
    assert (index < 0).all()


# -- columns -----------------------------------------------------------------------------------


def test_restrict() -> None:
    x = rows(ZERO)
    assert torch.equal(restrict(x.held, 1, (3, 4), H), x.real[:, [3, 4]])
    assert torch.equal(restrict(x.real, 1, (9, 1), H), x.real[:, [9, 1]])
    with pytest.raises(Untracked, match="not tracked"):
        restrict(rows(OPEN).held, 1, (3, 4), H)
    with pytest.raises(Untracked, match="sizes"):
        restrict(x.held, 1, (3,), H + 1)


def test_constants_are_never_unfolded() -> None:
    # a million rows of a million columns, all one number in memory
    zeros = torch.zeros(()).expand(10**6, 10**6)
    assert zero_outside(zeros, 1)
    assert not zero_outside(torch.ones(()).expand(10**6, 10**6), 1)
    cut = restrict(torch.arange(10**6).unsqueeze(1).expand(-1, 10**6), 1, (3, 5), 10**6)
    assert cut.shape == (10**6, 2)
    assert cut.stride() == (1, 0)
    assert cut[7].tolist() == [7, 7]
    assert restrict(torch.ones(()).expand(2, 0), 1, (), 0).shape == (2, 0)
    assert zero_outside(torch.ones(()).expand(2, 0).as_strided((2, 0), (0, 0)), 1)


def test_common_support() -> None:
    other = Support(H, (3, 5), zero=False)
    both = common_support([rows(OPEN).held, rows(other).held], [1, 1])
    assert both == Support(H, (3,), zero=False)
    both = common_support([rows(ZERO).held, rows(other).held], [1, 1])
    assert both == Support(H, (3, 5), zero=False)
    assert common_support([torch.ones(2)], [0]) is None
    narrow = probe(torch.ones(2, 4), (None, Support(4, (0,), zero=True)))
    with pytest.raises(Untracked, match="sizes"):
        common_support([rows().held, narrow], [1, 1])


def test_contraction_needs_zeros() -> None:
    left, right = contract_pair(rows(ZERO).held, 1, rows(OPEN).held, 1)
    assert left.shape == right.shape == (S, 3)
    with pytest.raises(Untracked):
        contract_pair(rows(OPEN).held, 1, rows(OPEN).held, 1)


def test_random_shapes_of_chains() -> None:
    """Chains of operations as layers have them, on many supports."""
    generator = torch.Generator().manual_seed(5)
    for trial in range(40):
        count = int(torch.randint(1, 5, (), generator=generator))
        cols = tuple(sorted(torch.randperm(H, generator=generator)[:count].tolist()))
        support = Support(H, cols, zero=bool(trial % 2))
        x = rows(support, seed=trial)
        gate, up = check(aten.split.Tensor, x, H // 2, 1)
        real_gate, real_up = x.real.split(H // 2, 1)
        held = apply(aten.mul.Tensor, (apply(aten.silu.default, (gate,), {}), up), {})
        assert_holds(held, torch.nn.functional.silu(real_gate) * real_up)
        held = apply(aten.index.Tensor, (held, [PERM]), {})
        real = (torch.nn.functional.silu(real_gate) * real_up)[PERM]
        assert_holds(held, real)
        held = apply(aten.cat.default, ([held, held], 1), {})
        assert_holds(held, torch.cat([real, real], 1))
        assert math.prod(held.shape) == real.numel() * 2
