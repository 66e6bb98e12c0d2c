"""Prove what a candidate region computes, or say why not.

Contract: reads the graph and the process-group registry, changes nothing, communicates nothing.
The verdict depends on the graph, the group's size and the options only, so every rank of a job
reaches the same one.

Steps
1. Form: which collectives the region holds, on which group, of which size.
2. Layout: shapes and dtypes that the op can take.
3. Identify the activation: interpret the region on one routing and compare with every known
   function between the projections.
4. Prove: interpret the region on all chosen routings and sizes, for all ranks, and compare every
   row of every rank with the op's own definition.
5. Unusual ids: the op drops ids out of range and takes an id twice in a row as two slots; the
   region must too, unless the graph shows that such ids cannot occur or the region reads unwritten
   memory for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, fx

from comet_compile.kernels.activation import GATED_KINDS, PLAIN_KINDS, Activation
from comet_compile.passes.find import Candidate, ExpertGemm, collectives
from comet_compile.passes.graph_view import (
    concrete,
    dependents,
    numel,
    val,
)
from comet_compile.passes.instance import Form, Instance, Roles, close
from comet_compile.passes.probe import Probe, Support, Untracked, make, restrict
from comet_compile.passes.ranges import are_distinct, interval
from comet_compile.passes.reasons import Rejection, RejectReason
from comet_compile.passes.samples import (
    REPEATED,
    SENTINEL_HIGH,
    SENTINEL_LOW,
    Sample,
    routings,
    size_choices,
)
from comet_compile.passes.simulate import Failed, Ranked, World, values_of

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
    form = _form(candidate, group_size)
    if isinstance(form, Rejection):
        return form
    refused = _check_layout(candidate) or _check_size(candidate, form, max_rows)
    if refused:
        return refused
    roles = _bias_roles(candidate)
    place, product_dtype = weighting(candidate)
    for activation_scale in _identify(candidate, roles, form, place):
        if isinstance(activation_scale, Rejection):
            return activation_scale
        activation, scale = activation_scale
        layer = Layer(candidate, roles, form, activation, place, product_dtype, scale)
        return _verify(layer) or layer
    raise AssertionError("identification ends with a verdict")


# -- form, layout, size -----------------------------------------------------------------------


def _form(candidate: Candidate, group_size: Callable[[str], int | None]) -> Form | Rejection:
    nodes = collectives(candidate)
    if not nodes:
        return Form("local", World("", 1))
    groups = {n.args[-1] if isinstance(n.args[-1], str) else _group_name(n) for n in nodes}
    if len(groups) > 1:
        names = ", ".join(f"{n.name} on {n.args[-1]!r}" for n in nodes)
        return Rejection(RejectReason.MIXED_GROUPS, names)
    (group,) = groups
    size = group_size(group)
    if size is None:
        detail = f"{nodes[0].name} names group {group!r}, which is not initialised here"
        return Rejection(RejectReason.UNKNOWN_GROUP, detail)
    kinds = {n.target.overloadpacket for n in nodes}
    travels = kinds & {c10d.all_to_all_single}
    return Form("all_to_all" if travels else "replicated", World(group, size))


def _group_name(node: fx.Node) -> str:
    """The name of a group that stands in the graph as an object (compile_on_one_rank)."""
    return str(getattr(node.args[-1], "group_name", node.args[-1]))


def _check_layout(candidate: Candidate) -> Rejection | None:
    pair = candidate.pair
    dtype = val(pair.out.stack).dtype
    for stack in pair.stacks:
        if val(stack).dtype not in _DTYPES:
            detail = f"{stack.name} is {val(stack).dtype}"
            return Rejection(RejectReason.UNSUPPORTED_DTYPE, detail)
    if any(val(n).dtype != dtype for n in (*pair.stacks, candidate.x)):
        detail = f"{candidate.x.name} and the expert stacks differ in dtype"
        return Rejection(RejectReason.UNSUPPORTED_DTYPE, detail)
    shapes = [val(s).shape for s in pair.stacks]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return Rejection(RejectReason.UNSUPPORTED_LAYOUT, "expert stacks of symbolic size")
    columns = [gemm.out_features for gemm in pair.ins]
    inner, hidden = pair.out.in_features, pair.ins[0].in_features
    fits = columns in ([inner], [2 * inner], [inner, inner])
    same_experts = len({gemm.num_experts for gemm in (*pair.ins, pair.out)}) == 1
    same_hidden = all(gemm.in_features == hidden for gemm in pair.ins)
    if not (fits and same_experts and same_hidden and pair.out.out_features == hidden):
        text = " -> ".join(str(list(shape)) for shape in shapes)
        return Rejection(RejectReason.UNSUPPORTED_LAYOUT, f"expert stacks {text}")
    return None


def _check_size(candidate: Candidate, form: Form, max_rows: int) -> Rejection | None:
    try:
        choices = size_choices(candidate.nodes)
        rows = max(
            concrete(numel(val(candidate.x).shape[:-1]), s) * candidate.top_k for s in choices
        )
    except ValueError as error:
        return Rejection(RejectReason.DYNAMIC_SPLITS, f"{candidate.x.name}: {error}")
    # tokens differ by rank, so between ranks their number must not decide
    if rows > max_rows and form.name == "local":
        detail = f"{rows} rows, allowed {max_rows}"
        return Rejection(RejectReason.TOO_LARGE, detail)
    return None


def samples(candidate: Candidate, form: Form) -> Iterator[Sample]:
    """Every routing at the traced sizes, then two routings at other sizes."""
    experts = candidate.pair.out.num_experts
    num_ids = experts * form.world.size if form.shards_tokens else experts
    for index, sizes in enumerate(size_choices(candidate.nodes)):
        tokens = concrete(numel(val(candidate.x).shape[:-1]), sizes)
        listed = routings(tokens, candidate.top_k, num_ids, form.world.size, experts)
        for number, (name, ids) in enumerate(listed):
            if index == 0 or number < 2:
                yield Sample(name, sizes, ids, seed=100 * index + number + 1)


# -- structure that numbers alone cannot tell -------------------------------------------------


def weighting(candidate: Candidate) -> tuple[str, torch.dtype]:
    """Where the routing weight meets the rows, and the dtype of that product.

    Between and after are the same number in exact arithmetic, so the place is read off the graph:
    the first value that depends both on the weights and on the tokens.
    """
    pair = candidate.pair
    if candidate.weights is None:
        return "after", val(pair.out.node).dtype
    weighted = dependents([candidate.weights], candidate.nodes)
    rows = dependents([candidate.x, *pair.stacks], candidate.nodes)
    join = next(n for n in candidate.nodes if n in weighted and n in rows)
    after_join = dependents([join], candidate.nodes)
    dtype = val(join).dtype
    if any(gemm.node in after_join for gemm in pair.ins):
        return "before", dtype
    return ("between" if pair.out.node in after_join else "after"), dtype


def _bias_roles(candidate: Candidate) -> Roles:
    """A table belongs to the projection whose rows it meets first."""
    pair = candidate.pair
    order = {node: i for i, node in enumerate(candidate.nodes)}
    roles: dict[str, fx.Node] = {}
    names = ("b_in", "b_up", "b_out") if len(pair.ins) == 2 else ("b_in", "b_out")
    reached = [dependents([gemm.node], order) for gemm in (*pair.ins, pair.out)]
    for table in candidate.biases:
        own = dependents([table], order)
        meets = [min((order[n] for n in own & r), default=1 << 60) for r in reached]
        # what follows the out-projection follows the in-projection too: the last one counts
        last = max(i for i, place in enumerate(meets) if place == min(meets))
        roles[names[last]] = table
    return Roles(**roles)


# -- identification ---------------------------------------------------------------------------


def _constants(candidate: Candidate) -> tuple[list[float], list[float]]:
    """Numbers that clamp, and numbers that scale, between the projections."""
    clamps: set[float] = set()
    scales: set[float] = set()
    pair = candidate.pair
    between = dependents([gemm.node for gemm in pair.ins], candidate.nodes)
    between -= dependents([pair.out.node], candidate.nodes)
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


def _identify(
    candidate: Candidate, roles: Roles, form: Form, place: str
) -> Iterator[tuple[Activation, float] | Rejection]:
    """The activation and the scale of the numbers it was told apart on, or a refusal."""
    clamps, _ = _constants(candidate)
    # pre-activations must fall on both sides of every clamp
    scale = max([1.0, *(0.7 * c for c in clamps if c < 100)])
    sample = next(iter(samples(candidate, form)))
    instance = Instance(candidate, roles, form, sample, scale)
    outcome = outputs(candidate.y, instance)
    if isinstance(outcome, Rejection):
        yield outcome
        return
    few = min(8, sample.num_tokens)
    for activation in _hypotheses(candidate):
        expected = instance.expected(activation, place, tokens=few)
        if all(close(a[:few], e) for a, e in zip(outcome, expected, strict=True)):
            yield activation, scale
            return
    yield _unidentified(candidate, instance, place, few)


def _unidentified(candidate: Candidate, instance: Instance, place: str, few: int) -> Rejection:
    """Tell an unknown activation from wrong routing: interpret with the activation taken out."""
    pair = candidate.pair
    plain = RejectReason.NOT_EQUIVALENT
    detail = f"{candidate.y.name} is not the weighted sum of its tokens' experts"
    world, symbols = instance.form.world, instance.sample.symbols
    bound = instance.bindings()
    try:
        values = values_of(pair.ins[0].node, candidate.nodes, bound, world, symbols)
        if isinstance(values, Failed):
            return Rejection(values.reason, values.detail)
        linear = [_first_columns(v, instance, pair.out) for v in values]
    except Untracked:
        return Rejection(plain, detail)
    outcome = outputs(candidate.y, instance, {pair.out.rows: linear})
    if isinstance(outcome, Rejection) or place == "between":
        return Rejection(plain, detail)
    linear_instance = dataclasses.replace(instance)
    leaves = linear_instance.leaves()
    expected = _linear_expectation(linear_instance, leaves, place, few)
    if all(close(a[:few], e) for a, e in zip(outcome, expected, strict=True)):
        detail = f"the function between {pair.ins[0].node.name} and {pair.out.node.name}"
        return Rejection(RejectReason.UNKNOWN_ACTIVATION, detail)
    return Rejection(plain, detail)


def _first_columns(value: object, instance: Instance, out: ExpertGemm) -> object:
    """The in-projection's tracked intermediate columns, as rows for the out-projection."""
    assert isinstance(value, Probe)
    dim = next(d for d, s in enumerate(value.supports) if s)
    support = value.supports[dim]
    assert support is not None
    data = restrict(value, dim, instance.i_cols, support.size)
    inner = Support(out.in_features, instance.i_cols, zero=False)
    shape = list(data.shape)
    if val(out.rows).ndim == 3 and val(out.rows).shape[1] == 1 and dim == 1:
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


