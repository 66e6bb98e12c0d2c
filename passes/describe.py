"""A proven layer in words and numbers, for records and logs."""

from __future__ import annotations

from typing import Any

from comet_compile import records
from comet_compile.kernels.saved_rows import room_between
from comet_compile.passes.graph_view import concrete, numel, val
from comet_compile.passes.prove import Layer
from comet_compile.passes.samples import size_choices


def describe(layer: Layer) -> str:
    pair = layer.candidate.pair
    experts = pair.out.num_experts
    total = experts * layer.form.world.size if layer.form.name != "local" else experts
    capacity = "" if layer.candidate.kept is None else ", tokens beyond a capacity dropped"
    return (
        f"{total} experts, top-{layer.candidate.top_k}, hidden {pair.ins[0].in_features}, "
        f"intermediate {pair.out.in_features}, {layer.activation}, weights {layer.weight_place}"
        f"{capacity}"
    )


def estimate(layer: Layer) -> dict[str, Any]:
    """Work of one forward call at the traced size: slots, FLOPs, bytes sent to other ranks."""
    candidate, pair = layer.candidate, layer.candidate.pair
    rows = _num_slots(layer)
    columns = sum(gemm.out_features for gemm in pair.ins) + pair.out.in_features
    hidden, ranks = pair.ins[0].in_features, layer.form.world.size
    itemsize = val(candidate.x).dtype.itemsize
    sent = 0
    if layer.form.name == "all_to_all":
        sent = 2 * rows * hidden * itemsize * (ranks - 1) // ranks
    elif layer.form.name == "replicated":
        sent = 2 * (rows // candidate.top_k) * hidden * itemsize * (ranks - 1) // ranks
    return {"rows": rows, "flops": 2 * rows * hidden * columns, "bytes_sent": sent}


def bytes_saved(layer: Layer, save: str) -> int:
    """What a forward that saves so has room for at the traced size, beside the layer's inputs."""
    if save == "nothing":
        return 0
    rows = _num_slots(layer)
    if layer.form.shards_tokens:
        rows = room_between(rows, layer.form.world.size, save)
    columns = sum(gemm.out_features for gemm in layer.candidate.pair.ins)
    return rows * columns * val(layer.candidate.x).dtype.itemsize


def _num_slots(layer: Layer) -> int:
    candidate = layer.candidate
    sizes = size_choices(candidate.nodes)[0]
    return concrete(numel(val(candidate.x).shape[:-1]), sizes) * candidate.top_k


def summary(regions: list[records.RegionRecord]) -> str:
    total = len(regions)
    fused = sum(r.status == "fused" for r in regions)
    portable = sum(r.status == "portable" for r in regions)
    verb = f"fused {fused}" if not portable else f"rewrote {fused + portable}"
    notes = [f"{portable} portable"] if portable else []
    reasons = sorted({r.reason for r in regions if r.reason})
    if reasons:
        count = sum(r.status == "rejected" for r in regions)
        notes.append(f"{count} rejected: {', '.join(reasons)}")
    suffix = f" ({'; '.join(notes)})" if notes else ""
    return f"comet: {verb} of {total} MoE regions{suffix}"
