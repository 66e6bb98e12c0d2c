"""What a random MoE layer is composed of: interchangeable ways to write each step.

A `Recipe` says how each step is written; `draw` draws one. Every recipe without a `defect` is a
correct layer, whatever the combination. A defect makes one step wrong. `zoo.composed_layouts`
makes the layers.

Legend: T tokens, A experts per token, S = T*A slots, E experts, H model dim.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "softmax, then top-k": lambda logits, a: logits.softmax(-1).topk(a, -1),
    "top-k, then softmax": lambda logits, a: _mapped(logits.topk(a, -1), lambda v: v.softmax(-1)),
    "sigmoid": lambda logits, a: logits.sigmoid().topk(a, -1),
    "renormalised": lambda logits, a: _mapped(
        logits.softmax(-1).topk(a, -1), lambda v: v / v.sum(-1, keepdim=True)
    ),
    "sorted": lambda logits, a: _mapped(
        [part[:, :a] for part in logits.sigmoid().sort(-1, descending=True)], lambda v: 2.5 * v
    ),
    "gathered": lambda logits, a: _gathered(logits, logits.topk(a, -1, sorted=False)[1]),
}


def _mapped(found: object, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    values, ids = found  # type: ignore[misc]
    return change(values), ids


def _gathered(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return logits.softmax(-1).gather(1, ids), ids


COUNTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "scatter_add": lambda ids_S, e: ids_S.new_zeros(e).scatter_add(
        0, ids_S, torch.ones_like(ids_S)
    ),
    "bincount": lambda ids_S, e: torch.bincount(ids_S, minlength=e),
    "one_hot": lambda ids_S, e: F.one_hot(ids_S, e).sum(0),
    "compare": lambda ids_S, e: (ids_S[:, None] == torch.arange(e)).sum(0),
    "histc": lambda ids_S, e: torch.histc(ids_S.float(), bins=e, min=0, max=e - 1).long(),
}
ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "argsort": lambda ids_S: torch.argsort(ids_S),
    "stable argsort": lambda ids_S: torch.argsort(ids_S, stable=True),
    "sort": lambda ids_S: torch.sort(ids_S, stable=True)[1],
}
GATHERS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "divide": lambda x, order_S, a: x[order_S // a],
    "div floor": lambda x, order_S, a: x[torch.div(order_S, a, rounding_mode="floor")],
    "index_select": lambda x, order_S, a: x.index_select(0, order_S // a),
    "repeated": lambda x, order_S, a: x.repeat_interleave(a, 0)[order_S],
    "expanded": lambda x, order_S, a: x[:, None].expand(-1, a, -1).reshape(-1, x.shape[1])[order_S],
    "token numbers": lambda x, order_S, a: x[torch.arange(len(x)).repeat_interleave(a)[order_S]],
    "gather": lambda x, order_S, a: torch.gather(
        x, 0, (order_S // a)[:, None].expand(-1, x.shape[1])
    ),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "written silu": lambda v: v * torch.sigmoid(v),
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu": F.relu,
}
PLAIN = {**ACTIVATIONS, "relu2": lambda v: F.relu(v).square()}
COMBINES = ("inverse argsort", "inverse scatter", "index_add", "scatter_add", "index_put")
WAYS = {
    "sorted": ("",),
    "padded": ("put back", "read back", "added"),
    "capacity": ("read by slot", "written by slot", "masked", "choices first"),
    "exchanged": ("argsort", "scatter", "index_copy"),
}
"""Where the rows of experts lie, and for each layout the ways to write it.

