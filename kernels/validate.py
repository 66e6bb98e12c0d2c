"""One check of the arguments of the layer ops, for real and for fake tensors alike."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from comet_compile.kernels.activation import Activation
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.portable import Routed

FORMS = ("local", "all_to_all", "replicated")
WEIGHT_PLACES = ("before", "between", "after")
SAVES = ("nothing", "pre_activation", "balanced")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTS = (torch.int64, torch.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """The tensors of one layer call, in the order of the ops."""

    x: Tensor  # [T, H]
    ids: Tensor  # [T, A]
    weights: Tensor | None  # [T, A]
    w_in: Tensor  # [L, H, N]
    w_up: Tensor | None  # [L, H, I]
    w_out: Tensor  # [L, I, H]
    b_in: Tensor | None  # [L, N]
    b_up: Tensor | None  # [L, I]
    b_out: Tensor | None  # [L, H]

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The tensors' names."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in order."""
        return (
            self.x, self.ids, self.weights, self.w_in, self.w_up, self.w_out, self.b_in, self.b_up,
            self.b_out,
        )  # fmt: skip

    @property
    def routed(self) -> Routed:
        """The tokens and their routing."""
        return Routed(self.x, self.ids, self.weights)

    @property
    def params(self) -> ExpertParams:
        """The experts' parameters."""
        return ExpertParams(self.w_in, self.w_up, self.w_out, self.b_in, self.b_up, self.b_out)


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found of a call's arguments.

    Calls of equal `number` differ in addresses and values only.
    """

    math: LayerMath
    number: int


_checked: dict[Any, Checked] = {}
_MAX_CHECKED = 4096
_numbers = itertools.count()


def check_again(layer: Layer, *options: Any) -> Checked:
    """`check_layer` for real tensors, which remembers what it has found in order."""
    first, second = layer.w_in, layer.w_up
    call = (
        *options,
        *map(describe, layer.tensors()),
        # the two are one descriptor to a kernel, which has their distance
        None if second is None else second.data_ptr() - first.data_ptr(),
    )
    checked = _checked.get(call)
    if checked is None:
        checked = Checked(check_layer(layer, *options), next(_numbers))
        if len(_checked) >= _MAX_CHECKED:
            _checked.clear()
        _checked[call] = checked
    return checked


def describe(tensor: Tensor | None) -> Any:
    """Return all of a tensor that a call depends on but its address and its values."""
    if tensor is None:
        return None
    # launches are specialised to addresses that are multiples of 16
    place = tensor.data_ptr() & 15
    return tensor.shape, tensor.stride(), tensor.dtype, place, tensor.device


def check_layer(
    layer: Layer,
    activation: str,
    weight_place: str,
    product_dtype: torch.dtype,
    form: str,
    group_name: str,
    save: str = "nothing",
) -> LayerMath:
    """Raise ValueError with what, got and allowed, or return the layer's arithmetic.

    Sizes that are symbols are not compared: a comparison would bind them.
    """
    act = Activation.parse(activation)
    _check_choice("form", form, FORMS)
    _check_choice("weight_place", weight_place, WEIGHT_PLACES)
    _check_choice("save", save, SAVES)
    _check_choice("product_dtype", product_dtype, _FLOATS)
    if (form == "local") != (group_name == ""):
        raise ValueError(
            f"group_name is {group_name!r} with form {form!r}; allowed: '' for 'local', the name "
            "of a process group for the other forms"
        )
    if layer.w_up is not None and not act.gated:
        raise ValueError(f"w_up is given, but activation {activation!r} has no gate; allowed: None")
    if layer.b_up is not None and layer.w_up is None:
        raise ValueError("b_up is given without w_up; allowed: both, or neither")
    _check_dtypes(layer)
    _check_shapes(layer, fused_gate=act.gated and layer.w_up is None)
    return LayerMath(act, weight_place, product_dtype)


def _check_shapes(layer: Layer, fused_gate: bool) -> None:
    for name, dims in (("x", 2), ("ids", 2), ("w_in", 3), ("w_out", 3)):
        tensor = getattr(layer, name)
        if tensor.dim() != dims:
            raise ValueError(f"{name} has shape {_shape(tensor)}; allowed: {dims} dims")
    num_experts, hidden, num_columns = layer.w_in.shape
    (num_tokens, top_k), inter = layer.ids.shape, layer.w_out.shape[1]
    if isinstance(top_k, int) and top_k == 0:
        raise ValueError(f"ids has shape {_shape(layer.ids)}; allowed: an expert or more per token")
    allowed = {
        "x": (num_tokens, hidden),
        "weights": (num_tokens, top_k),
        "w_in": (num_experts, hidden, 2 * inter if fused_gate else inter),
        "w_up": (num_experts, hidden, inter),
        "w_out": (num_experts, inter, hidden),
        "b_in": (num_experts, num_columns),
        "b_up": (num_experts, inter),
        "b_out": (num_experts, hidden),
    }
    for name, shape in allowed.items():
        tensor = getattr(layer, name)
        if tensor is not None and _differ(tensor.shape, shape):
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"{name} has shape {_shape(tensor)}; allowed: [{wanted}]")


def _check_dtypes(layer: Layer) -> None:
    _check_choice("dtype of x", layer.x.dtype, _FLOATS)
    _check_choice("dtype of ids", layer.ids.dtype, _INTS)
    if layer.weights is not None:
        _check_choice("dtype of weights", layer.weights.dtype, _FLOATS)
    for name in layer.names():
        tensor = getattr(layer, name)
        if tensor is None:
            continue
        if name not in ("ids", "weights"):
            _check_choice(f"dtype of {name} beside that of x", tensor.dtype, (layer.x.dtype,))
        _check_choice(f"device of {name} beside that of x", tensor.device, (layer.x.device,))


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def _differ(got: Sequence[object], want: Sequence[object]) -> bool:
    return len(got) != len(want) or any(
        isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(got, want, strict=True)
    )


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(map(str, tensor.shape)) + "]"
