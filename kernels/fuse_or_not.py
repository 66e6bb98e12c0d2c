"""Whether a layer's fused kernels are expected to be faster than torch's operators.

On the GPUs that comet was measured on they are, for every size. Where Triton's products are far
from what torch's grouped GEMM reaches, they may not be; `comet doctor --measure` finds out, and the
cost model decides by what it found. Only layers of one device are left to torch: between ranks,
what fusing hides outweighs the difference.
"""

from __future__ import annotations

from comet_compile.kernels import machine_file
from comet_compile.kernels.cost_model import Load, Machine, predict, total_us
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.plan import Device
from comet_compile.kernels.unfused_cost import predict_unfused

# The model is off by as much now and then, and fused is what was tried.
_MARGIN = 0.1


def why_unfused(
    params: ExpertParams, math: LayerMath, top_k: int, num_tokens: int, device: Device
) -> str | None:
    """Return why a layer of `num_tokens` tokens should run on torch's operators, None if fused.

    None, too, where the model knows nothing: of the device, or of experts without a gate.
    """
    machine = machine_file.machine_of(device)
    if machine is None or not math.activation.gated or num_tokens == 0:
        return None
    hidden, inter = params.w_in.shape[1], params.w_out.shape[1]
    load = Load(hidden, inter, params.num_experts, top_k, (num_tokens,))
    fused, unfused = both_us(load, machine)
    if unfused >= (1 - _MARGIN) * fused:
        return None
    return (
        f"torch's operators are expected to be faster: {unfused:.0f} us instead of {fused:.0f} for "
        f"{num_tokens} tokens, by what `comet doctor --measure` found"
    )


def both_us(load: Load, machine: Machine) -> tuple[float, float]:
    """Return the predicted microseconds of the fused and of the unfused forward."""
    return total_us(predict(load, machine)), total_us(predict_unfused(load, machine))