- sorted: expert by expert, one behind the other.
- padded: the same, every expert's rows filled up to a multiple with a row of zeros.
- capacity: in slots [E, C, H], tokens beyond C dropped; products are batched.
- exchanged: on the rank of their expert, by all-to-all there and back.
"""

_OF_ALL = ("activation of the sum", "gate of the next row", "next token")
_OF_SORTED = (
    *_OF_ALL, "counts of the next expert", "starts for ends", "descending order",
    "weights not sorted", "not brought back", "brought back twice", "rows weighted by place",
    "bias of the slot's place",
)  # fmt: skip
_DEFECTS = {
    "sorted": _OF_SORTED,
    "padded": (
        *_OF_SORTED, "pads overwrite a row", "rows moved to no gaps", "ends without pads",
        "padded down",
    ),
    "capacity": (
        *_OF_ALL, "dropped rows overwrite", "one row too many", "dropped in another order",
        "dropped rows count",
    ),
    "exchanged": (
        *_OF_SORTED, "splits swapped", "sorted by rank", "counts that were sent", "home unsorted",
        "home sorted twice",
    ),
}  # fmt: skip
DEFECTS = {defect for defects in _DEFECTS.values() for defect in defects}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a layer writes each step."""

    layout: str
    way: str
    scores: str
    counts: str
    order: str
    gather: str
    pairing: str  # "halves", "up first", "interleaved", "separate" or "plain"
    activation: str
    transposed: bool  # weights [E, N, H], multiplied transposed
    biases: bool
    place: str  # where weights multiply: "before", "between", "after", "none"
    wide: bool  # in float32
    combine: str
    num_experts: int
    top_k: int
    defect: str | None = None

    def __str__(self) -> str:
        fields = dataclasses.asdict(self)
        return ", ".join(f"{name}={value}" for name, value in fields.items())

    def defects(self) -> list[str]:
        """Return what can be wrong with a layer of this kind."""
        by_slot = self.place == "none" or (
            self.place == "after" and self.combine.startswith("inverse")
        )
        impossible = {
            # of a single choice, these are one
            "weights not sorted": by_slot
            or (self.top_k == 1 and self.scores in ("top-k, then softmax", "renormalised")),
            # the number of these rows is known at run time only: too late to capture some operators
            "gate of the next row": self.pairing == "plain" or self.layout == "exchanged",
            "activation of the sum": self.layout == "exchanged",
            # its rows' experts are known from counts
            "bias of the slot's place": not self.biases or self.layout == "exchanged",
            "pads overwrite a row": self.way == "read back",
            "dropped rows count": self.way != "masked",
            "dropped in another order": self.top_k == 1,
        }
        return [name for name in _DEFECTS[self.layout] if not impossible.get(name)]


def draw(seed: int, *, defect: bool = False) -> Recipe:
    """Return a random recipe."""
    rng = random.Random(seed)
    # a layer that exchanges rows takes three times as long to capture as a sorted one
    layout = rng.choices(list(WAYS), weights=(22, 2, 2, 1))[0]
    pairing = rng.choice(("halves", "up first", "interleaved", "separate", "plain"))
    recipe = Recipe(
        layout=layout,
        way=rng.choice(WAYS[layout]),
        scores=rng.choice(list(SCORES)),
        # bincount's length is known at run time only, too late for a view by rank
        counts=rng.choice([c for c in COUNTS if (layout, c) != ("exchanged", "bincount")]),
        order=rng.choice(list(ORDERS)),
        gather=rng.choice(list(GATHERS)),
        pairing=pairing,
        activation=rng.choice(list(PLAIN if pairing == "plain" else ACTIVATIONS)),
        transposed=rng.random() < 0.5,
        biases=rng.random() < 0.3,
        place=rng.choice(("before", "between", "after", "after", "none")),
        wide=rng.random() < 0.4,
        combine=rng.choice(COMBINES),
        # two ranks share them
        num_experts=rng.choice((4, 6) if layout == "exchanged" else (4, 5, 6)),
        top_k=rng.choice((1, 2, 2, 3)),
    )
    if not defect:
        return recipe
    possible = recipe.defects()
    own = [name for name in possible if name not in _OF_SORTED]
    return dataclasses.replace(
        recipe, defect=rng.choice(own if own and rng.random() < 0.5 else possible)
    )
