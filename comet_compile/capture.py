"""Keep ``.item()`` and ``.tolist()`` inside the graph for frames that comet compiles.

Dropless expert parallelism reads its splits on the host. Dynamo breaks the graph there unless
``torch._dynamo.config.capture_scalar_outputs`` is on while it traces, and it traces before it
calls a backend. The backend is *loaded* before that, though: ``torch.compile(model,
backend="comet")`` looks the name up at once, so importing :mod:`comet_compile.backend` may install
a hook that is in place when the first frame is traced.

The hook wraps one function, ``torch._dynamo.convert_frame._compile``, which Dynamo calls once for
every frame it compiles (first compiles, recompiles, functions resumed after a graph break) and
never for a frame that is already compiled, so it costs nothing at run time. It reads four of
the arguments by name: the compiler function tells whose frame it is, ``one_graph`` and ``export``
whether Dynamo captures scalars anyway (it does under ``fullgraph=True``), ``locals`` whether an
input is empty (see :mod:`comet_compile.empty_inputs`). Frames of other backends pass straight
through, and so do comet's own with the option ``comet.capture_scalars`` off and no empty input.

1. A frame of comet is traced with scalars captured.
2. If that fails and data-dependent symbols had appeared, everything it counted and recorded is
   taken back and the frame is traced again with the user's own setting, as if for the first time.
   Code exists that compiles only with the graph break: list indexing by a captured integer is an
   error in Dynamo, and Inductor fails on some graphs with unbacked sizes.
3. If the second attempt fails as well, its error is raised: the one seen without comet.

What stays out of reach: a graph that compiles, and whose runtime assertion on a captured size
then fails for an input that eager would take (a captured size of 1 that broadcasts). Switch
capturing off for such a model.

Considered and not taken: setting the config for the process (changes other backends, no way back
when tracing fails), ``backend_ctx_ctor`` (``torch.compile`` does not forward it, and it would run
at every call), wrapping ``ConvertFrame.__call__`` (it has already counted the frame, and turned a
soft failure into "run this frame eagerly").
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch._dynamo import convert_frame
from torch._dynamo.utils import counters

from comet_compile import empty_inputs, records
from comet_compile.config import CometConfig
from comet_compile.errors import CometError, OptionError

__all__ = ["failing_early", "install", "is_capturing", "uninstall"]

log = logging.getLogger(__name__)

BACKEND_MARK = "_comet_backend"
"""Attribute that is True on the function registered as the comet backend."""

_NEEDED_PARAMETERS = frozenset({"compiler_fn", "one_graph", "export", "locals"})
_attempt = threading.local()  # .capturing: whether this thread is in a capturing attempt


def install() -> None:
    """Make Dynamo capture scalars in frames compiled by comet; a second call does nothing.

    On a torch whose Dynamo is not built as expected, scalars are captured in the whole process
    instead (unless ``COMET_CAPTURE_SCALARS=0``), and a log line says so.
    """
    original: Any = getattr(convert_frame, "_compile", None)
    if hasattr(original, "_comet_original"):
        return
    if not _is_expected(original):
        _capture_everywhere()
        return
    convert_frame._compile = _capturing(original)


def uninstall() -> None:
    """Take the hook out again (for tests)."""
    hook: Any = getattr(convert_frame, "_compile", None)
    if hasattr(hook, "_comet_original"):
        convert_frame._compile = hook._comet_original


def is_capturing() -> bool:
    """Whether this thread is tracing or compiling a frame with scalars captured by the hook."""
    return getattr(_attempt, "capturing", False)


@contextlib.contextmanager
def failing_early() -> Iterator[None]:
    """Compile the backward of a graph that exists only by capturing together with its forward.

    AOTAutograd swallows an error of a backward with symbolic sizes and raises it in the first
    ``loss.backward()``, too late to trace the frame again. The backend wraps its call of Inductor
    in this; graphs without unbacked symbols are compiled as ever.
    """
    if is_capturing() and _has_unbacked_symbols(_current_shape_env()):
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
            yield
    else:
        yield


def _is_expected(original: object) -> bool:
    if not callable(original):
        return False
    return set(inspect.signature(original).parameters) >= _NEEDED_PARAMETERS


def _capture_everywhere() -> None:
    config, _ = CometConfig.from_options()
    if not config.capture_scalars or torch._dynamo.config.capture_scalar_outputs:
        return
    torch._dynamo.config.capture_scalar_outputs = True
    log.warning(
        "comet: this torch (%s) has no hook point known to comet_compile, so "
        "torch._dynamo.config.capture_scalar_outputs is now True for the whole process; "
        "set COMET_CAPTURE_SCALARS=0 to leave it alone.",
        torch.__version__,
    )


def _capturing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `original`, Dynamo's compile function of one frame, with the two attempts around."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def compile_frame(*args: Any, **kwargs: Any) -> Any:
        frame = signature.bind(*args, **kwargs).arguments
        config = _comet_config(frame["compiler_fn"])
        if config is None or not config.enabled:
            return original(*args, **kwargs)
        captures = config.capture_scalars and not (
            torch._dynamo.config.capture_scalar_outputs or frame["one_graph"] or frame["export"]
        )
        is_empty = empty_inputs.among(frame["locals"])
        if not captures and not is_empty:
            return original(*args, **kwargs)

        before = _Tallies.now()
        with contextlib.ExitStack() as attempt:
            if captures:
                attempt.enter_context(_capturing_attempt())
            if is_empty:
                attempt.enter_context(empty_inputs.kept_symbolic())
            try:
                return original(*args, **kwargs)
            except Exception as error:
                if not is_empty and not _has_unbacked_symbols(_shape_env_in(error)):
                    raise  # capturing changed nothing, so the user would have seen it too
                if _is_own(error):
                    raise  # what comet means to say must not end as a graph break
                reason = f"{type(error).__name__}: {_first_line(error)}"
                log.debug("comet: the first attempt at a frame failed", exc_info=True)

        # Outside of the except block: the error to come is not "during handling of" the first.
        before.restore()
        result = original(*args, **kwargs)
        counters["comet"]["capture_retries"] += 1
        _log_retry(frame.get("code"), reason)
        return result

    compile_frame._comet_original = original  # type: ignore[attr-defined]
    return compile_frame


@contextlib.contextmanager
def _capturing_attempt() -> Iterator[None]:
    outer = is_capturing()
    _attempt.capturing = True
    try:
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            yield
    finally:
        _attempt.capturing = outer


def _log_retry(code: Any, reason: str) -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_rank() != 0:
        return
    log.info(
        "comet: %s compiles only with graph breaks at .item() and .tolist(): %s",
        f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})" if code else "a frame",
        reason,
    )


# Whose frame is it?


def _comet_config(compiler_fn: object) -> CometConfig | None:
    """Return the options with which `compiler_fn` calls comet, None if it is not comet's."""
    options = _comet_options(compiler_fn)
    if options is None:
        return None
    try:
        return CometConfig.from_options(options)[0]
    except OptionError:
        return None  # the backend raises it, where the user expects it


