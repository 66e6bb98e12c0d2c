"""The tolerance of the numeric tests: earned from what eager does, not typed."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_matches_ref(
    out: Tensor,
    ref: Tensor,
    eager: Tensor,
    *,
    what: str = "output",
    rounded_to: torch.dtype | None = None,
) -> None:
    """Assert that `out` is as close to `ref` as the same computation in eager is, up to twice.

    `ref` is computed in a wider dtype from the same values, `eager` in the dtype of `out`. The
    bound is ``2 * max|eager - ref|`` plus one rounding step of the largest value, both for the
    largest error and, against eager's, for the root mean square. NaN and infinity must sit in the
    same places. A result that is wider than the values it is made of names their dtype as
    `rounded_to`, since eager may round less often there than it says, on some processors. Where
    `ref` is no wider than `out` (float64) eager has no error to measure by, and torch's own bounds
    hold.
    """
    assert out.shape == ref.shape, f"{what}: shape {tuple(out.shape)}, ref {tuple(ref.shape)}"
    assert out.dtype == eager.dtype, f"{what}: dtype {out.dtype}, eager {eager.dtype}"
    if out.numel() == 0:
        return
    if out.dtype == ref.dtype:
        torch.testing.assert_close(out, ref, msg=lambda text: f"{what}: {text}")
        return
    wide_out, wide_ref, wide_eager = out.double(), ref.double(), eager.double()
    for name, find in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        wrong = (find(wide_out) != find(wide_ref)).nonzero()
        assert len(wrong) == 0, f"{what}: {name} placed unlike ref, first at {wrong[0].tolist()}"
    finite = wide_ref.isfinite()
    error = (wide_out - wide_ref)[finite].abs()
    eager_error = (wide_eager - wide_ref)[finite].abs()
    step = torch.finfo(rounded_to or out.dtype).eps * wide_ref[finite].abs().max().item()
    for name, got, allowed in (
        ("largest error", error.max(), 2 * eager_error.max() + step),
        ("rms error", _rms(error), 2 * _rms(eager_error) + step),
    ):
        assert got <= allowed, (
            f"{what}: {name} {got:.3e} > {allowed:.3e} (eager {eager_error.max():.3e}, "
            f"rms relative to ref {_rms(error) / _rms(wide_ref[finite]):.3e})"
        )


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
