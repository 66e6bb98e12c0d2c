"""The old place of :mod:`comet_compile.explainer`.

Importing this module by itself makes ``comet_compile.explain`` the module instead of the function,
so nothing in the package does.
"""

from comet_compile.explainer import explain

__all__ = ["explain"]
