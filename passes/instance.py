"""A sparse instance of one candidate region, what the region computes on it, and what
`comet::moe_layer` would.

The instance gives every input of the region a value on every simulated rank: tokens and matrices
are zero outside a few feature columns (see `probe.py`), routing weights are dense and of both
signs. The oracle is the op's own reference twin, `moe_layer_ref`, in float64 on just those
columns: what is proven is that the graph computes what the op means.

Columns of a fused in-projection are tracked where any known layout could put the gate and the up
of a tracked intermediate column c: c and c + I (halves), 2c and 2c + 1 (interleaved).

Legend: T tokens, A ids per token, L experts per rank, P ranks, H model dim, I intermediate dim,
h, i tracked columns of H, I.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from comet_compile.kernels.activation import Activation
from comet_compile.kernels.refs import moe_layer_ref
from comet_compile.passes.graph_view import concrete, numel, val
from comet_compile.passes.probe import Probe, Support, make, restrict
from comet_compile.passes.reasons import Rejection, RejectReason
from comet_compile.passes.region import Candidate, ExpertGemm
from comet_compile.passes.samples import Sample, routings, size_choices
from comet_compile.passes.simulate import Failed, Ranked, World, values_of


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which table is added to which projection's rows (None: no bias)."""

    b_in: fx.Node | None = None
    b_up: fx.Node | None = None
    b_out: fx.Node | None = None


@dataclasses.dataclass(frozen=True)
class Form:
    """How tokens and experts are spread: over nothing, or over the ranks of `world`."""

    name: str  # "local", "all_to_all" or "replicated"
    world: World

    @property
    def shards_tokens(self) -> bool:
        return self.name == "all_to_all"


