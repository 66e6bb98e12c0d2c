"""Every class of experts in the installed transformers, found in its sources, as small layers.

Model files are written out in full there, so most classes are the same code under another name.
A *family* is the classes whose code is equal but for names and comments; one of them, the first by
name, stands for all. What a new release of transformers adds shows up as a new family.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo import routing

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 32, 48, 8, 2

# What the configs call the sizes that matter here.
_SIZES = {
    "hidden_size": HIDDEN,
    "moe_hidden_size": HIDDEN,
    **dict.fromkeys(
        (
            "intermediate_size",
            "moe_intermediate_size",
            "expert_intermediate_size",
            "expert_ffn_hidden_size",
            "ffn_hidden_size",
        ),
        INTERMEDIATE,
    ),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "top_k"), TOP_K),
    "moe_latent_size": None,
}
_CLASS = re.compile(r"^@use_experts_implementation(?:\(([^)]*)\))?\s*\nclass (\w+)\(", re.MULTILINE)
_OWN = re.compile(
    r"^class \w*(?:Experts|CDMoE|SparseMLP|SparseMoe\w*|MoE|Moe|MoeMLP)\(nn\.Module\)", re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Classes of one source; `name` stands for them."""

    name: str
    module: str
    classes: tuple[str, ...]


@functools.cache
def families() -> tuple[Family, ...]:
    """Return all families of the installed transformers, by name."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for path in sorted(models.glob("*/modeling_*.py")):
        text = path.read_text()
        for match in _CLASS.finditer(text):
            name = match[2]
            key = (match[1] or "", _plain_code(text[match.end() :], name))
            module = f"transformers.models.{path.parent.name}.{path.stem}"
            found.setdefault(key, []).append((name, module))
    return tuple(
        sorted(
            (
                Family(*min(members), tuple(sorted(name for name, _ in members)))
                for members in found.values()
            ),
            key=lambda family: family.name,
        )
    )


def _plain_code(text: str, name: str) -> str:
    """Return a class's body without its name, comments, docstrings, annotations and layout."""
    end = re.search(r"\n(?=\S)", text)
    body = text[: end.start()] if end else text
    body = re.sub(r'""".*?"""|#.*', "", body, flags=re.DOTALL if '"""' in body else 0)
    body = re.sub(r"config: \w+", "config", body.replace(name, ""))
    return re.sub(r"\s+", " ", body)


class Layer(nn.Module):
    """A router with a clear choice in front of the experts of a family; [B, S, H] both ways."""

    def __init__(self, family: Family, implementation: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.experts = _experts(family, implementation).to(dtype)
        router = routing.router_rows(NUM_EXPERTS, HIDDEN)
        self.router = nn.Parameter(router.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Route as most models do: softmax, top-k, renormalised."""
        rows = x.reshape(-1, x.shape[-1])
        scores = (rows @ self.router.T).float().softmax(-1)
        weights, ids = scores.topk(TOP_K, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        return self.experts(rows, ids, weights).view(x.shape)


def layer(
    family: Family, implementation: str = "grouped_mm", dtype: torch.dtype = torch.bfloat16
) -> Layer:
    """Return a layer with seeded weights."""
    return Layer(family, implementation, dtype)


class OwnLayer(nn.Module):
    """The block of a model with experts of its own: its router, experts and all; [B, S, H]."""

    def __init__(self, model: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.block = _OWN_BLOCKS[model]().to(dtype)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.block.parameters():
                value = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(value / parameter.shape[-2] ** 0.5)
            # a quarter, for scores that differ behind a sigmoid
            self.block.router.weight.copy_(0.25 * routing.router_rows(NUM_EXPERTS, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output without its router's logits."""
        return self.block(x)[0].view(x.shape)


def _llama4() -> nn.Module:
    from transformers.models.llama4 import configuration_llama4, modeling_llama4

    config = configuration_llama4.Llama4TextConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    block: nn.Module = modeling_llama4.Llama4TextMoe(config)
    return block


_OWN_BLOCKS = {"llama4": _llama4}


def tokens(batch: int = 2, seq: int = 12, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return [B, S, H] whose routing is planted."""
    ids_TA = routing.spread_ids(batch * seq, NUM_EXPERTS, TOP_K)
    x_TH = routing.planted_tokens(ids_TA, NUM_EXPERTS, HIDDEN)
    return x_TH.to(dtype).view(batch, seq, HIDDEN)


def _experts(family: Family, implementation: str) -> nn.Module:
    module = importlib.import_module(family.module)
    experts_class = getattr(module, family.name)
    config = _config_class(module, experts_class)()
    config = getattr(config, "text_config", config)  # of a model that also sees
    for name, value in _SIZES.items():
        if hasattr(config, name):
            of_each_kind = isinstance(getattr(config, name), list | tuple)
            setattr(config, name, [value, value] if of_each_kind else value)
    config._experts_implementation = implementation
    arguments = {"config": config, "intermediate_size": INTERMEDIATE, "layer_idx": 0}
    parameters = inspect.signature(experts_class.__init__).parameters
    experts: nn.Module = experts_class(**{n: v for n, v in arguments.items() if n in parameters})
    generator = torch.Generator().manual_seed(5)
    transposed = getattr(experts, "is_transposed", False)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 3:
                value /= parameter.shape[1 if transposed else 2] ** 0.5
            elif "norm" in name:
                value = 1 + 0.1 * value
            parameter.copy_(value)
    return experts


def _config_class(module: Any, experts_class: type) -> Any:
    """Return the config class that the experts are annotated with, else the one named alike."""
    annotation = inspect.signature(experts_class.__init__).parameters["config"].annotation
    if isinstance(annotation, str):
        annotation = getattr(module, annotation)
    if annotation is not inspect.Parameter.empty:
        return annotation
    names = [
        name for name in vars(module) if name.endswith("Config") and name != "PreTrainedConfig"
    ]
    own = experts_class.__name__
    alike = max(names, key=lambda name: _common_start(name, own))
    return getattr(module, alike)


def _common_start(a: str, b: str) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@functools.cache
def own_experts() -> tuple[str, ...]:
    """Return the models with sparse experts of their own, outside the shared interface."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    found = set()
    for path in models.glob("*/modeling_*.py"):
        text = path.read_text()
        if "use_experts_implementation" not in text and _OWN.search(text):
            found.add(path.parent.name)
    return tuple(sorted(found))


def num_decorated() -> int:
    """Return how often a class of experts is marked in the sources, however that is written."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    texts = (path.read_text() for path in models.glob("*/modeling_*.py"))
    return sum(len(re.findall(r"^@use_experts_implementation", t, re.MULTILINE)) for t in texts)
