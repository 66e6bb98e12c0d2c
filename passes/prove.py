"""Prove what a candidate region computes, or say why not.

Contract: reads the graph and the process-group registry, changes nothing, communicates nothing.
The verdict depends on the graph, the group's size and the options only, so every rank of a job
reaches the same one.

Steps
1. Legality: the region's process group, and layouts, dtypes and sizes that the op can take; of
   scores of all experts, that they are zero but for the chosen ones (`scores.py`).
2. Identify the activation: interpret the region on one routing and compare with every known
   function between the projections.
3. Prove: interpret the region on all chosen routings and sizes, for all ranks, and compare every
   row of every rank with the op's own definition. Where the region drops slots, the op is given the
   ids that the region's own bools leave (`Instance.ids_kept`).
4. Unusual ids: the op drops ids out of range and takes an id twice in a row as two slots; the
   region must too, unless the graph shows that such ids cannot occur or the region reads unwritten
   memory for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, fx

from comet_compile.kernels.activation import Activation
from comet_compile.passes.graph_view import dependents, is_float, is_tensor, val
from comet_compile.passes.identify import identify
from comet_compile.passes.instance import Form, Instance, Roles, close, outputs, samples
from comet_compile.passes.legality import check_layout, check_size, form_of
from comet_compile.passes.ranges import are_distinct, interval
from comet_compile.passes.reasons import Rejection, RejectReason
from comet_compile.passes.region import Candidate
from comet_compile.passes.samples import REPEATED, SENTINEL_HIGH, SENTINEL_LOW, Sample
from comet_compile.passes.scores import check as check_scores


@dataclasses.dataclass(frozen=True)
class Layer:
    """A proven region: the candidate and the arguments of `comet::moe_layer` that replace it."""

    candidate: Candidate
    roles: Roles
    form: Form
    activation: Activation
    weight_place: str
    product_dtype: torch.dtype
    scale: float

    @property
    def out_dtype(self) -> torch.dtype:
        return val(self.candidate.y).dtype

    def transferred(self, candidate: Candidate) -> Layer:
        """The same proof for a region that is the same expression of its inputs."""
        if candidate is self.candidate:
            return self
        twin = dict(zip(self.candidate.biases, candidate.biases, strict=True))
        tables = (self.roles.b_in, self.roles.b_up, self.roles.b_out)
        roles = Roles(*(None if table is None else twin[table] for table in tables))
        return dataclasses.replace(self, candidate=candidate, roles=roles)

    def instances(self) -> Iterator[Instance]:
        """The instances on which the backward is held against the oracle."""
        for sample in samples(self.candidate, self.form):
            masked = sample.name == SENTINEL_HIGH and self.form.name == "replicated"
            if masked or not sample.may_be_impossible:
                yield Instance(self.candidate, self.roles, self.form, sample, self.scale)


def prove(
    candidate: Candidate, max_rows: int, group_size: Callable[[str], int | None]
) -> Layer | Rejection:
    """The layer that `candidate` computes, or the reason why it is not shown to be one.

    `group_size` gives the number of ranks of a group by name, None if there is no such group.
    """
    form = form_of(candidate, group_size)
    if isinstance(form, Rejection):
        return form
    refused = check_layout(candidate) or check_size(candidate, form, max_rows)
    if not refused and candidate.scores is not None:
        refused = check_scores(candidate, form)
    if refused:
        return refused
    roles = _bias_roles(candidate)
    place, product_dtype = weighting(candidate)
    identified = identify(candidate, roles, form, place)
    if isinstance(identified, Rejection):
        return identified
    activation, scale = identified
    layer = Layer(candidate, roles, form, activation, place, product_dtype, scale)
    return _verify(layer) or layer


# -- structure that numbers alone cannot tell -------------------------------------------------


def weighting(candidate: Candidate) -> tuple[str, torch.dtype]:
    """Where the routing weight meets the rows, and the dtype of that product.

    Between and after are the same number in exact arithmetic, so the place is read off the graph:
    the first value that depends both on the weights and on the tokens.
    """
    pair = candidate.pair
    if candidate.weights is None:
        return "after", val(pair.out.node).dtype
    rows = dependents([candidate.x, *pair.stacks], candidate.nodes)
    # who is dropped may be decided by weights, too: what follows by way of integers is not weighted
    numbers = [n for n in candidate.nodes if is_float(n) or not is_tensor(n)]
    met = [n for n in _met(candidate, numbers) if n in rows]
    join = met[0] if met else next(n for n in _met(candidate, candidate.nodes) if n in rows)
    after_join = dependents([join], candidate.nodes)
    dtype = val(join).dtype
    if any(node in after_join for gemm in pair.ins for node in gemm.nodes):
        return "before", dtype
    return ("between" if any(n in after_join for n in pair.out.nodes) else "after"), dtype


def _met(candidate: Candidate, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The tensors that depend on the weights by way of `nodes`, in graph order."""
    assert candidate.weights is not None
    weighted = dependents([candidate.weights], nodes)
    return [n for n in candidate.nodes if n in weighted and is_tensor(n)]


