"""What a compiled graph depends on beside the graph itself: sources, and process groups."""

from __future__ import annotations

import functools
import hashlib
import pathlib
from typing import Any


def group_size(name: Any) -> int | None:
    """The number of ranks of a process group, None if this process has no such group."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    try:
        return int(_resolve_process_group(name).size())
    except (RuntimeError, ValueError, TypeError, KeyError, LookupError):
        return None


@functools.cache
def source_digest() -> str:
    """Hash of every source file that the compiled result depends on."""
    here = pathlib.Path(__file__).resolve().parent
    # installed, `kernels` is a sibling of `passes` in both layouts
    import comet_compile.kernels as kernels

    roots = (here, pathlib.Path(kernels.__file__ or "").resolve().parent)
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def group_facts() -> tuple[tuple[str, int], ...]:
    """Names and sizes of the process groups: group names are constants of a graph, and its proof
    holds for the size that the group had."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return ()
    from torch.distributed.distributed_c10d import _world

    return tuple(sorted((str(name), pg.size()) for pg, name in _world.pg_names.items()))
