"""``comet::moe_layer`` and ``comet::moe_layer_backward``: all that the passes know of the kernels.

Meaning: ``y[t] = sum_j weights[t, j] * FFN_{ids[t, j]}(x[t])``, weights None = ones, ids outside
[0, E) contribute nothing to any output. E = L for the forms "local" and "replicated", L * P for
"all_to_all". `refs.py` says the same in plain PyTorch for one device.

- "local": one device, `group_name` is "".
- "all_to_all": tokens are sharded over the group, T may differ per rank and be 0; expert e lives on
  group rank ``e // L`` as its local expert ``e % L``.
- "replicated": `ids` are local expert ids with strays for the others' experts; y is the sum over
  the group of each rank's part, reduced in `out_dtype`. Its backward takes `grad_y` as it is and
  returns this rank's part of `d_x` and `d_weights`, not reduced.

`weight_place`: the routing weight multiplies the token row ("before"), the activated row
("between") or the expert's output row ("after"), in `product_dtype`. `save`: "pre_activation" keeps
the rows in front of the activation for the backward, in a form private to the two ops
(`saved_rows`). With "all_to_all" that is room for P * S rows, or with "balanced" for little more
than a rank's share, and only a hint: the backward knows whether all were kept. With `free_saved`
the backward may give their memory back once it has read them; a later backward over the same
forward computes them again.

`token` orders the distributed ops of a graph: it is a data dependence in, a fresh int32
tensor out.

Each op has a twin with the suffix ``_syncing``, of the same meaning, for a path that reads counts
on the host: the twin alone carries the tag that keeps Inductor from capturing it in a CUDA graph.
The graph shows which was planned; `paths.choose_path` says why.

Outputs are fresh, and no size depends on data. Legend: T tokens, A experts per token, S = T*A
slots, L local experts, P ranks, H model dim, I expert intermediate dim, N columns of w_in (2I for
a fused gate and up, else I).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils.flop_counter import register_flop_formula

from comet_compile.kernels import exchange_paths, paths, replicated_paths, saved_rows
from comet_compile.kernels.agreement import AGREEMENTS
from comet_compile.kernels.experts import ExpertParams, Matrices, Needs
from comet_compile.kernels.lent_gradients import LOANS
from comet_compile.kernels.validate import Checked, Layer, check_again, check_layer

# Without the tag Inductor would capture the op, since the graph itself holds no host read any more.
_TAGS = {"": (), "_syncing": (torch.Tag.cudagraph_unsafe,)}

_LAYER_TENSORS = (
    "Tensor x, Tensor ids, Tensor? weights, Tensor w_in, Tensor? w_up, Tensor w_out, "
    "Tensor? b_in, Tensor? b_up, Tensor? b_out"
)


_LAYER_SCHEMA = (
    f"({_LAYER_TENSORS}, Tensor? token, *, str activation, str weight_place, "
    "ScalarType product_dtype, ScalarType out_dtype, str form, str group_name, str save) "
    "-> (Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    f"(Tensor grad_y, {_LAYER_TENSORS}, Tensor saved, Tensor? token, *, str activation, "
    "str weight_place, ScalarType product_dtype, str form, str group_name, bool[] needs, "
    "bool free_saved=False) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _moe_layer(
    x: Tensor,  # [T, H]
    ids: Tensor,  # [T, A]
    weights: Tensor | None,  # [T, A]
    w_in: Tensor,  # [L, H, N]
    w_up: Tensor | None,  # [L, H, I]
    w_out: Tensor,  # [L, I, H]
    b_in: Tensor | None,  # [L, N]
    b_up: Tensor | None,  # [L, I]
    b_out: Tensor | None,  # [L, H]
    token: Tensor | None,
    *,
    activation: str,
    weight_place: str,
    product_dtype: torch.dtype,
    out_dtype: torch.dtype,
    form: str,
    group_name: str,
    save: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y [T, H], saved, which is [room, ...] or [0], token)."""
    layer = Layer(x, ids, weights, w_in, w_up, w_out, b_in, b_up, b_out)
    checked = check_again(layer, activation, weight_place, product_dtype, form, group_name, save)
    routed, params, math, number = layer.routed, layer.params, checked.math, checked.number
    if form != "local":
        facts: dict[str, Any] = {"out_dtype": out_dtype}
        if form == "all_to_all":  # where what is kept is each rank's own affair
            facts["row_memory"] = exchange_paths.row_bytes()
        else:
            facts["save"] = save
        offer = paths.why_portable_here(routed, params, math, number)
        group, offers = _agreed_group(
            "comet::moe_layer", form, group_name, layer, checked, facts, offer
        )
        if group.size() > 1:
            path = exchange_paths if form == "all_to_all" else replicated_paths
            y, saved = path.forward(routed, params, math, out_dtype, group, offers, number, save)
            return y, _saved_out(x, saved), _token_out(x, form)
    y, saved = paths.local_forward(
        routed, params, math, out_dtype, save=save != "nothing", number=number
    )
    return y, _saved_out(x, saved), _token_out(x, form)


