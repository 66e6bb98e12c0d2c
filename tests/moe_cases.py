"""Routed layers to test with, and a slow, independent statement of what they compute.

Legend: T tokens, A experts per token, E experts, H model dim, I expert intermediate dim.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

GRAD_NAMES = ("x", "weights", "w_in", "w_up", "w_out", "b_in", "b_up", "b_out")


@dataclasses.dataclass
class Case:
    """The arguments of one layer; tensors as `comet::moe_layer` takes them."""

    x: Tensor
    ids: Tensor
    weights: Tensor | None
    w_in: Tensor
    w_up: Tensor | None
    w_out: Tensor
    b_in: Tensor | None
    b_up: Tensor | None
    b_out: Tensor | None
    grad_y: Tensor
    activation: str
    weight_place: str
    product_dtype: torch.dtype
    out_dtype: torch.dtype

    def tensors(self) -> list[Tensor | None]:
        """The positional tensors of the op, without the token."""
        names = ("x", "ids", *GRAD_NAMES[1:])
        return [getattr(self, name) for name in names]

    def options(self) -> dict[str, object]:
        """The options that forward and backward share."""
        names = ("activation", "weight_place", "product_dtype")
        return {name: getattr(self, name) for name in names}

    def on(self, device: str) -> Case:
        """The same layer on `device`, weight strides kept."""
        changes = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **changes)

    def to(self, dtype: torch.dtype) -> Case:
        """The same values, every float in `dtype`."""
        changes = {
            field.name: value.to(dtype)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.is_floating_point()
        }
        return dataclasses.replace(self, **changes, product_dtype=dtype, out_dtype=dtype)


def make_case(
    *,
    seed: int = 0,
    num_tokens: int = 7,
    top_k: int = 3,
    num_experts: int = 3,
    hidden: int = 8,
    inter: int = 16,
    activation: str = "silu_glu",
    weight_place: str = "after",
    separate_up: bool = False,
    biases: bool = False,
    with_weights: bool = True,
    permuted: bool = False,
    dtype: torch.dtype = torch.float64,
    weights_dtype: torch.dtype | None = None,
    product_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    ids_dtype: torch.dtype = torch.int64,
    ids: Tensor | None = None,
) -> Case:
    """Return a random case; without `ids`, some are out of range and some repeat in a row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def matrix(rows: int, columns: int) -> Tensor:
        if permuted:
            return normal(num_experts, columns, rows).transpose(1, 2)
        return normal(num_experts, rows, columns)

    gated = "glu" in activation
    columns = 2 * inter if gated and not separate_up else inter
    if ids is None:
        shape = (num_tokens, top_k)
        ids = torch.randint(-1, num_experts + 1, shape, generator=generator)
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    return Case(
        x=normal(ids.shape[0], hidden),
        ids=ids.to(ids_dtype),
        weights=weights.to(weights_dtype or dtype) if with_weights else None,
        w_in=matrix(hidden, columns),
        w_up=matrix(hidden, inter) if separate_up else None,
        w_out=matrix(inter, hidden),
        b_in=normal(num_experts, columns) if biases else None,
        b_up=normal(num_experts, inter) if biases and separate_up else None,
        b_out=normal(num_experts, hidden) if biases else None,
        grad_y=normal(ids.shape[0], hidden).to(out_dtype or dtype),
        activation=activation,
        weight_place=weight_place,
        product_dtype=product_dtype or dtype,
        out_dtype=out_dtype or dtype,
    )


def token_loop(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (y, gradients by name), one token and one choice at a time, by autograd.

    Runs in the dtypes of the case: in float64 this is the reference, in bf16 it is eager. Shares
    no code with the package.
    """
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name in GRAD_NAMES
        if (value := getattr(case, name)) is not None
    }
    rows = []
    for token in range(case.x.shape[0]):
        total = torch.zeros(case.x.shape[1], dtype=_wide(case.x.dtype))
        for choice in range(case.ids.shape[1]):
            expert = int(case.ids[token, choice])
            if 0 <= expert < case.w_in.shape[0]:
                total = total + _one_row(case, leaves, token, choice, expert).to(total.dtype)
        rows.append(total.to(case.out_dtype))
    y = torch.stack(rows) if rows else case.x.new_zeros(case.x.shape, dtype=case.out_dtype)
    if not y.requires_grad:
        return y, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(
        y, list(leaves.values()), case.grad_y, allow_unused=True, materialize_grads=True
    )
    return y.detach(), dict(zip(leaves, grads, strict=True))


def _one_row(case: Case, leaves: dict[str, Tensor], token: int, choice: int, expert: int) -> Tensor:
    def weighted(row: Tensor, place: str, dtype: torch.dtype) -> Tensor:
        if case.weight_place != place or case.weights is None:
            return row
        scale = leaves["weights"][token, choice].to(case.product_dtype)
        return (row.to(case.product_dtype) * scale).to(dtype)

    def linear(row: Tensor, matrix: str, bias: str) -> Tensor:
        out = row @ leaves[matrix][expert]
        return out + leaves[bias][expert] if bias in leaves else out

    row = weighted(leaves["x"][token], "before", case.x.dtype)
    first = linear(row, "w_in", "b_in")
    second = linear(row, "w_up", "b_up") if "w_up" in leaves else None
    hidden = weighted(_activate(case.activation, first, second), "between", case.x.dtype)
    return weighted(linear(hidden, "w_out", "b_out"), "after", case.product_dtype)


def _activate(spec: str, first: Tensor, second: Tensor | None) -> Tensor:
    kind, *options = spec.split(":")
    numbers = dict(option.split("=") for option in options if "=" in option)
    functions = {
        "silu": lambda v: v * torch.sigmoid(v),
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "relu": torch.relu,
        "relu2": lambda v: torch.relu(v) ** 2,
        "sigmoid": torch.sigmoid,
        "identity": lambda v: v,
    }
    if "glu" not in kind:
        return functions[kind](first)
    if second is None:
        if "interleaved" in options:
            first, second = first[0::2], first[1::2]
        else:
            first, second = first[: len(first) // 2], first[len(first) // 2 :]
    gate, up = (second, first) if "up_first" in options else (first, second)
    if "limit" in numbers:
        limit = float(numbers["limit"])
        gate, up = torch.clamp(gate, max=limit), torch.clamp(up, -limit, limit)
    if kind == "swiglu_oai":
        return (up + 1) * gate * torch.sigmoid(float(numbers["alpha"]) * gate)
    return functions[kind.removesuffix("_glu")](gate) * up


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
