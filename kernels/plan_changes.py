"""Changes of single fields of a plan, and whether a device can run the outcome."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from comet_compile.kernels.plan import Device, GemmTiles, Plan, columns_of, stages_that_fit

# The fields of each GEMM that may change. Rows of a tile and programs are what the tables of a call
# are laid out for, warps what the tiles' registers are.
TILE_FIELDS = {
    "layer0": ("block_n", "num_stages", "group_m", "paced"),
    "layer1": ("block_n", "num_stages", "group_m", "flat"),
    "grad_hidden": ("block_n", "num_stages", "group_m", "paced"),
    "grad_weight": ("num_stages", "store_n"),
}
# of an exchange between ranks
EXCHANGE_FIELDS = ("num_fetchers", "num_senders", "lead")


class PlanChangeError(Exception):
    """A plan cannot be changed so; the message says why."""


def change(plan: Any, changes: Mapping[str, Any], *, gated: bool, device: Device) -> Any:
    """Return `plan` with other fields, by names like ``layer0.group_m`` or ``num_fetchers``.

    `plan` is a `Plan` or an `ExchangePlan`; the tiles of GEMMs have the same names in both. Raises
    PlanChangeError for what may not change, and for what the device could not run.
    """
    gemms: Plan = plan if isinstance(plan, Plan) else plan.gemms
    own: dict[str, Any] = {}
    for name, value in changes.items():
        gemm, _, field = name.partition(".")
        if field in TILE_FIELDS.get(gemm, ()):
            tiles = dataclasses.replace(getattr(gemms, gemm), **{field: value})
            gemms = dataclasses.replace(gemms, **{gemm: tiles})
        elif name in EXCHANGE_FIELDS and plan is not gemms:
            own[name] = value
        else:
            raise PlanChangeError(f"{name!r} is no field that may change")
    for gemm in TILE_FIELDS:
        tiles = getattr(gemms, gemm)
        _check_tiles(gemm, tiles)
        if tiles.num_stages > stages_that_fit(tiles, columns_of(gemm, tiles, gated), device):
            raise PlanChangeError(f"the steps of {gemm} do not fit into shared memory")
    if plan is gemms or isinstance(plan, Plan):
        return gemms
    changed = dataclasses.replace(plan, gemms=gemms, **own)
    _check_exchange(changed, device)
    return changed


def _check_tiles(gemm: str, tiles: GemmTiles) -> None:
    powers = {
        "block_n": (tiles.block_n, 16, 256),
        "store_n": (tiles.block_n if tiles.store_n is None else tiles.store_n, 16, 256),
    }
    for field, (value, least, most) in powers.items():
        power = _is_int(value) and value > 0 and value & (value - 1) == 0
        if not power or not least <= value <= most:
            raise PlanChangeError(
                f"{gemm}.{field} is {value!r}; allowed: powers of 2 from {least} to {most}"
            )
    for field, value, most in (
        ("num_stages", tiles.num_stages, 8),
        ("group_m", tiles.group_m, 64),
    ):
        if not _is_int(value) or not 1 <= value <= most:
            raise PlanChangeError(f"{gemm}.{field} is {value!r}; allowed: 1 to {most}")
    for field, flag in (("paced", tiles.paced), ("flat", tiles.flat)):
        if not isinstance(flag, bool):
            raise PlanChangeError(f"{gemm}.{field} is {flag!r}; allowed: true and false")
    if tiles.paced and tiles.flat:
        raise PlanChangeError(f"{gemm} is both paced and flat; allowed: one of them")


def _check_exchange(plan: Any, device: Device) -> None:
    # the others compute: a CTA that only fetches or sends must leave some
    most = device.num_sms // 2
    for field, least in (("num_fetchers", 1), ("num_senders", 0)):
        value = getattr(plan, field)
        if not _is_int(value) or not least <= value <= most:
            raise PlanChangeError(f"{field} is {value!r}; allowed: {least} to {most}")
    parts = plan.lead
    if (
        not isinstance(parts, tuple)
        or len(parts) != 2
        or not all(isinstance(part, int | float) and 0 <= part <= 1 for part in parts)
    ):
        raise PlanChangeError(f"lead is {parts!r}; allowed: two parts from 0 to 1")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
