"""The sizes of a layer as the command line names them."""

from __future__ import annotations

from typing import Any

from comet_compile.errors import CometError

__all__ = ["LayerSizeError", "parse_sizes", "sizes_of_config"]

Sizes = tuple[int, int, int, int]
"""Hidden size, intermediate size of an expert, experts, top-k."""


class LayerSizeError(CometError, ValueError):
    """What was given names no sizes of a layer."""


def parse_sizes(text: str) -> Sizes:
    """Read ``2048x768x128x8``: hidden size, intermediate size, experts, top-k."""
    try:
        hidden, inter, experts, top_k = (int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise LayerSizeError(
            f"{text!r} is no shape; allowed: hidden x intermediate x experts x top-k, "
            "such as 2048x768x128x8"
        ) from error
    return hidden, inter, experts, top_k


# By the names that configs use, the first that is there counts.
_NAMES = {
    "hidden size": ("hidden_size",),
    "intermediate size": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
    "number of experts": (
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    ),
    "top-k": ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"),
}  # fmt: skip


def sizes_of_config(config: Any) -> Sizes:
    """Return (hidden, intermediate, experts, top-k) of a Hugging Face config."""
    found = []
    for what, names in _NAMES.items():
        values = [getattr(config, name, None) for name in names]
        value = next((v for v in values if isinstance(v, int) and v > 0), None)
        if value is None:
            raise LayerSizeError(
                f"a {config.model_type} config names no {what} ({', '.join(names)}); "
                "give the sizes by --shapes"
            )
        found.append(value)
    hidden, inter, experts, top_k = found
    return hidden, inter, experts, top_k
