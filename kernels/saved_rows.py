"""What a forward keeps for its backward: the rows in front of the activation, as op outputs.

They are the op's own: their order is known to the two directions only, and their memory may be
given back as soon as the backward has read them, while the graph still holds the tensor. So they
leave the op under a dtype that no graph computes in: Inductor, which puts a buffer in the memory of
a dead one of the same dtype and size, must not take memory that may be gone.

Legend: S slots, N columns in front of the activation.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from comet_compile.kernels.path_calls import is_captured

DTYPE = torch.uint16
_MORE_ROWS = 256  # with few tokens a load is seldom balanced


def columns_of(in_columns: int, dtype: torch.dtype) -> int:
    """Return how many columns rows of `in_columns` values have as an output."""
    return in_columns * dtype.itemsize // DTYPE.itemsize


def room_between(num_slots: int, num_ranks: int, save: str) -> int:
    """Return how many rows a rank has room for in an all-to-all layer of so many slots per rank.

    "pre_activation": for the rows of all ranks. "balanced": for a load that is an eighth more than
    its share with two ranks, two eighths with four, three with eight. `num_slots` may be a symbol.
    """
    if save != "balanced":
        return num_slots * num_ranks
    return num_slots + num_slots * (num_ranks - 1).bit_length() // 8 + _MORE_ROWS


def pack(rows: Tensor) -> Tensor:
    """Return rows [S, N] that were made for this as the output [S, columns]."""
    _OWN.add(rows)
    return rows.view(DTYPE)


def unpack(saved: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the rows [S, N] of an output, None if there are none or their memory is gone.

    It is gone in a second backward over the same forward, which computes them again.
    """
    if saved.dim() != 2 or (saved.numel() and not saved.untyped_storage().nbytes()):
        return None
    return saved.view(dtype)


def may_be_freed(rows: Tensor) -> bool:
    """Whether this is the memory that `pack` was given, and not a copy that someone else made.

    While a CUDA graph is captured nothing is freed: its replays find the memory where it was.
    """
    return _OWN.has(rows) and not is_captured(rows.device)


class _OwnStorages:
    """The storages that were packed and are still there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, StorageWeakRef] = {}
        self._next_clearing = 256

    def add(self, tensor: Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        with self._lock:
            # an address is no other storage's while the reference is kept
            self._known[reference.cdata] = reference
            if len(self._known) > self._next_clearing:
                alive = {at: ref for at, ref in self._known.items() if not ref.expired()}
                self._known, self._next_clearing = alive, 2 * len(alive) + 256

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._known


_OWN = _OwnStorages()
