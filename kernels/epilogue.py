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


@triton.jit
def _derivative(x, KIND: tl.constexpr):
    """Return the derivative of `_function`."""
    if KIND == "silu_glu" or KIND == "silu":
        sigmoid = _sigmoid(x)
        out = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif KIND == "gelu_glu" or KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        out = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif KIND == "gelu_tanh_glu" or KIND == "gelu_tanh":
        sigmoid = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        out = sigmoid + x * sigmoid * (1.0 - sigmoid) * slope
    elif KIND == "relu_glu" or KIND == "relu":
        out = tl.where(x > 0, 1.0, 0.0)
    elif KIND == "relu2":
        out = 2.0 * tl.maximum(x, 0.0)
    elif KIND == "sigmoid_glu":
        sigmoid = _sigmoid(x)
        out = sigmoid * (1.0 - sigmoid)
    else:
        tl.static_assert(KIND == "identity", "unknown activation")
        out = tl.full(x.shape, 1.0, tl.float32)
    return out


@triton.jit
def activate_backward(
    d_h,
    first,
    second,
    alpha,
    limit,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    UP_FIRST: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Return the gradients of (first, second) for the gradient of what `activate` returned."""
    if not GATED:
        d_first = d_h * _derivative(first, KIND)
        return d_first, d_first
    if UP_FIRST:
        raw_gate, raw_up = second, first
    else:
        raw_gate, raw_up = first, second
    gate, up = raw_gate, raw_up
    if CLAMP:
        gate = tl.minimum(gate, limit)
        up = tl.maximum(tl.minimum(up, limit), -limit)
    if KIND == "swiglu_oai":
        sigmoid = _sigmoid(alpha * gate)
        d_up = d_h * gate * sigmoid
        d_gate = d_h * (up + 1.0) * sigmoid * (1.0 + alpha * gate * (1.0 - sigmoid))
    else:
        d_up = d_h * _function(gate, KIND)
        d_gate = d_h * up * _derivative(gate, KIND)
    if CLAMP:
        d_gate = tl.where(raw_gate <= limit, d_gate, 0.0)
        d_up = tl.where(tl.abs(raw_up) <= limit, d_up, 0.0)
    if UP_FIRST:
        return d_up, d_gate
    return d_gate, d_up
