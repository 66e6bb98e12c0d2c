"""The activation between the two expert GEMMs, as a small value with a printable spelling.

The spelling is the string argument of ``comet::moe_layer``, so it shows up in graph dumps:
``kind`` or ``kind:option:option``, for example ``silu_glu``, ``silu_glu:up_first`` or
``swiglu_oai:interleaved:alpha=1.702:limit=7.0``.

Legend: S rows, N columns of the in-projection (2I when gate and up are fused), I expert
intermediate dim.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

GATED_KINDS = (
    "silu_glu",
    "gelu_glu",
    "gelu_tanh_glu",
    "relu_glu",
    "sigmoid_glu",
    "swiglu_oai",
)
PLAIN_KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")


@dataclasses.dataclass(frozen=True)
class Activation:
    """What happens between the in- and the out-projection of an expert.

    `kind` names the function. For a gated kind, `interleaved` says that the fused columns run
    gate0, up0, gate1, up1 ... instead of gate half, up half; `up_first` swaps the two (with
    separate matrices: the gate comes from `w_up`). `limit` clamps the gate to at most `limit`
    and the up to +-`limit` before the function. `alpha` is the slope of ``swiglu_oai``:
    ``(up + 1) * gate * sigmoid(alpha * gate)``.
    """

    kind: str
    interleaved: bool = False
    up_first: bool = False
    alpha: float | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in GATED_KINDS + PLAIN_KINDS:
            raise ValueError(
                f"unknown activation {self.kind!r}; allowed: {', '.join(GATED_KINDS + PLAIN_KINDS)}"
            )
        if not self.gated and (self.interleaved or self.up_first or self.limit is not None):
            raise ValueError(
                f"activation {self.kind!r} has no gate, so it takes no interleaved, up_first or "
                f"limit option (got {self}); use one of {', '.join(GATED_KINDS)}"
            )
        if (self.kind == "swiglu_oai") != (self.alpha is not None):
            raise ValueError(
                f"option alpha={self.alpha} does not fit activation {self.kind!r}: swiglu_oai "
                "needs alpha, every other activation refuses it"
            )
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"activation option limit must be > 0, got {self.limit}")

    @property
    def gated(self) -> bool:
        """Whether the function takes two inputs, gate and up."""
        return self.kind in GATED_KINDS

    def __str__(self) -> str:
        parts = [self.kind]
        parts += ["interleaved"] if self.interleaved else []
        parts += ["up_first"] if self.up_first else []
        parts += [f"alpha={self.alpha!r}"] if self.alpha is not None else []
        parts += [f"limit={self.limit!r}"] if self.limit is not None else []
        return ":".join(parts)

    @classmethod
    def parse(cls, text: str) -> Activation:
        """Read the spelling that `str` writes."""
        return _parse(text)

    def split(self, pre_SN: Tensor, up_SI: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Cut pre-activation rows into (gate [S, I], up [S, I]); up is None without a gate.

        `pre_SN` [S, N] holds both when fused; with separate matrices it is [S, I] and `up_SI`
        comes from `w_up`.
        """
        if not self.gated:
            return pre_SN, None
        if up_SI is not None:
            first, second = pre_SN, up_SI
        elif self.interleaved:
            first, second = pre_SN[..., 0::2], pre_SN[..., 1::2]
        else:
            first, second = pre_SN.chunk(2, dim=-1)
        return (second, first) if self.up_first else (first, second)

    def join(self, d_gate: Tensor, d_up: Tensor | None, *, fused: bool) -> tuple[Tensor, ...]:
        """Undo `split` for gradients: (d_pre [S, N],) when fused, else (d_pre, d_up_pre)."""
        if d_up is None:
            return (d_gate,)
        first, second = (d_up, d_gate) if self.up_first else (d_gate, d_up)
        if not fused:
            return first, second
        if self.interleaved:
            return (torch.stack((first, second), dim=-1).flatten(-2),)
        return (torch.cat((first, second), dim=-1),)

    def apply(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """Return the activated rows [S, I]; differentiable, every step in the input dtype."""
        if up is None:
            return self._function(gate)
        gate, up = self._clamp(gate, up)
        if self.kind == "swiglu_oai":
            return (up + 1) * (gate * torch.sigmoid(gate * self._slope))
        return self._function(gate) * up

    def backward(
        self, d_h: Tensor, gate: Tensor, up: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (d_gate, d_up) [S, I] of `apply` for the gradient `d_h` [S, I] of its result."""
        if up is None:
            return self._function_backward(d_h, gate), None
        raw_gate, raw_up = gate, up
        gate, up = self._clamp(gate, up)
        if self.kind == "swiglu_oai":
            sigmoid = torch.sigmoid(gate * self._slope)
            d_up = d_h * (gate * sigmoid)
            # d/dg [g * s(a g)] = s * (1 + a g (1 - s))
            slope = sigmoid * (1 + gate * self._slope * (1 - sigmoid))
            d_gate = d_h * (up + 1) * slope
        else:
            d_up = d_h * self._function(gate)
            d_gate = self._function_backward(d_h * up, gate)
        if self.limit is not None:
            d_gate = torch.where(raw_gate <= self.limit, d_gate, 0)
            d_up = torch.where(raw_up.abs() <= self.limit, d_up, 0)
        return d_gate, d_up

    @property
    def _slope(self) -> float:
        assert self.alpha is not None
        return self.alpha

    def _clamp(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        if self.limit is None:
            return gate, up
        return gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)

    def _function(self, gate: Tensor) -> Tensor:
        match self.kind.removesuffix("_glu"):
            case "silu":
                return F.silu(gate)
            case "gelu":
                return F.gelu(gate)
            case "gelu_tanh":
                return F.gelu(gate, approximate="tanh")
            case "relu":
                return F.relu(gate)
            case "relu2":
                return F.relu(gate).square()
            case "sigmoid":
                return torch.sigmoid(gate)
            case _:
                return gate

    def _function_backward(self, d_out: Tensor, gate: Tensor) -> Tensor:
        aten = torch.ops.aten
        match self.kind.removesuffix("_glu"):
            case "silu":
                return aten.silu_backward(d_out, gate)
            case "gelu":
                return aten.gelu_backward(d_out, gate, approximate="none")
            case "gelu_tanh":
                return aten.gelu_backward(d_out, gate, approximate="tanh")
            case "relu":
                return aten.threshold_backward(d_out, gate, 0)
            case "relu2":
                return d_out * (2 * F.relu(gate))
            case "sigmoid":
                return aten.sigmoid_backward(d_out, torch.sigmoid(gate))
            case _:
                return d_out


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> Activation:
    kind, *options = text.split(":")
    interleaved = up_first = False
    numbers: dict[str, float] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if option == "interleaved":
            interleaved = True
        elif option == "up_first":
            up_first = True
        elif name in ("alpha", "limit") and equals:
            try:
                numbers[name] = float(value)
            except ValueError:
                raise ValueError(
                    f"activation option {name} needs a number, got {value!r} in {text!r}"
                ) from None
        else:
            raise ValueError(
                f"unknown option {option!r} in activation {text!r}; allowed: interleaved, "
                "up_first, alpha=<number>, limit=<number>"
            )
    return Activation(
        kind, interleaved, up_first, alpha=numbers.get("alpha"), limit=numbers.get("limit")
    )
