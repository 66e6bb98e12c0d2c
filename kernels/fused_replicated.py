"""The fused path of the replicated form: each rank's own experts on all tokens, then all-reduce.

    tables -> layer0 -> layer1 (GEMM + all-reduce over symmetric memory, columns block by block)

Rows of experts that live elsewhere are neither gathered nor multiplied. As in `fused_exchange`
there is no host read and no collective, so a CUDA graph can hold a call.

Legend: T tokens, A experts per token, S = T*A slots, O tokens of an owner, P ranks, R tile rows,
H model dim, I expert intermediate dim, N columns of the in-projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comet_compile.kernels.expert_weights import view_weight
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.fused import compute_hidden, with_dense_biases
from comet_compile.kernels.launch import descriptor, div_up, full_grid, launch_together
from comet_compile.kernels.layer1 import TRITON_DTYPES
from comet_compile.kernels.layer1_all_reduce import MORE_STEPS, gemm_all_reduce_kernel
from comet_compile.kernels.plan import Plan, read_device
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.workspace import MAX_COLUMN_BLOCKS, ReduceLayout, Workspace

# Columns of a block are a multiple of this, the widest tile.
_COLUMNS = 256
# Most smaller results NCCL adds up faster (benchmarks/results/all_reduce_h100.json).
_MIN_BYTES = 1 << 24


def pays(num_tokens: int, hidden: int, itemsize: int) -> bool:
    """Return whether a result is large enough for layer1 to keep up with NCCL's all-reduce."""
    return num_tokens * hidden * itemsize >= _MIN_BYTES


def column_width(hidden: int) -> int:
    """Return the columns of a block of the all-reduce, the same on all ranks."""
    return div_up(div_up(hidden, MAX_COLUMN_BLOCKS), _COLUMNS) * _COLUMNS


def replicated_forward(
    routed: Routed,
    params: ExpertParams,
    math: LayerMath,
    out_dtype: torch.dtype,
    plan: Plan,
    workspace: Workspace,
    deadline: float,
    *,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Return (y [T, H] in `out_dtype`, the same bits on all ranks, and what `local_forward` saves).

    `routed` has at least one token, and as many on every rank; its ids are local, strays those of
    other ranks' experts. `deadline` is in seconds.
    """
    call = ReplicatedCall(routed, params, math, out_dtype, plan, workspace, deadline, save=save)
    call.reduce(0, call.num_steps)
    return call.y_TH, call.hidden.saved_SN


class ReplicatedCall:
    """One call on one rank, layer0 done."""

    def __init__(
        self,
        routed: Routed,
        params: ExpertParams,
        math: LayerMath,
        out_dtype: torch.dtype,
        plan: Plan,
        workspace: Workspace,
        deadline: float,
        *,
        save: bool = False,
        width: int | None = None,
        clock: bool = True,
    ) -> None:
        self.params = with_dense_biases(params)
        self.math, self.plan, self.workspace = math, plan, workspace
        self.clock = clock
        # before sm_90 a CTA stores its tiles itself
        self.bulk = clock and read_device(routed.x.device.index or 0).capability >= (9, 0)
        self.deadline = int(deadline * 1e9) if clock else 1000
        self.num_tokens, self.top_k = routed.ids.shape
        num_hidden = params.w_in.shape[1]
        self.width = width or column_width(num_hidden)
        self.num_blocks = div_up(num_hidden, self.width)
        self.num_steps = self.num_blocks + MORE_STEPS
        self.layout = ReduceLayout.of(
            self.num_tokens, num_hidden, workspace.num_ranks, out_dtype.itemsize
        )
        self.hidden = compute_hidden(routed, self.params, math, plan, save=save)
        self.rows_RH = routed.x.new_empty(self.hidden.h_RI.shape[0], num_hidden)
        self.y_TH = routed.x.new_empty(self.num_tokens, num_hidden, dtype=out_dtype)

    def reduce(self, first_step: int, end_step: int) -> None:
        """Run these steps of `layer1_all_reduce`, all of them in one launch but for tests."""
        ws, tiles, routing = self.workspace, self.plan.layer1, self.hidden.routing
        h_RI, rows_RH, bias_LH = self.hidden.h_RI, self.rows_RH, self.params.b_out
        num_hidden, threads = rows_RH.shape[1], 32 * tiles.num_warps
        view = view_weight(self.params.w_out)
        # a power of two that divides the width
        block_h = min(8 * threads, self.width & -self.width)
        # before sm_90 registers are scarce: a flattened GEMM takes fewer, a sum of fewer rows too
        flat, elements = (False, 32) if self.bulk else (tiles.flat, 8)
        launch_together(
            gemm_all_reduce_kernel,
            full_grid(tiles.num_programs),
            descriptor(h_RI, h_RI.shape, h_RI.stride(), (tiles.block_m, tiles.block_k)),
            view.descriptor(tiles.block_n, tiles.block_k),
            descriptor(rows_RH, rows_RH.shape, rows_RH.stride(), (tiles.block_m, tiles.block_n)),
            rows_RH,
            routing.expert_M,
            routing.num_tiles,
            bias_LH,
            0 if bias_LH is None else bias_LH.stride(0),
            routing.row_S,
            self.hidden.weights_TA if self.math.weight_place == "after" else None,
            self.y_TH,
            ws.peers,
            self.layout.parts,
            self.layout.sums,
            ws.READY,
            ws.PARTS,
            ws.SUMS,
            ws.reduce_counters,
            ws.epoch,
            ws.abort,
            ws.message,
            self.deadline,
            self.num_tokens,
            div_up(self.num_tokens, ws.num_ranks),
            ws.rank,
            first_step,
            end_step,
            A=self.top_k,
            H=num_hidden,
            I=h_RI.shape[1],
            BM=tiles.block_m,
            BN=tiles.block_n,
            BK=tiles.block_k,
            GROUP_M=tiles.group_m,
            FLAT=flat,
            K_CONTIGUOUS=view.k_contiguous,
            WIDTH=self.width,
            NUM_BLOCKS=self.num_blocks,
            P=ws.num_ranks,
            BT=max(1, min(16, elements * threads // block_h)),
            BH=block_h,
            PRODUCT=TRITON_DTYPES[self.math.product_dtype],
            BULK=self.bulk,
            CLOCK=self.clock,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
