"""Scores of all experts [T, E] that are zero but for each token's chosen experts.

A *dense* layer runs every expert on every token and multiplies with such a matrix: before the
experts (Llama 4) or after them. What it computes is the sparse layer of the weights at the ids,
provided that

- every entry outside of the ids is exactly zero, whatever the router says (`check` here): a score
  of -inf behind a sigmoid or softmax, a mask, a scatter into zeros;
- the experts give exactly zero for it. With the weight behind them that is so whatever they
  compute; with the weight in front f(0) must be 0, so no bias and a fitting activation. That
  follows from the proof of the layer, where all experts run on all tokens, too (`prove.py`);
- in training, the gradient of such an entry is exactly zero as well, since the sparse layer gives
  none (`backward.py` matches all of the [T, E] gradient).

As everywhere in the proofs, numbers are finite. Where a token, a matrix or an expert's row holds
infinity or NaN, the dense layer makes NaN of zero times it for tokens that did not choose the
expert, and the sparse one does not. The same holds of the batched experts of transformers on a rank
of several: a zero weight multiplies the rows of other ranks' experts, which `comet::moe_layer`
drops.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from comet_compile.passes.graph_view import (
    ancestors,
    concrete,
    is_float,
    is_known_size,
    is_tensor,
    val,
)
from comet_compile.passes.instance import Form, samples
from comet_compile.passes.ranges import are_distinct, interval
from comet_compile.passes.reasons import Rejection, RejectReason
from comet_compile.passes.region import Candidate, Scores
from comet_compile.passes.samples import Sample
from comet_compile.passes.simulate import Failed, Ranked, values_of

# of the numbers that the scores follow from: those of a router, and larger than any finite stand-in
# for minus infinity that they are compared with
_MAGNITUDES = (1.0, 1e30)


def scores_from(
    node: fx.Node, ids: fx.Node, follows: set[fx.Node], order: Mapping[fx.Node, int]
) -> Scores | None:
    """How `node` follows from `ids`; None if from other integers, too.

    `follows` are the nodes that depend on the ids. Float tensors that do not may be anything.
    """
    nodes: set[fx.Node] = set()
    free: list[fx.Node] = []
    stack = [node]
    while stack:
        current = stack.pop()
        if current in nodes:
            continue
        nodes.add(current)
        if current is ids or is_known_size(current):
            continue
        if current in follows:
            stack.extend(current.all_input_nodes)
        elif (sources := _constant(current)) is not None:
            nodes |= sources
        elif is_float(current):
            free.append(current)
        else:
            return None
    return Scores(
        node,
        tuple(sorted(nodes, key=order.__getitem__)),
        tuple(sorted(free, key=order.__getitem__)),
    )


def _constant(node: fx.Node) -> set[fx.Node] | None:
    """All that `node` is made of, if that is nothing but numbers and sizes."""
    if not is_tensor(node) or node.op != "call_function":
        return None
    if len(node.all_input_nodes) > 4:
        return None
    made_of = ancestors([node], stop=is_known_size)
    known = all(n.op == "call_function" or is_known_size(n) for n in made_of)
    return made_of if known else None


def check(candidate: Candidate, form: Form) -> Rejection | None:
    """Why the scores are not shown to be zero outside of the ids, or the ids to be fit to look
    scores up by."""
    scores, ids = candidate.scores, candidate.ids
    assert scores is not None
    if form.name != "local":
        detail = f"{candidate.y.name} is exchanged between ranks that run all experts"
        return Rejection(RejectReason.UNSUPPORTED_OP, detail)
    if not are_distinct(ids):
        detail = f"{ids.name} may hold one expert twice for a token"
        return Rejection(RejectReason.REPEATED_IDS, detail)
    low, high = interval(ids)
    experts = candidate.pair.out.num_experts
    if low < 0 or high >= experts:
        detail = f"{ids.name} may hold ids outside [0, {experts})"
        return Rejection(RejectReason.OUT_OF_RANGE_IDS, detail)
    for sample in samples(candidate, form):
        if sample.may_be_impossible:
            continue
        for magnitude in _MAGNITUDES:
            values = _scores(candidate, form, sample, magnitude)
            if isinstance(values, Failed):
                return Rejection(values.reason, values.detail)
            if not _are_zero_outside(values[0], sample.ids[0]):
                detail = f"{scores.node.name} is not zero for experts outside of {ids.name}"
                return Rejection(RejectReason.NOT_EQUIVALENT, detail)
    return None


def _scores(candidate: Candidate, form: Form, sample: Sample, magnitude: float) -> Ranked | Failed:
    scores = candidate.scores
    assert scores is not None
    generator = torch.Generator().manual_seed(sample.seed)
    (ids,) = sample.ids
    bound: dict[fx.Node, Ranked] = {
        candidate.ids: [ids.reshape(_shape(candidate.ids, sample))],
    }
    for node in scores.free:
        drawn = torch.randn(_shape(node, sample), dtype=torch.float64, generator=generator)
        bound[node] = [drawn * magnitude]
    return values_of(scores.node, scores.nodes, bound, form.world, sample.symbols)


def _shape(node: fx.Node, sample: Sample) -> list[int]:
    return [concrete(size, sample.symbols) for size in val(node).shape]


def _are_zero_outside(scores: object, ids: Tensor) -> bool:
    if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[0] != ids.shape[0]:
        return False
    outside = torch.ones(scores.shape, dtype=torch.bool).scatter(1, ids, False)
    return bool((scores[outside] == 0).all())
