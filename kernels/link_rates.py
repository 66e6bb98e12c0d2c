"""How fast CTAs copy between this GPU's memory and a peer's: what the cost model knows of links."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from comet_compile.kernels.exchange_kernels import peer_pointer
from comet_compile.kernels.launch import full_grid, launch

BLOCK = 8192
_WARPS = 8


def copy_peer(
    own: Tensor, peers: int, peer: int, offset: int, num_ctas: int, *, push: bool
) -> None:
    """Copy `own` (bfloat16, a multiple of BLOCK elements) to or from byte `offset` of the peer's
    buffer, by `num_ctas` CTAs.

    `peers`: the address of the table of the ranks' buffers, as `Workspace.peers`.
    """
    assert own.numel() % BLOCK == 0
    launch(
        copy_peer_kernel,
        full_grid(num_ctas),
        own,
        peers,
        peer,
        offset,
        own.numel() // BLOCK,
        BLOCK=BLOCK,
        PUSH=push,
        num_warps=_WARPS,
    )


@triton.jit
def copy_peer_kernel(
    own_ptr,
    peers_ptr,
    peer,
    offset,
    num_blocks,
    BLOCK: tl.constexpr,
    PUSH: tl.constexpr,
):
    """Grid: any number of programs, each taking every num_programs-th block of BLOCK elements."""
    remote = peer_pointer(peers_ptr, peer, offset, own_ptr.dtype.element_ty)
    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        if PUSH:
            tl.store(remote + offs, tl.load(own_ptr + offs))
        else:
            tl.store(own_ptr + offs, tl.load(remote + offs))
