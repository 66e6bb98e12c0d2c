"""``comet_compile.explain(model, *args)``: compile once, run once, and say what comet did.

The model is compiled afresh, whatever was compiled before, and left as it was: the code caches of
the model's own functions get no entry (unless the graph breaks), compile caches on disk are
neither read nor written, and buffers, training flags and random state are put back.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from comet_compile import records
from comet_compile.report import GraphBreak, Report

__all__ = ["explain"]

_MAX_REASON_CHARS = 200
_NO_LIMIT = 1 << 30


def explain(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """Compile `model` with comet, run it once on the arguments, and return what was found.

    `model` is a module or a function, compiled already or not. The grad mode is the caller's:
    with gradients enabled, forward and backward are compiled and reported together (backward is
    not run); under ``torch.no_grad()`` the inference graph is. `args` and `kwargs` are handed
    over as they are; a model that writes into its arguments does so here too. Under
    ``torch.distributed`` every rank has to call this, as it would the model.
    """
    from torch._dynamo import lookup_backend
    from torch._dynamo.eval_frame import OptimizedModule, innermost_fn
    from torch._dynamo.utils import graph_break_reasons

    if not callable(model):
        raise TypeError(
            f"explain() takes a module or a function and its arguments, got a "
            f"{type(model).__name__}; call it as explain(model, *args, **kwargs)."
        )
    original = model._orig_mod if isinstance(model, OptimizedModule) else innermost_fn(model)
    backend = _FreshBackend(lookup_backend("comet"))
    compiled = torch.compile(_with_own_code(original), backend=backend)
    num_breaks_before = len(graph_break_reasons)
    with records.collect() as graphs, _state_kept(original), _always_compiling():
        compiled(*args, **kwargs)
    return Report(
        graphs=tuple(graphs),
        graph_breaks=_graph_breaks(graph_break_reasons[num_breaks_before:]),
        num_graphs=backend.num_graphs,
    )


class _FreshBackend:
    """The comet backend as an object of its own: Dynamo reuses code made by an equal backend."""

    def __init__(self, compiler_fn: Callable[..., Any]) -> None:
        # the name under which comet's capture hook and Dynamo look through wrappers
        self.compiler_fn = compiler_fn
        self.__name__ = "comet"  # what Dynamo's errors call it
        self.num_graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.num_graphs += 1
        return self.compiler_fn(gm, example_inputs)


def _with_own_code(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `model` and whose code object nobody else has.

    Dynamo keeps what it compiles with the code object, and counts it against the recompile
    limit: compiling `model` itself would cost the user one recompile per call of explain().
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    run.__code__ = run.__code__.replace(co_name="explain_run")
    return run


@contextlib.contextmanager
def _always_compiling() -> Iterator[None]:
    """Switch off what could hand back code without running the pass: caches, recompile limits."""
    import torch._dynamo.config as dynamo_config
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    with (
        inductor_config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        functorch_config.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False),
        # functions around a graph break are compiled under their own code, once per explain()
        dynamo_config.patch(recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT),
    ):
        yield


@contextlib.contextmanager
def _state_kept(model: Callable[..., Any]) -> Iterator[None]:
    """Put back random state and, of a module, training flags and buffers that the block changed."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    training = [module.training for module in modules]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    python_state = random.getstate()
    # asking for devices would initialise CUDA in a process that has not used it
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        for module, was_training in zip(modules, training, strict=True):
            module.training = was_training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                # an untouched buffer must not get a new version: a graph may have saved it
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _graph_breaks(reasons: Iterable[Any]) -> tuple[GraphBreak, ...]:
    """Return the first words and the innermost user line of Dynamo's `GraphCompileReason`s.

    Dynamo traces a frame again after a break and may name the same place twice; once is enough.
    """
    breaks: dict[str, GraphBreak] = {}
    for reason in reasons:
        lines = [line.strip() for line in str(reason.reason).splitlines() if line.strip()]
        words = (lines[0] if lines else "unknown")[:_MAX_REASON_CHARS]
        frame = reason.user_stack[-1] if reason.user_stack else None
        where = f"{frame.filename}:{frame.lineno}" if frame is not None else ""
        breaks.setdefault(where or words, GraphBreak(words, where))
    return tuple(breaks.values())
