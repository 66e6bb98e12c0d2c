"""Suite "local": the experts of one device, without the router's GEMM.

The layer starts from router logits, so softmax and top-k are inside the timed region; "gemms" and
"comet-op" start from what these give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comet_compile.kernels import ops, paths  # ops registers the operators
from comet_compile.kernels.activation import Activation
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.portable import Routed
from moe_bench import layers
from moe_bench.errors import layer_errors
from moe_bench.shapes import Case
from moe_bench.workload import Workload

__all__ = ["ops", "workloads"]

ACTIVATION = "silu_glu"


def workloads(case: Case, device: torch.device) -> list[Workload]:
    """Return a workload per mode of the case, over the same weights and inputs."""
    shape = case.shape
    layer = layers.GroupedExperts(shape, device)
    x = layers.draw_tokens(shape, case.tokens, device, 0)
    logits = layers.draw_logits(shape, case.tokens, device, 0, hot=case.skew == "hot")
    weights, ids = layers.route(logits, shape.top_k)
    grad_y = layers.draw_tokens(shape, case.tokens, device, 1)
    order_S = torch.sort(ids.reshape(-1))[1]
    rows_SH = x[order_S // shape.top_k]
    return [
        _workload(case, mode, layer, x, logits, ids, weights, grad_y, rows_SH, order_S)
        for mode in case.modes
    ]


def _workload(
    case: Case,
    mode: str,
    layer: layers.GroupedExperts,
    x: Tensor,
    logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    grad_y: Tensor,
    rows_SH: Tensor,
    order_S: Tensor,
) -> Workload:
    train = mode == "train"
    leaves = (x, logits, weights, rows_SH)
    x, logits, weights, rows_SH = (t.detach().requires_grad_(train) for t in leaves)
    w_in, w_out = layer.gate_up_proj, layer.down_proj

    def errors(out: Tensor) -> dict[str, float]:
        got = {"y": out, "d_x": x.grad} if train else {"y": out}
        return layer_errors(
            x,
            ids,
            weights,
            range(case.shape.num_experts),
            lambda expert: (w_in[expert], w_out[expert]),
            got,
            grad_y if train else None,
            (lambda expert: (w_in.grad[expert], w_out.grad[expert])) if train else None,
        )

    return Workload(
        case=case,
        mode=mode,
        layer=layer,
        inputs=(x, logits),
        leaves=[x, logits, weights, rows_SH, w_in, w_out],
        errors=errors,
        functions={
            "comet-op": lambda x, ids, weights: call_op(x, ids, weights, w_in, w_out, train),
            "gemms": layers.BareGemms(w_in, w_out, ids),
        },
        inputs_of={"gemms": (rows_SH,), "comet-op": (x, ids, weights)},
        grad_of={"gemms": grad_y[order_S // case.shape.top_k]},
        grad_out=grad_y,
        flops=case.shape.forward_flops(case.tokens),
        why_portable=lambda: why_portable(x, ids, weights, w_in, w_out),
    )


def call_op(
    x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor, train: bool = False
) -> Tensor:
    """Return y [T, H] of the operator, for weights in Hugging Face's layout."""
    return torch.ops.comet.moe_layer(
        x,
        ids,
        weights,
        w_in.transpose(1, 2),
        None,
        w_out.transpose(1, 2),
        None,
        None,
        None,
        None,
        activation=ACTIVATION,
        weight_place="after",
        product_dtype=x.dtype,
        out_dtype=x.dtype,
        form="local",
        group_name="",
        save="pre_activation" if train else "nothing",
    )[0]


def why_portable(
    x: Tensor, ids: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor
) -> str | None:
    """Return why the operator takes the portable path for these inputs, None if it does not."""
    columns, rows = w_in.transpose(1, 2), w_out.transpose(1, 2)
    params = ExpertParams(columns, None, rows, None, None, None)
    math = LayerMath(Activation.parse(ACTIVATION), "after", x.dtype)
    return paths.why_portable(Routed(x, ids, weights), params, math)
