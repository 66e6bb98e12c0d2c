"""comet_compile: one line that overlaps mixture-of-experts communication with compute.

    model = torch.compile(model, backend="comet")

Nothing needs to be imported for that line: the backend is found through its entry point.
This module is the optional door for looking inside (:func:`explain`), for configuration
(:class:`CometConfig`) and for cheaper gradient accumulation (:func:`accumulate_gradients`).
Importing it loads neither Triton nor a CUDA context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comet_compile._version import __version__

if TYPE_CHECKING:
    from comet_compile.accumulate import accumulate_gradients
    from comet_compile.config import CometConfig
    from comet_compile.explainer import explain
    from comet_compile.report import Report

__all__ = ["CometConfig", "Report", "__version__", "accumulate_gradients", "explain"]

_LAZY = {
    "CometConfig": "comet_compile.config",
    "Report": "comet_compile.report",
    "accumulate_gradients": "comet_compile.accumulate",
    "explain": "comet_compile.explainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    # An eager import of `explain` would pull torch._dynamo into every process that only asks
    # for the version.
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
