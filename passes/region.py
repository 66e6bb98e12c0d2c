"""What a candidate region is: expert GEMMs, the pair that makes a layer, and a cut around it."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from comet_compile.passes.graph_view import is_collective, val
from comet_compile.passes.products import is_no_op

c10d = torch.ops._c10d_functional


@dataclasses.dataclass(frozen=True)
class ExpertGemm:
    """The product of rows with a stack of expert matrices.

    That is one node, or, where Python loops over the experts (`is_loop`), one for each in order;
    rows are their argument number `rows_at`.
    `stack` is [L, K, N], or [L, N, K] if `transposed` (one matrix per expert either way). `dense`:
    every expert has its own block of rows, [L, rows, K], whatever the routing is.
    """

    nodes: tuple[fx.Node, ...]
    rows_at: int
    stack: fx.Node
    transposed: bool
    dense: bool = False
    is_loop: bool = False

    @property
    def rows(self) -> tuple[fx.Node, ...]:
        """What each node multiplies. Read anew, since layers in front are replaced."""
        rows = [node.args[self.rows_at] for node in self.nodes]
        return tuple(row.args[0] if is_no_op(row) else row for row in rows)

    @property
    def node(self) -> fx.Node:
        """The node that stands for all of them in messages."""
        return self.nodes[0]

    @property
    def num_experts(self) -> int:
        return int(val(self.stack).shape[0])

    @property
    def in_features(self) -> int:
        return int(val(self.stack).shape[2 if self.transposed else 1])

    @property
    def out_features(self) -> int:
        return int(val(self.stack).shape[1 if self.transposed else 2])


@dataclasses.dataclass(frozen=True)
class ExpertPair:
    """The in-projections (one, or gate and up apart) and the out-projection of one layer."""

    ins: tuple[ExpertGemm, ...]
    out: ExpertGemm

    @property
    def stacks(self) -> tuple[fx.Node, ...]:
        return tuple(gemm.stack for gemm in self.gemms)

    @property
    def gemms(self) -> tuple[ExpertGemm, ...]:
        return (*self.ins, self.out)

    @property
    def products(self) -> tuple[fx.Node, ...]:
        """The nodes of all projections."""
        return tuple(node for gemm in self.gemms for node in gemm.nodes)

    @property
    def dense(self) -> bool:
        return self.out.dense


@dataclasses.dataclass(frozen=True)
class Scores:
    """A matrix [T, E] of routing weights that follows from the ids, and how (see `scores.py`).

    `nodes`, in graph order, compute `node` from the ids, constants and the `free` float tensors.
    """

    node: fx.Node
    nodes: tuple[fx.Node, ...]
    free: tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True)
class Kept:
    """Which slots an expert has room for: a tensor inside the region that follows from the ids.

    Its `axes` are, whatever its shape, "TA": bools by token and slot, "AT": the same by slot and
    token, or "TEC": numbers by token, expert and place in the expert's room (one-hot tensors of
    einsums), of which those of a slot that is dropped are all zero.
    """

    node: fx.Node
    axes: str


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A region cut out of the graph: its inputs, its output and the nodes in between.

    `nodes` are in graph order and hold the boundary nodes too; `biases` are the [L, columns]
    tables that rows pick a line of. `top_k` is the number of ids per token.

    `first` is the id of the first expert here: smaller ones, like those past the last expert, are
    other ranks'. With `scores`, `weights` is a matrix [T, E] that holds the weights at the ids, and
    the region itself knows no ids. With `kept`, all other slots contribute nothing.
    """

    pair: ExpertPair
    x: fx.Node
    ids: fx.Node
    weights: fx.Node | None
    y: fx.Node
    biases: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    top_k: int
    scores: Scores | None = None
    first: int = 0
    kept: Kept | None = None

    def __str__(self) -> str:
        return f"{self.y.name} = moe({self.x.name}, {self.ids.name}, {self.weights})"

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        weights = () if self.weights is None else (self.weights,)
        return (self.x, self.ids, *weights, *self.pair.stacks, *self.biases)


def collectives(candidate: Candidate) -> list[fx.Node]:
    """The collectives inside the region that do more than wait."""
    return [
        n for n in candidate.nodes if is_collective(n) and n.target is not c10d.wait_tensor.default
    ]
