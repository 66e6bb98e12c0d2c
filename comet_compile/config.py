"""The options of the comet backend: one frozen dataclass, read from options and environment.

    torch.compile(model, backend="comet", options={"comet.strict": True, "max_autotune": True})

Options that start with ``comet.`` are taken out and checked here; the others go to Inductor.
``COMET_<FIELD>`` environment variables give the defaults, options win. This module imports no
torch, so that it can be read by the command line and by the build.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from comet_compile.errors import OptionError

__all__ = ["CometConfig"]

_OPTION_PREFIX = "comet."
_VARIABLE_PREFIX = "COMET_"


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What one kind of field accepts, as a Python value (`check`) and as text (`parse`)."""

    allowed: str
    check: Callable[[object], bool]
    parse: Callable[[str], object]


def _parse_flag(text: str) -> object:
    words = {"1": True, "true": True, "yes": True, "on": True}
    words |= {"0": False, "false": False, "no": False, "off": False}
    return words[text.lower()]


def _is_number(value: object) -> bool:
    # bool is an int in Python, yet `agreement_timeout=True` is surely a slip
    return isinstance(value, int | float) and not isinstance(value, bool)


def _choice(*names: str) -> _Rule:
    return _Rule("one of " + ", ".join(map(repr, names)), lambda v: v in names, str)


_FLAG = _Rule("True or False", lambda v: isinstance(v, bool), _parse_flag)
_POSITIVE_INT = _Rule(
    "an integer of at least 1",
    lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1,
    int,
)
_DIRECTORY = _Rule(
    "the path of a directory, or None", lambda v: v is None or (isinstance(v, str) and v != ""), str
)
_SECONDS = _Rule(
    "a positive number of seconds, or None",
    # `0 < nan` is False and inf is refused: a deadline that never comes is not a deadline
    lambda v: v is None or (_is_number(v) and 0 < v < math.inf),  # type: ignore[operator]
    float,
)


def _option(default: object, rule: _Rule, *, changes_graph: bool = True) -> Any:
    """Return a dataclass field that carries its `rule` and whether cached graphs depend on it."""
    return dataclasses.field(
        default=default, metadata={"rule": rule, "changes_graph": changes_graph}
    )


@dataclasses.dataclass(frozen=True)
class CometConfig:
    """What the backend may do; every field is the option ``comet.<field>``."""

    enabled: bool = _option(True, _FLAG)
    """Whether MoE layers are looked for at all; False compiles as plain Inductor would."""

    capture_scalars: bool = _option(True, _FLAG)
    """Whether ``.item()`` and ``.tolist()`` of data-dependent splits are traced into the graph
    instead of breaking it."""

    strict: bool = _option(False, _FLAG)
    """Whether a candidate region that is refused raises, instead of being left as it was."""

    backward: bool = _option(True, _FLAG)
    """Whether training graphs are rewritten; False leaves them alone, inference is unchanged."""

    save: Literal["auto", "nothing", "pre_activation"] = _option(
        "auto", _choice("auto", "nothing", "pre_activation")
    )
    """What the forward keeps for the backward beside its own inputs: ``nothing`` recomputes,
    ``pre_activation`` keeps the rows in front of the activation. ``auto`` keeps them, but between
    ranks only on the fused path and up to an eighth of the device's memory for all layers of a
    graph: there is room for every rank's tokens, which is more than arrive."""

    max_proof_rows: int = _option(4_194_304, _POSITIVE_INT)
    """Largest number of rows (tokens times top-k) that the prover simulates for a region of one
    device; a region with more is refused. Regions of several ranks have no limit: their number of
    tokens may differ by rank, and all ranks must come to the same verdict."""

    dump: str | None = _option(None, _DIRECTORY, changes_graph=False)
    """Directory into which each compiled graph is written before and after, with its plan."""

    agreement_timeout: float | None = _option(None, _SECONDS, changes_graph=False)
    """Seconds a rank waits for its peers when a plan is first used; None takes the timeout of
    the process group."""

    refine: float | None = _option(None, _SECONDS, changes_graph=False)
    """Seconds that the first forward and the first backward of a layer's shape on one device may
    take longer, to measure other plans for it; what is faster is kept as by ``comet tune``. None
    measures nothing: which plan runs is then the same in every process."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name), f"CometConfig.{field.name}")

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, object] | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> tuple[CometConfig, dict[str, object]]:
        """Return the configuration and the options that are not comet's, for Inductor."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = _from_environment(fields, environ)
        others: dict[str, object] = {}
        for key, value in (options or {}).items():
            if not key.startswith(_OPTION_PREFIX):
                others[key] = value
                continue
            name = key.removeprefix(_OPTION_PREFIX)
            if name not in fields:
                raise OptionError(_unknown_option(name, list(fields)))
            _check(fields[name], value, f"option {key!r}")
            values[name] = value
        return cls(**values), others

    def fingerprint(self) -> str:
        """Return a digest of every field that a compiled graph depends on."""
        facts = [
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.metadata["changes_graph"]
        ]
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def _from_environment(
    fields: Mapping[str, dataclasses.Field[Any]], environ: Mapping[str, str]
) -> dict[str, Any]:
    """Return the fields that ``COMET_<FIELD>`` sets; an empty variable counts as not set.

    Other ``COMET_*`` names are passed over in silence: they may belong to other software.
    """
    values: dict[str, Any] = {}
    for name, field in fields.items():
        variable = _VARIABLE_PREFIX + name.upper()
        text = environ.get(variable, "").strip()
        if not text:
            continue
        try:
            value = field.metadata["rule"].parse(text)
        except (KeyError, ValueError):
            value = text  # no text is allowed where parsing can fail, so the check reports it
        _check(field, value, f"environment variable {variable}")
        values[name] = value
    return values


def _check(field: dataclasses.Field[Any], value: object, source: str) -> None:
    rule: _Rule = field.metadata["rule"]
    if not rule.check(value):
        raise OptionError(
            f"{source} is {value!r}; allowed: {rule.allowed} (default: {field.default!r})."
        )


def _unknown_option(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    listed = ", ".join(_OPTION_PREFIX + field for field in known)
    return (
        f"unknown option '{_OPTION_PREFIX}{name}'; did you mean '{_OPTION_PREFIX}{nearest}'? "
        f"The comet options are {listed}."
    )
