"""Grouped products of float32 rows on a GPU: as exact as torch's, and nothing read on the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from comet_compile.kernels import grouped
from comet_compile.kernels.routing import SortedSlots, sort_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

L, A = 12, 2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda")


def slots_of(num_tokens: int) -> SortedSlots:
    """Rows of experts of which two have none, and strays behind them."""
    scores = drawn(num_tokens, L, seed=7)
    scores[:, [0, 5]] = -1e9
    ids = scores.topk(A, dim=1).indices
    ids[::7, 0] = L
    return sort_slots(ids, L)


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("num_tokens", [5, 130, 3000])
@pytest.mark.parametrize(("k", "n"), [(512, 384), (200, 72)])
@pytest.mark.parametrize("transposed", [False, True])
def test_as_exact_as_products_of_torch(num_tokens: int, k: int, n: int, transposed: bool) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32, "else torch's are not exact"
    slots = slots_of(num_tokens)
    a, rows = drawn(slots.num_rows, k), drawn(slots.num_rows, n, seed=2)
    stack = drawn(L, n, k, seed=1).transpose(1, 2) if transposed else drawn(L, k, n, seed=1)
    assert grouped.runs_float_kernels(a.dtype, a.device)
    out = grouped.grouped_mm(a, stack, slots)
    out_L = grouped.grouped_mm_weight(a, rows, slots, stack)
    assert out_L.stride() == stack.stride()
    ours, torchs, start = [], [], 0
    for expert, end in enumerate(slots.host_ends):
        own, start = slice(start, end), end
        if own.start == own.stop:
            assert not out_L[expert].any(), "an expert without rows"
            continue
        for left, right, got in (
            (a[own], stack[expert], out[own]),
            (a[own].T, rows[own], out_L[expert]),
        ):
            exact = left.double() @ right.double()
            ours.append(error(got, exact))
            torchs.append(error(left @ right, exact))
    assert max(ours) <= max(2 * max(torchs), 1e-6)


def test_less_is_only_done_if_allowed() -> None:
    slots = slots_of(500)
    a, stack = drawn(slots.num_rows, 512), drawn(L, 512, 128, seed=1)
    exact = grouped.grouped_mm(a, stack, slots)
    torch.set_float32_matmul_precision("high")
    try:
        rounded = grouped.grouped_mm(a, stack, slots)
    finally:
        torch.set_float32_matmul_precision("highest")
    rows = slice(0, slots.host_ends[-1])
    assert 1e-5 < error(rounded[rows], exact[rows].double()) < 1e-2


def test_infinity_stays_what_it_is() -> None:
    """Splitting it into parts must not make NaN of it."""
    slots = sort_slots(torch.zeros(16, 1, dtype=torch.int64, device="cuda"), 1)
    a, stack = torch.ones(16, 32, device="cuda"), torch.ones(1, 32, 16, device="cuda")
    a[3, 4], a[5, 6] = torch.inf, torch.nan
    out = grouped.grouped_mm(a, stack, slots)
    assert out[3].isinf().all()
    assert out[5].isnan().all()
    assert out[[0, 1, 2, 4]].eq(32).all()


def test_nothing_is_read_on_the_host() -> None:
    slots = slots_of(300)
    a, stack = drawn(slots.num_rows, 64), drawn(L, 64, 64, seed=1)
    eager = grouped.grouped_mm(a, stack, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grouped.grouped_mm(a, stack, slots)
    graph.replay()
    rows = slice(0, slots.host_ends[-1])
    assert torch.equal(out[rows], eager[rows])
