"""Where a user's tables of tuned plans are: ``comet tune`` writes them, `kernels.tuned` reads."""

from __future__ import annotations

from pathlib import Path

__all__ = ["tuned_folder"]


def tuned_folder() -> Path:
    """Return the folder, which need not exist; raises ImportError without platformdirs."""
    import platformdirs

    return platformdirs.user_cache_path("comet_compile") / "tuned"
