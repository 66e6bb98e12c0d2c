"""Tell which activation lies between the projections of a region.

The region is interpreted on one routing and compared with every known activation that its shapes
and constants admit; `prove.py` then holds it against the one that fits on all routings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from comet_compile.kernels.activation import GATED_KINDS, PLAIN_KINDS, Activation
from comet_compile.passes.graph_view import dependents, val
from comet_compile.passes.instance import Form, Instance, Roles, close, outputs, samples
from comet_compile.passes.probe import Probe, Support, Untracked, make, restrict
from comet_compile.passes.reasons import Rejection, RejectReason
from comet_compile.passes.region import Candidate
from comet_compile.passes.simulate import Failed, Ranked, values_of

aten = torch.ops.aten


def _constants(candidate: Candidate) -> tuple[list[float], list[float]]:
    """Numbers that clamp, and numbers that scale, between the projections."""
    clamps: set[float] = set()
    scales: set[float] = set()
    pair = candidate.pair
    between = dependents([n for gemm in pair.ins for n in gemm.nodes], candidate.nodes)
    between -= dependents(pair.out.nodes, candidate.nodes)
    for node in between:
        packet = getattr(node.target, "overloadpacket", None)
        numbers = [a for a in node.args if isinstance(a, (int, float)) and a]
        numbers += [
            n.args[-1]
            for n in node.all_input_nodes
            if n.target in (aten.full.default, aten.scalar_tensor.default)
            and isinstance(n.args[-1], (int, float))
        ]
        if packet in (aten.clamp, aten.clamp_min, aten.clamp_max, aten.minimum, aten.maximum):
            clamps |= {abs(float(n)) for n in numbers}
        elif packet in (aten.mul, aten.div):
            scales |= {abs(float(n)) for n in numbers}
    return sorted(clamps - {0.0}), sorted(scales)


def _hypotheses(candidate: Candidate) -> Iterator[Activation]:
    """Known activations that the shapes and numbers in the graph admit, likely ones first."""
    pair = candidate.pair
    clamps, scales = _constants(candidate)
    if len(pair.ins) == 1 and pair.ins[0].out_features == pair.out.in_features:
        yield from (Activation(kind) for kind in PLAIN_KINDS)
        return
    layouts = [(False, False), (False, True)]
    if len(pair.ins) == 1:
        layouts += [(True, False), (True, True)]
    for kind in GATED_KINDS:
        alphas: list[float | None] = [*scales, 1.0] if kind == "swiglu_oai" else [None]
        for limit in (None, *clamps):
            for interleaved, up_first in layouts:
                for alpha in alphas:
                    yield Activation(kind, interleaved, up_first, alpha, limit)


def identify(
    candidate: Candidate, roles: Roles, form: Form, place: str
) -> tuple[Activation, float] | Rejection:
    """The activation and the scale of the numbers it was told apart on, or a refusal."""
    clamps, _ = _constants(candidate)
    # pre-activations must fall on both sides of every clamp
    scale = max([1.0, *(0.7 * c for c in clamps if c < 100)])
    sample = next(iter(samples(candidate, form)))
    instance = Instance(candidate, roles, form, sample, scale)
    outcome = outputs(candidate.y, instance)
    if isinstance(outcome, Rejection):
        return outcome
    few, leaves = min(8, sample.num_tokens), instance.leaves()
    for activation in _hypotheses(candidate):
        # nearly all of them are told apart by the first token
        first = instance.expected(activation, place, leaves, tokens=1)
        if any(_is_apart(a[:few], e) for a, e in zip(outcome, first, strict=True)):
            continue
        expected = instance.expected(activation, place, leaves, tokens=few)
        if all(close(a[:few], e) for a, e in zip(outcome, expected, strict=True)):
            return activation, scale
    return _unidentified(candidate, instance, place, few)


def _is_apart(actual: Tensor, first: Tensor) -> bool:
    """Whether the first rows alone say that `actual` is not `close` to what they begin."""
    begin = actual[: len(first)]
    if begin.shape != first.shape or not first.numel():
        return False
    scale = max(float(actual.abs().max()), 1e-3)  # of what is expected, too, if it is close
    return bool((begin - first).abs().max() > 2e-9 * scale)


def _unidentified(candidate: Candidate, instance: Instance, place: str, few: int) -> Rejection:
    """Tell an unknown activation from wrong routing: interpret with the activation taken out."""
    pair = candidate.pair
    plain = RejectReason.NOT_EQUIVALENT
    detail = f"{candidate.y.name} is not the weighted sum of its tokens' experts"
    world, symbols = instance.form.world, instance.sample.symbols
    bound = instance.bindings()
    try:
        linear: dict[fx.Node, Ranked] = {}
        for product, rows in zip(pair.ins[0].nodes, pair.out.rows, strict=True):
            values = values_of(product, candidate.nodes, bound, world, symbols)
            if isinstance(values, Failed):
                return Rejection(values.reason, values.detail)
            linear[rows] = [_first_columns(v, instance, rows) for v in values]
    except Untracked:
        return Rejection(plain, detail)
    outcome = outputs(candidate.y, instance, linear)
    if isinstance(outcome, Rejection) or place == "between":
        return Rejection(plain, detail)
    linear_instance = dataclasses.replace(instance)
    leaves = linear_instance.leaves()
    expected = _linear_expectation(linear_instance, leaves, place, few)
    if all(close(a[:few], e) for a, e in zip(outcome, expected, strict=True)):
        detail = f"the function between {pair.ins[0].node.name} and {pair.out.node.name}"
        return Rejection(RejectReason.UNKNOWN_ACTIVATION, detail)
    return Rejection(plain, detail)


def _first_columns(value: object, instance: Instance, rows: fx.Node) -> object:
    """The in-projection's tracked intermediate columns, as `rows` for the out-projection."""
    assert isinstance(value, Probe)
    dim = next(d for d, s in enumerate(value.supports) if s)
    support = value.supports[dim]
    assert support is not None
    data = restrict(value, dim, instance.i_cols, support.size)
    inner = Support(instance.candidate.pair.out.in_features, instance.i_cols, zero=False)
    shape = list(data.shape)
    if val(rows).ndim == 3 and val(rows).shape[1] == 1 and dim == 1:
        # the other operand order of a batched GEMM: rows lie along the last dimension
        return make(data.transpose(1, 2), (None, None, inner))
    return make(data.reshape(shape), tuple(inner if d == dim else None for d in range(data.ndim)))


def _linear_expectation(
    instance: Instance, leaves: dict[str, list[Tensor] | None], place: str, few: int
) -> list[Tensor]:
    """The oracle with no activation: the first half of the in-projection goes straight on."""
    keep = torch.tensor([instance.n_cols.index(c) for c in instance.i_cols])
    for name in ("w_in", "b_in"):
        values = leaves[name]
        if values is not None:
            leaves[name] = [v[..., keep] for v in values]
    leaves["w_up"] = leaves["b_up"] = None
    # the table of the in-projection is added before the point that was overridden is read
    leaves["b_in"] = None
    instance.fused = False
    return instance.expected(Activation("identity"), place, leaves, tokens=few)
