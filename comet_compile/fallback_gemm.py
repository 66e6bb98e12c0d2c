"""A backward that can be traced, for transformers' GEMM of experts that are not bfloat16.

Experts in float32 or float16 go through the op ``transformers::grouped_mm_fallback`` while
compiling. Before transformers 5.23 its backward is a Python loop over sizes read on the host, into
which AOTAutograd walks: training fails to compile under every backend, with
GuardOnDataDependentSymNode. Later releases made the backward an op of its own; for earlier ones
this does the same, with the same arithmetic, when a graph with that op is compiled.

Changes: how the op is differentiated, in this process, from then on. Keeps: its values and the
values of its gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["make_backward_traceable"]

_FORWARD = "grouped_mm_fallback"
_BACKWARD = "comet::grouped_mm_fallback_backward"


def make_backward_traceable(gm: fx.GraphModule) -> None:
    """Make the op trainable under compilation if `gm`, a Dynamo graph, calls it."""
    calls_it = any(
        f"transformers.{_FORWARD}" in str(node.target)
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    )
    if calls_it and not hasattr(torch.ops.transformers, f"{_FORWARD}_backward"):
        _register()


@functools.cache
def _register() -> None:
    op = torch.library.custom_op(
        _BACKWARD,
        _gradients,
        mutates_args=(),
        schema="(Tensor rows, Tensor stack, Tensor ends, Tensor grad) -> (Tensor, Tensor)",
    )
    op.register_fake(_fake_gradients)
    torch.library.register_autograd(
        f"transformers::{_FORWARD}", _differentiate, setup_context=_save_inputs
    )


def _gradients(
    rows_SK: Tensor, stack_EKN: Tensor, ends_E: Tensor, grad_SN: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows [S, K] and of the stack [E, K, N]; zero where no group has rows."""
    grad_rows, grad_stack = torch.zeros_like(rows_SK), torch.zeros_like(stack_EKN)
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end == start:
            continue
        grad = grad_SN[start:end]
        torch.mm(grad, stack_EKN[expert].t(), out=grad_rows[start:end])
        torch.mm(rows_SK[start:end].t(), grad, out=grad_stack[expert])
        start = end
    return grad_rows, grad_stack


def _fake_gradients(
    rows: Tensor, stack: Tensor, _ends: Tensor, _grad: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(stack)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    rows, stack, ends = inputs
    ctx.save_for_backward(rows, stack, ends)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, stack, ends = ctx.saved_tensors
    grads = torch.ops.comet.grouped_mm_fallback_backward(rows, stack, ends, grad)
    return grads[0], grads[1], None
