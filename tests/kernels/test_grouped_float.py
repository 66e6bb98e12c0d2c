"""Grouped products of float32 rows, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from comet_compile.kernels import grouped_float

pytestmark = pytest.mark.usefixtures("interpreted", "tiles_of_64")


@pytest.fixture
def tiles_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_float, "largest_tile", lambda device: 64)


# rows of each expert: none, few, many; one expert; rows behind the last one's end
COUNTS = {
    "uneven": (3, 0, 37, 1, 0, 70),
    "empty_ends": (0, 20, 0),
    "one_expert": (33,),
    "no_rows": (0, 0),
}


def ends_of(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def contiguous_in(dim: int) -> Callable[[Tensor], Tensor]:
    """What gives a stack [L, K, N] the memory of one in which `dim` is contiguous."""
    if dim == 2:
        return lambda stack: stack.contiguous()
    return lambda stack: stack.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("k", "n", "dim"), [(32, 64, 1), (40, 72, 2)])
def test_rows(counts: str, k: int, n: int, dim: int) -> None:
    sizes = COUNTS[counts]
    num_rows = sum(sizes) + 5
    a, b = drawn(num_rows, k), contiguous_in(dim)(drawn(len(sizes), k, n))
    out = grouped_float.multiply_rows(a, b, ends_of(sizes))
    assert out.shape == (num_rows, n)
    start = 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        torch.testing.assert_close(out[rows], a[rows] @ b[expert])
        start += size


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("k", "n", "dim"), [(32, 64, 1), (40, 72, 2)])
def test_columns(counts: str, k: int, n: int, dim: int) -> None:
    sizes = COUNTS[counts]
    # columns of wider tensors, and garbage behind the last row
    a, b = drawn(sum(sizes) + 5, k + 8)[:, :k], drawn(sum(sizes) + 5, n + 8)[:, :n]
    a[sum(sizes) :] = torch.nan
    out = contiguous_in(dim)(torch.full((len(sizes), k, n), torch.nan))
    grouped_float.multiply_columns(a, b, ends_of(sizes), out)
    start = 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        torch.testing.assert_close(out[expert], a[rows].T @ b[rows])
        start += size


def test_precision_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert grouped_float._precision() == "tf32x3"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert grouped_float._precision() == "tf32"
