from __future__ import annotations

import pytest
import torch

from comet_compile.kernels.activation import GATED_KINDS, PLAIN_KINDS, Activation

SPECS = [
    *(f"{kind}:alpha=1.702" if kind == "swiglu_oai" else kind for kind in GATED_KINDS),
    *PLAIN_KINDS,
    "silu_glu:interleaved",
    "silu_glu:up_first",
    "silu_glu:interleaved:up_first",
    "gelu_glu:limit=0.5",
    "swiglu_oai:interleaved:alpha=1.702:limit=0.7",
]


@pytest.mark.parametrize("spec", SPECS)
def test_spelling_round_trips(spec: str) -> None:
    act = Activation.parse(spec)
    assert str(act) == spec
    assert Activation.parse(str(act)) == act


@pytest.mark.parametrize(
    ("spec", "separate_up"),
    [(spec, up) for spec in SPECS for up in (False, True) if "glu" in spec or not up],
)
def test_backward_is_the_derivative(spec: str, separate_up: bool) -> None:
    act = Activation.parse(spec)
    torch.manual_seed(0)
    fused = not separate_up and act.gated
    pre = torch.randn(5, 8 if fused else 4, dtype=torch.float64, requires_grad=True)
    up_pre = torch.randn(5, 4, dtype=torch.float64, requires_grad=True) if separate_up else None
    gate, up = act.split(pre, up_pre)
    h = act.apply(gate, up)
    d_h = torch.randn_like(h)

    inputs = [t for t in (pre, up_pre) if t is not None]
    expected = torch.autograd.grad(h, inputs, d_h)
    d_gate, d_up = act.backward(d_h, gate.detach(), None if up is None else up.detach())
    got = act.join(d_gate, d_up, fused=up_pre is None)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_limit_stops_the_gradient_where_it_clamps() -> None:
    act = Activation.parse("silu_glu:limit=1.0")
    gate = torch.tensor([[-9.0, 0.5, 9.0, 0.5]])
    up = torch.tensor([[0.5, -9.0, 0.5, 9.0]])
    d_gate, d_up = act.backward(torch.ones_like(gate), gate, up)
    assert d_up is not None
    assert (d_gate != 0).tolist() == [[True, True, False, True]]
    assert (d_up != 0).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("swish", "unknown activation 'swish'; allowed: silu_glu"),
        ("silu_glu:beta=2", "unknown option 'beta=2'"),
        ("silu_glu:limit=much", "option limit needs a number, got 'much'"),
        ("silu_glu:limit=-1", "limit must be > 0, got -1.0"),
        ("relu:interleaved", "activation 'relu' has no gate"),
        ("swiglu_oai", "swiglu_oai needs alpha"),
        ("silu_glu:alpha=2", "every other activation refuses it"),
    ],
)
def test_bad_spelling_is_named(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Activation.parse(spec)