def _comet_options(compiler_fn: object) -> Mapping[str, object] | None:
    """Return the options with which comet is called in the end, None if it is not comet."""
    options: Mapping[str, object] = {}
    while compiler_fn is not None:
        arguments = _bound_arguments(compiler_fn)
        options = arguments.get("options") or options
        inner = _unwrapped(compiler_fn)
        if inner is None:
            return options if getattr(compiler_fn, BACKEND_MARK, False) else None
        compiler_fn = inner
    return None


def _bound_arguments(compiler_fn: object) -> Mapping[str, Any]:
    if isinstance(compiler_fn, functools.partial):
        return compiler_fn.keywords
    if isinstance(compiler_fn, torch._TorchCompileWrapper):
        return compiler_fn.kwargs
    return {}


def _unwrapped(compiler_fn: object) -> object | None:
    """Return what `compiler_fn` calls, or None if it is no known wrapper.

    Looked for in this order, because WrapBackendDebug copies the attributes of what it wraps.
    """
    if isinstance(compiler_fn, functools.partial):
        return compiler_fn.func
    if inspect.ismethod(compiler_fn):  # DDPOptimizer(...).compile_fn
        return getattr(compiler_fn.__self__, "backend_compile_fn", None)
    for attribute in ("_torchdynamo_orig_backend", "compiler_fn"):
        inner = getattr(compiler_fn, attribute, None)
        if inner is not None:
            return inner
    return None


# Did capturing matter?


def _is_own(error: BaseException) -> bool:
    """Whether comet raised `error` on purpose (a wrong option, a refusal under comet.strict)."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, CometError) or isinstance(
            getattr(link, "inner_exception", None), CometError
        ):
            return True
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return False


def _shape_env_in(error: BaseException) -> Any:
    """Return the ShapeEnv of the tracing that `error` ended, None if it ended before tracing."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traced = getattr(link, "_torch_dynamo_tracer_output", None)
        output = getattr(traced, "output_graph_for_cleanup", None)
        if output is not None:
            return output.shape_env
        link = link.__cause__ or link.__context__
    return None


def _current_shape_env() -> Any:
    tracing = torch._guards.TracingContext.try_get()
    fake_mode = tracing.fake_mode if tracing is not None else None
    return fake_mode.shape_env if fake_mode is not None else None


def _has_unbacked_symbols(shape_env: Any) -> bool:
    if shape_env is None:
        return False
    return bool(shape_env.unbacked_symint_counter or shape_env.unbacked_symfloat_counter)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


@dataclasses.dataclass(frozen=True)
class _Tallies:
    """The process's compile counters and the open lists of graph records at one moment."""

    counts: dict[str, Counter[Any]]
    num_records: list[tuple[list[records.GraphRecord], int]]

    @classmethod
    def now(cls) -> _Tallies:
        counts = {name: counter.copy() for name, counter in counters.items()}
        return cls(counts, [(opened, len(opened)) for opened in records._collectors])

    def restore(self) -> None:
        # in place: others hold on to the inner counters and to the lists
        for name, counter in counters.items():
            counter.clear()
            counter.update(self.counts.get(name, {}))
        for opened, length in self.num_records:
            del opened[length:]
