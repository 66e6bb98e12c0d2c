"""The ``comet`` backend of torch.compile: Inductor with the MoE pass on its joint graph.

    model = torch.compile(model, backend="comet")

Loading this module (which torch.compile does before it traces) installs the scoped capture of
data-dependent splits, see `capture.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from comet_compile import capture, dump, fallback_gemm, refining, repair
from comet_compile.config import CometConfig
from comet_compile.errors import OptionError
from comet_compile.kernels.agreement import AGREEMENTS

log = logging.getLogger(__name__)


def comet(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph: find, prove and rewrite MoE layers, then Inductor.

    `mode` and options without the ``comet.`` prefix mean what they mean to Inductor. Raises
    OptionError for an unknown option.
    """
    from torch._inductor.compile_fx import compile_fx

    config, inductor_options = CometConfig.from_options(options)
    patches = _inductor_patches(mode, inductor_options)
    if config.enabled:
        AGREEMENTS.set_timeout(config.agreement_timeout)
        if config.refine is not None:
            refining.switch_on(config.refine)
        if repair.needs_repair():
            repair.repair_autograd_functions(gm)
        fallback_gemm.make_backward_traceable(gm)
        patches |= _pass_patches(config, patches)
        if _has_collectives(gm):
            # the order of communication must be the graph's on every rank, whatever their sizes
            patches["reorder_for_peak_memory"] = False
    with capture.failing_early():
        compiled = compile_fx(gm, example_inputs, config_patches=patches)
    assert callable(compiled)
    return compiled


comet._comet_backend = True  # type: ignore[attr-defined]


def _inductor_patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor settings for `mode` and `options`, checked as backend="inductor" checks them."""
    from torch._inductor import config as inductor_config
    from torch._inductor import list_mode_options

    patches: dict[str, Any] = {}
    if mode is not None and mode != "default":
        patches.update(list_mode_options(mode))
    known = inductor_config.get_config_copy()
    for key, value in options.items():
        name = key.replace("-", "_")
        if name not in known:
            raise OptionError(
                f"unknown option {key!r}: it is neither an Inductor setting (see "
                "torch._inductor.list_options()) nor does it start with 'comet.'"
            )
        patches[name] = value
    return patches


def _pass_patches(config: CometConfig, patches: Mapping[str, Any]) -> dict[str, Any]:
    """Append the MoE pass to the joint passes that the user set, by option or globally."""
    from comet_compile.passes import with_user_pass

    name = "joint_custom_post_pass"
    from torch._inductor import config as inductor_config

    user = patches.get(name, getattr(inductor_config, name))
    return {name: with_user_pass(user, config, dump.sink(config.dump))}


def _has_collectives(gm: torch.fx.GraphModule) -> bool:
    import torch.distributed as dist

    return (
        dist.is_available()
        and dist.is_initialized()
        and any(
            "c10d" in str(node.target) or "autograd_function_apply" in str(node.target)
            for module in gm.modules()
            if isinstance(module, torch.fx.GraphModule)
            for node in module.graph.nodes
        )
    )


capture.install()
