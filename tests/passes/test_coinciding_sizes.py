"""Sizes that coincide (as many tokens as experts, as wide as long ...) confuse no step of the pass.

Shapes tell dimensions apart only where sizes differ. Every layer here is captured at sizes of
which some are equal, must be rewritten, and must compute the same, on dense random numbers and for
all ranks (`lockstep.py`).

T tokens, E experts, A ids per token (top-k), H hidden, I intermediate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import joint_graphs
import lockstep
import pytest
import torch
from torch import Tensor, nn
from zoo.textbook import FuncolMoE
from zoo.titan import TitanMoE


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens [batch, seq, hidden] and a layer; the defaults all differ."""

    name: str
    batch: int = 1
    seq: int = 6
    experts: int = 8
    top_k: int = 2
    hidden: int = 24
    inner: int = 40

    def __str__(self) -> str:
        return self.name


SIZES = (
    Sizes("T=E", seq=8),
    Sizes("T=E,S=1", batch=8, seq=1),
    Sizes("T=E,B>1", batch=2, seq=4),
    Sizes("T=A", seq=2),
    Sizes("T=A,S=1", batch=2, seq=1),
    Sizes("T=1", seq=1),
    Sizes("T=1,A=1", seq=1, top_k=1),
    Sizes("A=1", top_k=1),
    Sizes("TA=E", seq=4),
    Sizes("TA=E,S=1", batch=4, seq=1),
    Sizes("T=H", seq=24),
    Sizes("T=H,S=1", batch=24, seq=1),
    Sizes("T=I", seq=40),
    Sizes("TA=I", seq=20),
    Sizes("H=I", inner=24),
    Sizes("H=2I", hidden=16, inner=8),
    Sizes("H=E", experts=24),
    Sizes("I=E", inner=16, experts=16),
    Sizes("2I=E", inner=8, experts=16),
    Sizes("E=A", experts=4, top_k=4),
    Sizes("E=A=T", experts=4, top_k=4, seq=4),
    Sizes("A=H", hidden=8, top_k=8),
    Sizes("T=E=H=I", seq=8, hidden=8, inner=8),
    Sizes("T=E=H=I=A", seq=8, hidden=8, inner=8, top_k=8),
)

# sizes at which every layer is tried by default
COMMON = ("T=E", "T=E,S=1", "T=A", "TA=E", "T=H", "H=I", "E=A")

# class of the block, its own names for I and E, further options
BLOCKS = {
    "olmoe": ("OlmoeSparseMoeBlock", "intermediate_size", "num_experts", {}),
    "qwen3_moe": (
        "Qwen3MoeSparseMoeBlock", "moe_intermediate_size", "num_experts", {"norm_topk_prob": True},
    ),
    "mixtral": ("MixtralSparseMoeBlock", "intermediate_size", "num_local_experts", {}),
    "gpt_oss": ("GptOssMLP", "intermediate_size", "num_local_experts", {}),
}  # fmt: skip

ALL_TO_ALL: dict[str, Callable[..., nn.Module]] = {
    "titan": TitanMoE,
    "funcol": FuncolMoE,
}


def hugging_face_block(name: str, implementation: str, sizes: Sizes) -> nn.Module:
    """Return a bf16 block of the given sizes, with random weights."""
    transformers = pytest.importorskip("transformers")
    class_name, inner, experts, options = BLOCKS[name]
    config = transformers.AutoConfig.for_model(
        name, hidden_size=sizes.hidden, num_experts_per_tok=sizes.top_k,
        **{inner: sizes.inner, experts: sizes.experts}, **options,
    )  # fmt: skip
    config._experts_implementation = implementation
    module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=[class_name])
    block = getattr(module, class_name)(config)
    torch.manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block.bfloat16()


def check(model: nn.Module, x: Tensor, train: bool, world_size: int = 1) -> None:
    graph = joint_graphs.capture(model, x, train=train)
    rewritten = joint_graphs.clone(graph)
    counts = joint_graphs.run_pass(rewritten)
    expected = {"regions_found": 1, "regions_portable": 1}
    if train:
        expected["regions_backward_portable"] = 1
    assert counts == expected
    inputs = lockstep.random_inputs(graph, world_size, seed=0, num_tokens=x.numel() // x.shape[-1])
    before = lockstep.execute(graph, inputs, world_size)
    after = lockstep.execute(rewritten, inputs, world_size)
    assert not lockstep.differences(after, before)


def tokens(sizes: Sizes) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.batch, sizes.seq, sizes.hidden)
    return torch.randn(shape, generator=generator).bfloat16()


def cases(names: Collection[str]) -> list[pytest.param]:
    """Every layer at the sizes of `COMMON` and every size for a layer, training or not by turns;
    the rest is slow."""
    return [
        pytest.param(
            name, sizes, train,
            id=f"{name}-{sizes.name}-{'training' if train else 'inference'}",
            marks=[] if _is_quick(sizes, turn, place, train, len(names)) else [pytest.mark.slow],
        )
        for place, name in enumerate(names)
        for turn, sizes in enumerate(SIZES)
        for train in (False, True)
    ]  # fmt: skip


def _is_quick(sizes: Sizes, turn: int, place: int, train: bool, num_names: int) -> bool:
    chosen = sizes.name in COMMON or turn % num_names == place
    return chosen and train == bool((place + turn) % 2)


@pytest.mark.parametrize(("name", "sizes", "train"), cases(BLOCKS))
def test_hugging_face(name: str, sizes: Sizes, train: bool) -> None:
    check(hugging_face_block(name, "grouped_mm", sizes), tokens(sizes), train)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_hugging_face_batched(name: str, sizes: Sizes, train: bool) -> None:
    check(hugging_face_block(name, "batched_mm", sizes), tokens(sizes), train)


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize(("name", "sizes", "train"), cases(ALL_TO_ALL))
def test_all_to_all(name: str, sizes: Sizes, train: bool) -> None:
    layer = ALL_TO_ALL[name](
        num_experts=sizes.experts, top_k=sizes.top_k, hidden=sizes.hidden, intermediate=sizes.inner
    )
    check(layer, tokens(sizes).flatten(0, 1), train, world_size=2)