def _moe_layer_fake(
    x: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    w_in: Tensor,
    w_up: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_up: Tensor | None,
    b_out: Tensor | None,
    token: Tensor | None,
    *,
    activation: str,
    weight_place: str,
    product_dtype: torch.dtype,
    out_dtype: torch.dtype,
    form: str,
    group_name: str,
    save: str,
) -> tuple[Tensor, Tensor, Tensor]:
    layer = Layer(x, ids, weights, w_in, w_up, w_out, b_in, b_up, b_out)
    check_layer(layer, activation, weight_place, product_dtype, form, group_name, save)
    y = x.new_empty(x.shape, dtype=out_dtype)
    if save == "nothing":
        return y, _saved_out(x, None), _token_out(x, form)
    in_columns = w_in.shape[2] + (0 if w_up is None else w_up.shape[2])
    columns = saved_rows.columns_of(in_columns, x.dtype)
    num_slots = ids.shape[0] * ids.shape[1]
    if form == "all_to_all":
        name: Any = group_name
        num_ranks = _resolve_process_group(name).size()
        num_slots = saved_rows.room_between(num_slots, num_ranks, save)
    saved = x.new_empty(num_slots, columns, dtype=saved_rows.DTYPE)
    return y, saved, _token_out(x, form)


def _moe_layer_backward(
    grad_y: Tensor,  # [T, H]
    x: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    w_in: Tensor,
    w_up: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_up: Tensor | None,
    b_out: Tensor | None,
    saved: Tensor,
    token: Tensor | None,
    *,
    activation: str,
    weight_place: str,
    product_dtype: torch.dtype,
    form: str,
    group_name: str,
    needs: Sequence[bool],
    free_saved: bool = False,
) -> tuple[Tensor, ...]:
    """Return (d_x, d_weights, d_w_in, d_w_up, d_w_out, d_b_in, d_b_up, d_b_out, token).

    `needs` has 8 flags in that order; what is not needed, or whose input is None, is empty [0].
    """
    layer = Layer(x, ids, weights, w_in, w_up, w_out, b_in, b_up, b_out)
    checked = check_again(layer, activation, weight_place, product_dtype, form, group_name)
    routed, params, math = layer.routed, layer.params, checked.math
    wanted = _read_needs(needs)
    group: dist.ProcessGroup | None = None
    offers: list[Any] = []
    if form != "local":
        facts = {"grad_dtype": grad_y.dtype, "needs": wanted}
        if form == "all_to_all":
            facts["row_memory"] = exchange_paths.row_bytes()
        offer = paths.why_portable_here(routed, params, math, checked.number)
        group, offers = _agreed_group(
            "comet::moe_layer_backward", form, group_name, layer, checked, facts, offer
        )
    into = _lent_gradients(params, wanted)
    rows = saved_rows.unpack(saved, x.dtype)
    frees = free_saved and rows is not None and saved_rows.may_be_freed(rows)
    if form == "all_to_all" and group is not None and group.size() > 1:
        grads = exchange_paths.backward(
            grad_y, routed, rows, params, math, wanted, group, offers, checked.number, into,
            frees=frees,
        )  # fmt: skip
    else:
        grads = paths.local_backward(
            grad_y, routed, rows, params, math, wanted, checked.number, into, frees=frees
        )
    return *(x.new_empty(0) if grad is None else grad for grad in grads), _token_out(x, form)


