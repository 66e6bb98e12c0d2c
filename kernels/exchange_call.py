"""One call between ranks, stage by stage: what the fused forward and backward are made of.

    publish -> receive (routing, tables) -> compute_hidden (layer0) -> combine (layer1) -> sum_own

Each stage is a launch or a few; a test runs them rank by rank in one process. The backward adds the
gradients of y to what is published and fetched, and sends two kinds of results back.

Legend: T tokens, C capacity in tokens, A experts per token, P ranks, L local experts, S = P*C*A
slots, R tile rows, H model dim, I expert intermediate dim, N columns of the in-projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from comet_compile.kernels import layer0
from comet_compile.kernels.exchange_entry import ExchangeEntry
from comet_compile.kernels.exchange_kernels import fetch_tokens_kernel
from comet_compile.kernels.exchange_sums import sum_own_kernel
from comet_compile.kernels.expert_weights import view_weight
from comet_compile.kernels.launch import (
    descriptor,
    full_grid,
    launch,
    launch_together,
    power_of_2,
)
from comet_compile.kernels.layer0_exchange import dispatch_gemm_act_kernel
from comet_compile.kernels.layer1 import TRITON_DTYPES
from comet_compile.kernels.layer1_exchange import gemm_combine_kernel


class ExchangeCall(ExchangeEntry):
    """The stages of one call on one rank."""

    def compute_hidden(self, saved_SN: Tensor | None = None) -> Tensor:
        """Return h [R, I]: fetch the peers' tokens, multiply, activate.

        `saved_SN` is given the rows in front of the activation, as by `layer0.gather_gemm_act`. In
        a backward the gradients of the peers' tokens are fetched as well.
        """
        ws, tiles, params, act = (
            self.workspace,
            self.plan.gemms.layer0,
            self.params,
            self.math.activation,
        )
        projection = layer0.view_in_projection(params, act)
        assert projection is not None, "checked by fused.why_not"
        inter = params.w_out.shape[1]
        routing = self.routing
        h_RI = self.x.new_empty(routing.slot_R.shape[0], inter)
        columns = 2 * tiles.block_n if projection.mode == "interleaved" else tiles.block_n
        scaled = self.weights_S is not None and self.math.weight_place != "after"
        first_bias, second_bias = layer0.bias_pointers(params, projection)
        block_h = power_of_2(self.hidden)
        launch_together(
            dispatch_gemm_act_kernel,
            full_grid(tiles.num_programs),
            self.tokens,
            projection.view.descriptor(columns, tiles.block_k),
            descriptor(h_RI, h_RI.shape, h_RI.stride(), (tiles.block_m, tiles.block_n)),
            routing.slot_R,
            routing.expert_M,
            routing.first_row_M,
            routing.num_tiles,
            self.weights_S if scaled else None,
            first_bias,
            second_bias,
            saved_SN,
            0 if saved_SN is None else saved_SN.shape[0],
            routing.arrive if tiles.paced else None,
            0 if params.b_in is None else params.b_in.stride(0),
            0.0 if act.alpha is None else act.alpha,
            0.0 if act.limit is None else act.limit,
            self.order.tile_2M[0],
            self.order.turn_2M[0],
            self.order.lead_2,
            ws.peers,
            self.layout.tokens,
            self.grads,
            self.layout.grads,
            self.ids_S,
            self.num_tokens_P,
            ws.fetched,
            ws.epoch,
            *self.waits,
            ws.rank,
            self.plan.num_fetchers,
            self.capacity,
            ws.trace,
            TOP_K=self.top_k,
            H=self.hidden,
            I=inter,
            BM=tiles.block_m,
            BN=tiles.block_n,
            BK=tiles.block_k,
            GROUP_M=tiles.group_m,
            MODE=projection.mode,
            K_CONTIGUOUS=projection.view.k_contiguous,
            SWAPPED=projection.view.swapped,
            KIND=act.kind,
            GATED=act.gated,
            UP_FIRST=projection.up_first,
            CLAMP=act.limit is not None,
            SCALE=self.math.weight_place if scaled else "",
            L=params.num_experts,
            P=self.num_ranks,
            BT=self.plan.block_tokens,
            BH=block_h,
            ROWS=max(1, 16384 // block_h),
            CLOCK=self.clock,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        return h_RI

    def fetch(self, *, tokens: bool) -> None:
        """Fetch the gradients of the peers' tokens, and the tokens if asked."""
        block_h = power_of_2(self.hidden)
        launch(
            fetch_tokens_kernel,
            full_grid(self.num_sms),
            self.tokens if tokens else None,
            self.layout.tokens,
            self.grads,
            self.layout.grads,
            self.workspace.peers,
            self.ids_S,
            self.num_tokens_P,
            self.workspace.rank,
            self.capacity,
            A=self.top_k,
            L=self.params.num_experts,
            H=self.hidden,
            P=self.num_ranks,
            BT=self.plan.block_tokens,
            BH=block_h,
            ROWS=max(1, 16384 // block_h),
            num_warps=8,
        )

    def combine(self, h_RI: Tensor) -> Tensor:
        """Return the experts' output rows [R, H]; every peer has been sent its tokens' sums."""
        params = self.params
        return self.multiply_and_send(h_RI, params.w_out, None, params.b_out, self.weights_after())

    def multiply_and_send(
        self,
        rows_RK: Tensor,
        first_LKH: Tensor,
        second_LKH: Tensor | None,
        bias_LH: Tensor | None,
        weights_S: Tensor | None,
    ) -> Tensor:
        """Return the products [R, H] of `rows_RK`; peers have the (weighted) sums of their tokens.

        With a second matrix, the rows are those of the first and those of the second, [R, 2K].
        """
        ws, tiles, routing = self.workspace, self.plan.gemms.layer1, self.routing
        out_RH = self.x.new_empty(rows_RK.shape[0], self.hidden)
        view = view_weight(first_LKH)
        second = None if second_LKH is None else view_weight(second_LKH)
        assert second is None or second.k_contiguous == view.k_contiguous, "by view_in_projection"
        launch_together(
            gemm_combine_kernel,
            full_grid(tiles.num_programs),
            descriptor(rows_RK, rows_RK.shape, rows_RK.stride(), (tiles.block_m, tiles.block_k)),
            view.descriptor(tiles.block_n, tiles.block_k),
            None if second is None else second.descriptor(tiles.block_n, tiles.block_k),
            descriptor(out_RH, out_RH.shape, out_RH.stride(), (tiles.block_m, tiles.block_n)),
            out_RH,
            routing.expert_M,
            routing.num_tiles,
            bias_LH,
            0 if bias_LH is None else bias_LH.stride(0),
            self.order.tile_2M[1],
            self.order.lead_2[1:],
            routing.row_S,
            weights_S,
            self.num_tokens_P,
            ws.peers,
            self.layout.sums,
            ws.ARRIVED,
            ws.tasks,
            ws.done,
            ws.sent,
            ws.epoch,
            *self.waits,
            ws.rank,
            self.plan.num_senders,
            self.capacity,
            ws.trace,
            I=first_LKH.shape[1],
            BM=tiles.block_m,
            BN=tiles.block_n,
            BK=tiles.block_k,
            GROUP_M=tiles.group_m,
            FLAT=tiles.flat,
            K_CONTIGUOUS=view.k_contiguous,
            STEPS=4,
            BULK=self.bulk,
            CLOCK=self.clock,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **self._sizes(32 * tiles.num_warps, 32 if tiles.num_warps == 8 else 8),
        )
        return out_RH

    def sum_own(self, rows_RH: Tensor, out_TH: Tensor) -> None:
        """Write y [T, H] and end the call."""
        self.sum_and_end(rows_RH, self.weights_after(), out_TH)

    def sum_and_end(self, rows_RH: Tensor, weights_S: Tensor | None, out_TH: Tensor) -> None:
        """Write the sums [T, H] of this rank's tokens over all ranks, and end the call."""
        ws = self.workspace
        launch(
            sum_own_kernel,
            full_grid(4 * self.num_sms),
            rows_RH,
            self.routing.row_S,
            weights_S,
            self.sums,
            self.own_ids,
            ws.flags(ws.ARRIVED),
            out_TH,
            ws.summed,
            ws.epoch,
            *self.waits,
            self.num_tokens,
            ws.rank,
            self.capacity,
            ws.trace,
            L=self.params.num_experts,
            CLOCK=self.clock,
            num_warps=8,
            **self._sizes(256, 8),
        )

    def weights_after(self) -> Tensor | None:
        """Return the routing weights [S] if they multiply after the experts."""
        return self.weights_S if self.math.weight_place == "after" else None

    def _sizes(self, threads: int, elements: int) -> dict[str, Any]:
        """Constants of the kernels that sum rows, `elements` of a result for each thread."""
        block_h, product = min(8 * threads, power_of_2(self.hidden)), self.math.product_dtype
        return {
            "A": self.top_k,
            "H": self.hidden,
            "P": self.num_ranks,
            "BT": max(1, min(16, elements * threads // block_h)),
            "BH": block_h,
            "PRODUCT": TRITON_DTYPES[torch.float32 if self.grads is not None else product],
        }