def _bias_roles(candidate: Candidate) -> Roles:
    """A table belongs to the projection whose rows it meets first."""
    pair = candidate.pair
    order = {node: i for i, node in enumerate(candidate.nodes)}
    roles: dict[str, fx.Node] = {}
    names = ("b_in", "b_up", "b_out") if len(pair.ins) == 2 else ("b_in", "b_out")
    # a product may add the table itself
    reached = [dependents(gemm.nodes, order) | set(gemm.nodes) for gemm in pair.gemms]
    for table in candidate.biases:
        own = dependents([table], order)
        meets = [min((order[n] for n in own & r), default=1 << 60) for r in reached]
        # what follows the out-projection follows the in-projection too: the last one counts
        last = max(i for i, place in enumerate(meets) if place == min(meets))
        roles[names[last]] = table
    return Roles(**roles)


# -- verification -----------------------------------------------------------------------------


def _verify(layer: Layer) -> Rejection | None:
    candidate = layer.candidate
    for sample in samples(candidate, layer.form):
        if sample.may_be_impossible and candidate.scores is not None:
            continue  # ruled out beforehand: scores hold one number for each of the experts
        instance = Instance(candidate, layer.roles, layer.form, sample, layer.scale)
        outcome = outputs(candidate.y, instance)
        expected = instance.expected(layer.activation, layer.weight_place)
        if sample.may_be_impossible:
            refused = _check_unusual(layer, sample, outcome, expected)
            if refused:
                return refused
            continue
        if isinstance(outcome, Rejection):
            return outcome
        wrong = _first_difference(outcome, expected)
        if wrong:
            detail = f"{candidate.y.name} differs at {wrong} on routing {sample.name!r}"
            return Rejection(RejectReason.NOT_EQUIVALENT, detail)
    return None


def _first_difference(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> str:
    """The first rank and token that differ, or an empty string."""
    for rank, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if close(a, e):
            continue
        if a.shape != e.shape:
            return f"rank {rank}, shape {tuple(a.shape)}"
        token = int((a - e).nan_to_num(nan=torch.inf).abs().amax(1).argmax())
        return f"rank {rank}, token {token}"
    return ""


def _check_unusual(
    layer: Layer, sample: Sample, outcome: list[Tensor] | Rejection, expected: list[Tensor]
) -> Rejection | None:
    """Repeated ids and ids out of range: treated as the op does, or impossible, or meaningless
    in the region."""
    if not isinstance(outcome, Rejection) and not _first_difference(outcome, expected):
        return None
    if sample.name == REPEATED:
        if are_distinct(layer.candidate.ids):
            return None
        detail = f"{layer.candidate.ids.name} may hold one expert twice for a token"
        return Rejection(RejectReason.REPEATED_IDS, detail)
    low, high = (bound - layer.candidate.first for bound in interval(layer.candidate.ids))
    experts = layer.candidate.pair.out.num_experts
    count = experts * layer.form.world.size if layer.form.shards_tokens else experts
    if (low >= 0) if sample.name == SENTINEL_LOW else (high < count):
        return None
    if isinstance(outcome, Rejection) and layer.form.name != "replicated":
        # the original indexes out of bounds there, so no program relies on its result
        return None
    if not isinstance(outcome, Rejection) and _reads_unwritten(outcome, expected):
        return None
    detail = f"{layer.candidate.ids.name} may hold ids outside [0, {count})"
    return Rejection(RejectReason.OUT_OF_RANGE_IDS, detail)


def _reads_unwritten(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether rows differ only where the region gives unwritten memory."""
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return False
        undefined = a.isnan().any(1)
        if not close(a[~undefined], e[~undefined]):
            return False
    return True