def tracked_columns(size: int) -> tuple[int, ...]:
    """A few columns of a dimension: both ends and one inside."""
    return tuple(sorted({0, size // 3, size - 1}))


@dataclasses.dataclass
class Instance:
    """Values of the region's inputs per rank, as bindings for `simulate` and for the oracle."""

    candidate: Candidate
    roles: Roles
    form: Form
    sample: Sample
    scale: float

    def __post_init__(self) -> None:
        pair = self.candidate.pair
        self.h_cols = tracked_columns(pair.ins[0].in_features)
        self.i_cols = tracked_columns(pair.out.in_features)
        self.fused = len(pair.ins) == 1 and pair.ins[0].out_features == 2 * pair.out.in_features
        if self.fused:
            half = pair.out.in_features
            spots = {s for c in self.i_cols for s in (c, c + half, 2 * c, 2 * c + 1)}
            self.n_cols: tuple[int, ...] = tuple(sorted(spots))
        else:
            self.n_cols = self.i_cols
        ranks = range(self.form.world.size)
        tokens, top_k = self.sample.num_tokens, self.candidate.top_k
        experts = pair.out.num_experts
        h, n, i = len(self.h_cols), len(self.n_cols), len(self.i_cols)
        self.x = [self._normal(r, 0, tokens, h) for r in ranks]
        # both signs, away from zero: a sign, a square or a clamp of a weight must show
        self.weights = [
            self._normal(r, 1, tokens, top_k).sign() * (0.5 + self._uniform(r, 2, tokens, top_k))
            for r in ranks
        ]
        self.w_ins = [
            [self._normal(r, 10 + j, experts, h, n) * self.scale for r in ranks]
            for j in range(len(pair.ins))
        ]
        self.w_out = [self._normal(r, 20, experts, i, h) for r in ranks]
        self.b_in = [self._normal(r, 30, experts, n) * self.scale for r in ranks]
        self.b_up = [self._normal(r, 31, experts, n) * self.scale for r in ranks]
        self.b_out = [self._normal(r, 32, experts, h) for r in ranks]
        self.grad_y = [self._normal(r, 40, tokens, h) for r in ranks]

    def _generator(self, rank: int, role: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.sample.seed * 64 + rank) * 64 + role)

    def _normal(self, rank: int, role: int, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self._generator(rank, role))

    def _uniform(self, rank: int, role: int, *shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=self._generator(rank, role))

    # -- bindings -----------------------------------------------------------------------------

    def bindings(self) -> dict[fx.Node, Ranked]:
        """Values for the region's input nodes, one per rank."""
        candidate = self.candidate
        pair = candidate.pair
        hidden = Support(pair.ins[0].in_features, self.h_cols, zero=True)
        inner = Support(pair.out.in_features, self.i_cols, zero=True)
        wide = Support(pair.ins[0].out_features, self.n_cols, zero=True)
        bound: dict[fx.Node, Ranked] = {candidate.x: self.rows(candidate.x, self.x)}
        shape = self._shape(candidate.ids)
        bound[candidate.ids] = [ids.reshape(shape) + candidate.first for ids in self.sample.ids]
        if candidate.scores is not None:
            bound[candidate.scores.node] = [
                self.spread(w, ids) for w, ids in zip(self.weights, self.sample.ids, strict=True)
            ]
        elif candidate.weights is not None:
            shape = self._shape(candidate.weights)
            bound[candidate.weights] = [w.reshape(shape) for w in self.weights]
        for gemm, data in zip(pair.ins, self.w_ins, strict=True):
            bound[gemm.stack] = _stack(gemm, data, hidden, wide)
        bound[pair.out.stack] = _stack(pair.out, self.w_out, inner, hidden)
        tables = (
            (self.roles.b_in, self.b_in, wide),
            (self.roles.b_up, self.b_up, wide),
            (self.roles.b_out, self.b_out, hidden),
        )
        for node, data, columns in tables:
            if node is not None:
                bound[node] = [make(d, (None, columns)) for d in data]
        return bound

    @functools.cached_property
    def ids_kept(self) -> Sequence[Tensor]:
        """The ids [T, A] of every rank, -1 for slots that the region has no room for."""
        kept, ids = self.candidate.kept, self.sample.ids
        if kept is None:
            return ids
        values = values_of(
            kept.node, self.candidate.nodes, self.bindings(), self.form.world, self.sample.symbols
        )
        if isinstance(values, Failed):  # as does what the region computes with them
            return ids
        tables = [_by_slot(v, i, kept.axes) for v, i in zip(values, ids, strict=True)]
        return [i.masked_fill(~table, -1) for i, table in zip(ids, tables, strict=True)]

    def spread(self, weights: Tensor, ids: Tensor) -> Tensor:
        """[T, A] values of the slots as a matrix [T, E] that is zero elsewhere."""
        zeros = weights.new_zeros(len(ids), self.candidate.pair.out.num_experts)
        return zeros.scatter(1, ids, weights)

    def rows(self, node: fx.Node, data: Sequence[Tensor]) -> Ranked:
        """[T, h] rows of every rank as values of `node` ([.., H])."""
        shape = self._row_shape(node)
        support = Support(shape[-1], self.h_cols, zero=True)
        lead = (None,) * (len(shape) - 1)
        return [make(d.reshape(*shape[:-1], len(self.h_cols)), (*lead, support)) for d in data]

    def _row_shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a [.., H] value of T rows; one size may be known at run time only."""
        sizes: list[int] = []
        for size in val(node).shape:
            try:
                sizes.append(concrete(size, self.sample.symbols))
            except ValueError:
                sizes.append(-1)
        known = math.prod(s for s in sizes[:-1] if s != -1)
        if sizes.count(-1) > 1:
            raise ValueError(f"{node.name} has several sizes known at run time only")
        return tuple(self.sample.num_tokens // known if s == -1 else s for s in sizes)

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(concrete(size, self.sample.symbols) for size in val(node).shape)

    # -- oracle -------------------------------------------------------------------------------

    def leaves(self, requires_grad: bool = False) -> dict[str, list[Tensor] | None]:
        """Oracle inputs per rank by the op's argument names, gate and up as two matrices."""
        roles, given = self.roles, self.candidate.weights is not None
        sources: dict[str, list[Tensor] | None] = {
            "x": self.x,
            "weights": self.weights if given else None,
            "w_in": self.w_ins[0],
            "w_up": self.w_ins[1] if len(self.w_ins) > 1 else None,
            "w_out": self.w_out,
            "b_in": self.b_in if roles.b_in is not None else None,
            "b_up": self.b_up if roles.b_up is not None else None,
            "b_out": self.b_out if roles.b_out is not None else None,
        }
        return {
            name: None
            if values is None
            else [v.detach().clone().requires_grad_(requires_grad) for v in values]
            for name, values in sources.items()
        }

    def gate_up_columns(self, activation: Activation) -> tuple[Tensor, Tensor]:
        """Positions in `n_cols` of the gate and of the up of every tracked column."""
        half = self.candidate.pair.out.in_features
        place = {col: p for p, col in enumerate(self.n_cols)}
        pairs = [
            (2 * c, 2 * c + 1) if activation.interleaved else (c, c + half) for c in self.i_cols
        ]
        first = torch.tensor([place[a] for a, _ in pairs])
        second = torch.tensor([place[b] for _, b in pairs])
        return (second, first) if activation.up_first else (first, second)

    def expected(
        self,
        activation: Activation,
        weight_place: str,
        leaves: dict[str, list[Tensor] | None] | None = None,
        *,
        tokens: int | None = None,
        reduce: bool = True,
    ) -> list[Tensor]:
        """y [T, h] of every rank as the op defines it (the first `tokens` rows only, if given).

        Without `reduce`, the replicated form gives each rank's partial sum.
        """
        leaves = leaves or self.leaves()
        ids = [i[:tokens] for i in self.ids_kept]
        x, weights = [v[:tokens] for v in _given(leaves["x"])], leaves["weights"]
        weights = None if weights is None else [w[:tokens] for w in weights]
        if self.form.shards_tokens:
            joined = [self._experts(leaves, slice(None), activation)]
            y = self._layer(
                torch.cat(x), torch.cat(ids), _joined(weights), joined[0], activation, weight_place
            )
            return list(y.split([len(v) for v in x]))
        partial = [
            self._layer(
                x[r], ids[r], None if weights is None else weights[r],
                self._experts(leaves, slice(r, r + 1), activation), activation, weight_place,
            )
            for r in range(self.form.world.size)
        ]  # fmt: skip
        if self.form.name == "replicated" and reduce:
            total = torch.stack(partial).sum(0)
            return [total for _ in partial]
        return partial

    def _experts(
        self, leaves: dict[str, list[Tensor] | None], ranks: slice, activation: Activation
    ) -> dict[str, Tensor | None]:
        """Stacks of the experts of `ranks`, in expert order, gate and up apart."""
        names = ("w_in", "w_up", "w_out", "b_in", "b_up", "b_out")
        joined = {n: _joined(v[ranks]) if (v := leaves[n]) is not None else None for n in names}
        if self.fused:
            gate, up = self.gate_up_columns(activation)
            w_in, b_in = joined["w_in"], joined["b_in"]
            assert w_in is not None
            joined["w_in"], joined["w_up"] = w_in[..., gate], w_in[..., up]
            if b_in is not None:
                joined["b_in"], joined["b_up"] = b_in[..., gate], b_in[..., up]
        elif activation.gated and activation.up_first:
            joined["w_in"], joined["w_up"] = joined["w_up"], joined["w_in"]
            joined["b_in"], joined["b_up"] = joined["b_up"], joined["b_in"]
        return joined

    def _layer(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor | None,
        experts: dict[str, Tensor | None],
        activation: Activation,
        weight_place: str,
    ) -> Tensor:
        plain = dataclasses.replace(activation, interleaved=False, up_first=False)
        w_in, w_out = experts["w_in"], experts["w_out"]
        assert w_in is not None
        assert w_out is not None
        return moe_layer_ref(
            x, ids, weights, w_in, experts["w_up"], w_out,
            experts["b_in"], experts["b_up"], experts["b_out"],
            activation=plain, weight_place=weight_place,
        )  # fmt: skip


def _by_slot(kept: Tensor, ids: Tensor, axes: str) -> Tensor:
    """Whether each slot is kept, [T, A], from a tensor of a region's `Kept`."""
    if axes == "AT":
        return kept.reshape(ids.shape[::-1]).t()
    if axes == "TA":
        return kept.reshape(ids.shape)
    num_experts = kept.shape[1]
    by_expert = (kept != 0).flatten(2).any(-1)
    is_known = (ids >= 0) & (ids < num_experts)
    return by_expert.gather(1, ids.clamp(0, num_experts - 1)) & is_known


def _given(values: list[Tensor] | None) -> list[Tensor]:
    assert values is not None
    return values


def _joined(values: Sequence[Tensor] | None) -> Tensor | None:
    return None if values is None else torch.cat(list(values))


def _stack(gemm: ExpertGemm, data: Sequence[Tensor], k: Support, n: Support) -> Ranked:
    if gemm.transposed:
        return [make(d.transpose(1, 2), (None, n, k)) for d in data]
    return [make(d, (None, k, n)) for d in data]


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


def close(actual: Tensor, expected: Tensor) -> bool:
    """Equal up to float64 rounding: what differs in kind differs by far more than 1e-9."""
    if actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
        return False
    if expected.numel() == 0:
        return True
    scale = float(expected.abs().max())
    return bool((actual - expected).abs().max() <= 1e-9 * max(scale, 1e-3))
