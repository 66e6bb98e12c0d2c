"""Compile a frame that is called with empty inputs for any size, not for the size zero.

Dynamo makes sizes of 0 and 1 constants. A rank without a token would get a graph in which its
number of tokens is the literal 0: the layer in it cannot be told from other code, so that rank
alone would leave the layer as it was, while its peers wait for it at their first handshake. For
such a frame every input size stays a symbol, and no branch is taken on whether it is 0 or 1
(torch calls the sizes "backed, size-oblivious"). Python floats stay constants, as in the peers'
graphs: an activation whose slope enters as an input could not be told. Graphs of other frames are
what they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch._dynamo.config
import torch.distributed as dist
import torch.fx.experimental._config
from torch.utils import _pytree as pytree


def among(frame_locals: Mapping[str, object]) -> bool:
    """Whether a frame holds an empty batch and has peers whose batches need not be empty.

    An empty batch is a tensor of two or more dims without an element.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    leaves = pytree.tree_leaves(dict(frame_locals))
    return any(
        isinstance(leaf, torch.Tensor) and leaf.dim() >= 2 and leaf.numel() == 0 for leaf in leaves
    )


@contextlib.contextmanager
def kept_symbolic() -> Iterator[None]:
    """Trace and compile what is inside with every input size a symbol that may be zero."""
    with (
        torch._dynamo.config.patch(assume_static_by_default=False, specialize_float=True),
        torch.fx.experimental._config.patch(backed_size_oblivious=True),
    ):
        yield