def _lent_gradients(params: ExpertParams, needs: Needs) -> Matrices | None:
    """Return the gradients that the matrices have already, if they were lent to be added to."""
    if LOANS.are_none:
        return None
    wanted = {
        name: weight
        for name in ("w_in", "w_up", "w_out")
        if getattr(needs, name) and (weight := getattr(params, name)) is not None
    }
    found = LOANS.take(list(wanted.values()))
    if found is None:
        return None
    lent = dict(zip(wanted, found, strict=True))
    return Matrices(lent.get("w_in"), lent.get("w_up"), lent.get("w_out"), has_values=True)


def _moe_layer_backward_fake(
    grad_y: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    w_in: Tensor,
    w_up: Tensor | None,
    w_out: Tensor,
    b_in: Tensor | None,
    b_up: Tensor | None,
    b_out: Tensor | None,
    saved: Tensor,
    token: Tensor | None,
    *,
    activation: str,
    weight_place: str,
    product_dtype: torch.dtype,
    form: str,
    group_name: str,
    needs: Sequence[bool],
    free_saved: bool = False,
) -> tuple[Tensor, ...]:
    layer = Layer(x, ids, weights, w_in, w_up, w_out, b_in, b_up, b_out)
    check_layer(layer, activation, weight_place, product_dtype, form, group_name)
    wanted = dataclasses.astuple(_read_needs(needs))

    def like(need: bool, tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None or not need else torch.empty_like(tensor)

    d_x = x.new_empty(x.shape) if wanted[0] else x.new_empty(0)
    d_weights = x.new_empty(0)
    if wanted[1] and weights is not None:
        d_weights = weights.new_empty(weights.shape)
    params = (w_in, w_up, w_out, b_in, b_up, b_out)
    d_params = [like(need, tensor) for need, tensor in zip(wanted[2:], params, strict=True)]
    return d_x, d_weights, *d_params, _token_out(x, form)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    _, saved, token = output
    ctx.mark_non_differentiable(saved, token)
    ctx.save_for_backward(*inputs[:9], saved, token)
    ctx.options = {
        name: keyword_only_inputs[name]
        for name in ("activation", "weight_place", "product_dtype", "form", "group_name")
    }


def _autograd_backward(
    ctx: Any, grad_y: Tensor, grad_saved: Tensor | None, grad_token: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    # x, weights and the parameters; ids (1) and token (9) have no gradient
    flags = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5, 6, 7, 8)]
    *grads, _ = torch.ops.comet.moe_layer_backward(grad_y, *tensors, needs=flags, **ctx.options)
    d_x, *rest = (g if flag else None for g, flag in zip(grads, flags, strict=True))
    return d_x, None, *rest, None


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "comet::moe_layer has no second derivative, and its backward was differentiated "
        "(create_graph=True?); compile this model with options={'comet.backward': False}, which "
        "leaves training graphs as they are"
    )


def _moe_layer_flops(
    x: Any, ids: Any, weights: Any, w_in: Any, w_up: Any, w_out: Any, *args: Any, **kwargs: Any
) -> int:
    """Two per multiply-add of the GEMMs, all S slots counted as routed here."""
    num_slots, hidden = ids[0] * ids[1], x[1]
    return 2 * num_slots * hidden * (_in_columns(w_in, w_up) + w_out[1])