# -- verification -----------------------------------------------------------------------------


def outputs(
    node: fx.Node, instance: Instance, overrides: Mapping[fx.Node, Ranked] | None = None
) -> list[Tensor] | Rejection:
    """[T, h] rows of a [.., H] node of the region on every rank of `instance`."""
    bound = {**instance.bindings(), **(overrides or {})}
    nodes, form = instance.candidate.nodes, instance.form
    values = values_of(node, nodes, bound, form.world, instance.sample.symbols)
    if isinstance(values, Failed):
        return Rejection(values.reason, values.detail)
    width = len(instance.h_cols)
    rows = []
    for value in values:
        size = value.shape[-1]
        if not isinstance(value, Probe) or any(value.supports[:-1]) or not value.supports[-1]:
            return Rejection(RejectReason.UNSUPPORTED_OP, f"{node.name} lost its columns")
        if not set(instance.h_cols) <= set(value.supports[-1].cols):
            return Rejection(RejectReason.UNSUPPORTED_OP, f"{node.name} lost its columns")
        data = restrict(value, value.ndim - 1, instance.h_cols, size)
        rows.append(data.reshape(-1, width))
    return rows


def _verify(layer: Layer) -> Rejection | None:
    candidate = layer.candidate
    for sample in samples(candidate, layer.form):
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
    low, high = interval(layer.candidate.ids)
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
