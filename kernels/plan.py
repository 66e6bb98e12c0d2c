"""How the fused path runs a layer of a given shape on a given device.

A plan is chosen from facts that the host knows without asking the device: sizes, dtype, layout,
and the device's properties. The rows of an expert are not among them, so a plan goes by their
mean, S / L; it is right for any routing, and fastest for an even one.

Legend: T tokens, A experts per token, S = T*A slots, L experts, H model dim, I expert
intermediate dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

# In-projections that sum over so many K drift apart. Paced, a rank's layer0 takes 7.4 ms instead of
# 13.0 (DeepSeek-V3), 0.73 instead of 0.77 (Qwen3-30B), 5.4 instead of 5.8 (Mixtral; 2 x H100, 8192
# tokens a rank, triton 3.6.0, benchmarks/results/kernels_ep_h100.json).
_PACED_K = 2048
# With rows that come by descriptor CTAs drift less: grad_hidden of 256 columns, flat and unpaced,
# takes 0.62 ms instead of 0.72 (Qwen3-30B, H = 2048), 4.0 instead of 4.5 (Mixtral, 4096; H100, 8192
# tokens, half the experts, benchmarks/results/kernels_backward_h100.json). DeepSeek-V3's 7168 are
# too many for that.
_DRIFTING_K = 4096


@dataclasses.dataclass(frozen=True)
class GemmTiles:
    """The tiling of one grouped GEMM.

    `block_n` counts columns of the result, so a gated in-projection multiplies twice as many.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int
    num_programs: int
    # CTAs wait for those with the tiles beside theirs (`sync.keep_pace`)
    paced: bool = False
    # a CTA's tiles are one loop: it fetches rows of its next tile while it stores this one
    flat: bool = False
    # columns of a tile of grad_weight that are stored at a time, all if None
    store_n: int | None = None

    def num_arrivals(self, num_row_tiles: int, columns: int) -> int:
        """Return how many counters the pacing of at most that many row tiles takes."""
        if not self.paced:
            return 0
        num_tiles = num_row_tiles * -(-columns // self.block_n)
        return -(-num_tiles // self.group_m) + 1  # the order may be in two parts


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tilings of the GEMMs of both directions.

    Those over rows share `block_m`, which the rows are laid out for. The gradients of tokens are
    multiplied as in `layer1`.
    """

    layer0: GemmTiles
    layer1: GemmTiles
    grad_hidden: GemmTiles
    grad_weight: GemmTiles
    # the backward brings tokens and gradients into the experts' order once, in front of its GEMMs
    gathers: bool
    # what chose it: the rules below, the cost model, or a table that was measured (`tuned`)
    source: str = "planned by rule"

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return self.layer0.block_m

    @property
    def num_sms(self) -> int:
        """Multiprocessors of the device planned for."""
        return self.layer0.num_programs

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for reports."""
        return {"path": "fused", "source": self.source, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU."""

    num_sms: int
    shared_bytes: int
    capability: tuple[int, int]
    name: str = ""


@functools.cache
def read_device(index: int) -> Device:
    """Return the properties of CUDA device `index`."""
    properties: Any = torch.cuda.get_device_properties(index)
    return Device(
        num_sms=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,
        capability=(properties.major, properties.minor),
        name=properties.name,
    )


@functools.lru_cache(maxsize=1024)
def choose_plan(
    num_slots: int,
    num_experts: int,
    hidden: int,
    inter: int,
    *,
    gated: bool,
    interleaved: bool,
    device: Device,
) -> Plan:
    """Return the plan for a layer on one device.

    `interleaved` says that the columns of gate and up alternate.
    """
    rows = num_slots / max(1, min(num_experts, num_slots))
    columns = 2 if gated else 1
    if rows > 96:
        block_m, warps = 128, 8
    elif rows > 32:
        block_m, warps = 64, 4
    else:
        # a tile of 16 rows is bound by the weights' bytes, so by how many are in flight
        block_m, warps = 16, 4
    width = 256 if _is_wide(device) else 16 * warps
    layer0 = _tiles(block_m, width // columns, warps, hidden, inter, num_slots, num_experts, device)
    paced = hidden >= _PACED_K and block_m >= 64
    layer0 = dataclasses.replace(layer0, paced=paced)
    layer1 = _tiles(block_m, width, warps, inter, hidden, num_slots, num_experts, device)
    layer1 = dataclasses.replace(layer1, flat=block_m >= 64)
    if gated:
        layer0 = dataclasses.replace(
            layer0, num_stages=choose_stages(layer0, columns_of("layer0", layer0, gated), device)
        )
    # wider, two columns of each would not fit into registers; other devices were not measured
    may_widen = hidden <= _DRIFTING_K and not interleaved and device.capability[0] == 9
    grad_hidden = _grad_hidden(layer0, layer1, inter, 128 if width > 128 else 64, may_widen)
    return Plan(layer0, layer1, grad_hidden, _grad_weight(layer1, device), gathers=True)


def _is_wide(device: Device) -> bool:
    """Whether tiles may have 256 columns, multiplied 64 of K at a time.

    Before sm_90 both operands pass through registers, which that would overflow.
    """
    return device.capability[0] >= 9


def _grad_hidden(
    layer0: GemmTiles, layer1: GemmTiles, inter: int, width: int, may_widen: bool
) -> GemmTiles:
    """Wide and flat, if it may be and wastes few columns; else at most `width` columns.

    Its epilogue moves more bytes than its products do; `flat` has the next tile's rows come
    meanwhile.
    """
    narrow = dataclasses.replace(layer1, block_n=max(64, min(width, layer1.block_n)), flat=False)
    if layer1.block_m < 128:
        return narrow
    if may_widen and layer1.block_n == 256 and -(-inter // 256) * 256 <= 1.05 * inter:
        return dataclasses.replace(layer1, num_stages=min(3, layer1.num_stages), flat=True)
    stages = layer1.num_stages + (1 if layer1.block_n > narrow.block_n else 0)
    return dataclasses.replace(narrow, num_stages=stages, paced=layer0.paced)


def _grad_weight(layer1: GemmTiles, device: Device) -> GemmTiles:
    """The same whatever the rows' tiles are; `block_n` is along the contiguous dim of the result.

    From gathered tokens the copy engine feeds 128 x 256 at 650 TF for Qwen3-30B and 710 for
    Mixtral; DeepSeek-V3's experts have so few rows that storing the tiles leaves 510 (H100, 8192
    tokens, half the experts, benchmarks/results/kernels_backward_h100.json).
    """
    tiles = dataclasses.replace(
        layer1,
        block_m=128,
        block_n=256 if _is_wide(device) else 128,
        block_k=64 if _is_wide(device) else 32,
        num_warps=8,
        flat=False,
    )
    if device.capability[0] != 9:
        stages = choose_stages(tiles, tiles.block_n, device)
        return dataclasses.replace(tiles, num_stages=min(3, stages))
    # what smaller stores leave of shared memory holds one step more of the next tile; other devices
    # have no registers left to cut a tile in parts
    tiles = dataclasses.replace(tiles, store_n=64)
    return dataclasses.replace(tiles, num_stages=choose_stages(tiles, tiles.block_n, device))


def _tiles(
    block_m: int,
    block_n: int,
    num_warps: int,
    k: int,
    n: int,
    num_slots: int,
    num_experts: int,
    device: Device,
) -> GemmTiles:
    # Few rows leave few tiles: narrower ones, so that every multiprocessor has some.
    experts = min(num_experts, max(1, num_slots))
    row_tiles = experts + num_slots // block_m
    while block_n > 32 and row_tiles * -(-n // block_n) < 2 * device.num_sms:
        block_n //= 2
    tiles = GemmTiles(
        block_m=block_m,
        block_n=block_n,
        block_k=64 if block_m < 64 or _is_wide(device) else 32,
        num_warps=num_warps,
        num_stages=1,
        group_m=8,
        num_programs=device.num_sms,
    )
    return dataclasses.replace(tiles, num_stages=choose_stages(tiles, block_n, device))


def choose_stages(tiles: GemmTiles, columns: int, device: Device) -> int:
    """Return how many steps of the K loop to have in flight: more than these gain nothing."""
    most = 4 if tiles.block_m >= 64 else 6
    return max(2, min(most, stages_that_fit(tiles, columns, device)))


def stages_that_fit(tiles: GemmTiles, columns: int, device: Device) -> int:
    """Return how many steps of the K loop fit into shared memory beside the stored tile.

    `columns` are those that are multiplied (`columns_of`).
    """
    per_stage = (tiles.block_m + columns) * tiles.block_k * 2
    stored = tiles.block_m * (tiles.store_n or tiles.block_n) * 2
    return (device.shared_bytes - stored - 2048) // per_stage


def columns_of(gemm: str, tiles: GemmTiles, gated: bool) -> int:
    """Return how many columns a step of a GEMM of the plan multiplies."""
    return tiles.block_n * (2 if gemm == "layer0" and gated else 1)
