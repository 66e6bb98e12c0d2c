"""Paths of replicated layers: fused with their all-reduce on one machine, else one of NCCL's.

As in `exchange_paths`, everything that decides is known to all ranks alike. Legend: as in `ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from comet_compile.kernels import paths
from comet_compile.kernels.agreement import AGREEMENTS
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.path_calls import (
    fused_replicated,
    links,
    on_device,
    replay,
    tensors_of,
    workspaces,
)
from comet_compile.kernels.portable import Routed


def forward(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    out_dtype: torch.dtype,
    group: dist.ProcessGroup,
    offers: Sequence[str | None],
    number: int,
    save: str,
) -> tuple[Tensor, Tensor]:
    """Return (y [T, H], saved) for tokens that every rank has, experts shared out, ids local.

    `saved` is this rank's, as from `paths.local_forward`. Raises ValueError on all ranks if they
    have different numbers of tokens, where the kernels run.
    """
    found, saves = _find_workspace(routed, out_dtype, group, offers), save != "nothing"
    if found is None:
        y, saved = paths.local_forward(routed, params, math, out_dtype, save=saves, number=number)
        dist.all_reduce(y, group=group)
        return y, saved
    plan, deadline = paths.plan_here(routed, params, math, number), AGREEMENTS.seconds(group)
    with on_device(routed.x.device):
        found.enter()
        y, saved = replay(
            ("replicated_forward", number, out_dtype, saves, deadline),
            (*tensors_of(routed), *tensors_of(params)),
            lambda: fused_replicated().replicated_forward(
                routed, params, math, out_dtype, plan, found, deadline, save=saves
            ),
            found.constants,
        )
        return y, saved


def _find_workspace(
    routed: Routed, out_dtype: torch.dtype, group: dist.ProcessGroup, offers: Sequence[str | None]
) -> Any | None:
    """Return the symmetric memory that a call runs in, None for the path without."""
    if any(offer is not None for offer in offers):
        return None
    x = routed.x
    link = links().link_of(group, x.device)
    if link.board is None:
        return None
    workspaces().raise_if_lost(group)
    tokens = link.board.exchange(x.shape[0], AGREEMENTS.seconds(group))
    if len(set(tokens)) > 1:
        raise ValueError(
            f"comet::moe_layer, form 'replicated': the ranks of process group {group.group_name!r} "
            f"have {tokens} tokens; allowed: the same tokens on every rank, as the model's "
            "all-reduce of them needs. Look for a rank with another batch or sequence length."
        )
    if not fused_replicated().pays(*x.shape, out_dtype.itemsize):
        return None
    layout = workspaces().ReduceLayout.of(*x.shape, group.size(), out_dtype.itemsize)
    return workspaces().workspace_for(layout.num_bytes, group, x.device)
