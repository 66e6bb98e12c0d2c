"""The activation of an expert inside a kernel: the device twin of `activation.py`.

`first` and `second` are the two halves of an expert's in-projection in the order of the weights,
float32, of one shape; a plain (ungated) activation has no second half and is given `first` twice.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _function(x, KIND: tl.constexpr):
    """Return the function of one input that `KIND` is built on."""
    if KIND == "silu_glu" or KIND == "silu":
        out = x * _sigmoid(x)
    elif KIND == "gelu_glu" or KIND == "gelu":
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh_glu" or KIND == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) == sigmoid(2 z)
        out = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "relu_glu" or KIND == "relu":
        out = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "relu2":
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        out = positive * positive
    elif KIND == "sigmoid_glu":
        out = _sigmoid(x)
    else:
        tl.static_assert(KIND == "identity", "unknown activation")
        out = x
    return out


@triton.jit
def activate(
    first,
    second,
    alpha,
    limit,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    UP_FIRST: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Return the activated values; options as in `activation.Activation`."""
    if not GATED:
        return _function(first, KIND)
    if UP_FIRST:
        gate, up = second, first
    else:
        gate, up = first, second
    if CLAMP:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    if KIND == "swiglu_oai":
        out = (up + 1.0) * (gate * _sigmoid(alpha * gate))
    else:
        out = _function(gate, KIND) * up
    return out
