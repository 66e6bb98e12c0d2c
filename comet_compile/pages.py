"""Templates of the package's HTML pages; what they need besides is optional."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["load_template"]


def load_template(name: str, what: str, *needs: str) -> Any:
    """Return a jinja2 template that escapes every value.

    Raises ImportError, which says that `what` needs it, if jinja2 or one of `needs` is missing.
    """
    try:
        import jinja2

        for module in needs:
            importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {error.name}, which is not installed; "
            "run: pip install comet-compile[report]"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("comet_compile", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