def _moe_layer_backward_flops(
    grad_y: Any,
    x: Any,
    ids: Any,
    weights: Any,
    w_in: Any,
    w_up: Any,
    w_out: Any,
    b_in: Any,
    b_up: Any,
    b_out: Any,
    saved: Any,
    *args: Any,
    needs: Sequence[bool],
    **kwargs: Any,
) -> int:
    num_slots, hidden, inter = ids[0] * ids[1], x[1], w_out[1]
    wanted = _read_needs(needs)
    columns = inter  # the gradient of the activated rows
    columns += 0 if len(saved) == 2 else _in_columns(w_in, w_up)
    columns += _in_columns(w_in, w_up) if wanted.x else 0
    columns += w_in[2] if wanted.w_in else 0
    columns += w_up[2] if wanted.w_up and w_up is not None else 0
    columns += inter if wanted.w_out else 0
    return 2 * num_slots * hidden * columns


def _in_columns(w_in: Any, w_up: Any) -> int:
    return w_in[2] + (0 if w_up is None else w_up[2])


def _read_needs(needs: Sequence[bool]) -> Needs:
    if len(needs) != 8:
        raise ValueError(f"needs has {len(needs)} flags; allowed: 8, one for each gradient output")
    return Needs(*needs)


def _saved_out(x: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None or rows.dim() != 2:
        return x.new_empty(0, dtype=saved_rows.DTYPE)
    return saved_rows.pack(rows)


def _token_out(x: Tensor, form: str) -> Tensor:
    # nobody reads it, so it is not worth a kernel that fills it
    return x.new_empty(0 if form == "local" else 1, dtype=torch.int32)


def _agreed_group(
    op: str,
    form: str,
    group_name: str,
    layer: Layer,
    checked: Checked,
    facts: dict[str, Any],
    offer: str | None = None,
) -> tuple[dist.ProcessGroup, list[Any]]:
    """Return the process group, once its ranks are known to run the same plan, and their offers."""
    name: Any = group_name  # newer torch has a NewType for it
    group = _resolve_process_group(name)
    call = (op, checked.number, *facts.values())
    offers = AGREEMENTS.recall(call, group)
    if offers is None:
        math = checked.math
        plan = {
            "op": op,
            "form": form,
            "activation": str(math.activation),
            "weight_place": math.weight_place,
            "product_dtype": str(math.product_dtype),
            **{name: _describe(name, getattr(layer, name)) for name in layer.names()},
            **{name: str(fact) for name, fact in facts.items()},
        }
        offers = AGREEMENTS.gather(plan, offer, group)
        AGREEMENTS.remember(call, group, offers)
    return group, offers


def _describe(name: str, tensor: Tensor | None) -> str | None:
    """``float32[T, 64]``: what every rank shares of a tensor, so not its number of tokens."""
    if tensor is None:
        return None
    sizes = [str(size) for size in tensor.shape]
    if name in ("x", "ids", "weights"):
        sizes[0] = "T"
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"


# Defined by hand and not with `custom_op`, whose checks at every call (aliases, dynamo) take as
# long as two launches.
_LIBRARY = torch.library.Library("comet", "FRAGMENT")


def _define(suffix: str) -> None:
    layer, backward = f"moe_layer{suffix}", f"moe_layer_backward{suffix}"
    for name, schema, run, fake in (
        (layer, _LAYER_SCHEMA, _moe_layer, _moe_layer_fake),
        (backward, _BACKWARD_SCHEMA, _moe_layer_backward, _moe_layer_backward_fake),
    ):
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *_TAGS[suffix]))
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"comet::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"comet::{layer}", _autograd_backward, setup_context=_setup_context, lib=_LIBRARY
    )
    torch.library.register_autograd(f"comet::{backward}", _refuse_double_backward, lib=_LIBRARY)
    register_flop_formula(getattr(torch.ops.comet, layer))(_moe_layer_flops)
    register_flop_formula(getattr(torch.ops.comet, backward))(_moe_layer_backward_flops)


for _suffix in _TAGS:
    _define(_suffix)
