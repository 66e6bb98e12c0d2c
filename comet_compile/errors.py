"""What comet_compile raises and warns.

A region that is not rewritten is never an error: it is a refusal, counted and shown by `explain`.
Errors are kept for what the user can mend (options), for ranks that disagree, and for peers that
do not answer. Every message says what is wrong, what was given, what is allowed and what to do.
"""

from __future__ import annotations

__all__ = [
    "CometError",
    "CometWarning",
    "CorrectnessWarning",
    "OptionError",
    "PeerTimeoutError",
    "PlanMismatchError",
]


class CometError(Exception):
    """Base class of everything this package raises on purpose."""


class OptionError(CometError, ValueError):
    """An option or environment variable is unknown, or its value is not allowed."""


class PlanMismatchError(CometError, RuntimeError):
    """Ranks of one process group compiled different plans for the same MoE layer."""


class PeerTimeoutError(CometError, RuntimeError):
    """A rank did not answer before the deadline."""


class CometWarning(UserWarning):
    """Base class of the package's warnings: something asked for is not going to happen."""


class CorrectnessWarning(CometWarning):
    """The model itself computes something wrong, with or without comet_compile."""
