"""A proven layer in words and numbers, for records and logs."""

from __future__ import annotations

from typing import Any

from comet_compile import records
from comet_compile.passes.graph_view import concrete, numel, val
from comet_compile.passes.prove import Layer
from comet_compile.passes.samples import size_choices


def describe(layer: Layer) -> str:
    pair = layer.candidate.pair
    experts = pair.out.num_experts
    total = experts * layer.form.world.size if layer.form.name != "local" else experts
    return (
        f"{total} experts, top-{layer.candidate.top_k}, hidden {pair.ins[0].in_features}, "
        f"intermediate {pair.out.in_features}, {layer.activation}, weights {layer.weight_place}"
    )


def estimate(layer: Layer, save: str) -> dict[str, Any]:
    """Work of one forward call at the traced size: slots, FLOPs, bytes sent to other ranks, and
    bytes kept for the backward beside the layer's own inputs.
    """
    candidate, pair = layer.candidate, layer.candidate.pair
    sizes = size_choices(candidate.nodes)[0]
    rows = concrete(numel(val(candidate.x).shape[:-1]), sizes) * candidate.top_k
    columns = sum(gemm.out_features for gemm in pair.ins) + pair.out.in_features
    hidden, ranks = pair.ins[0].in_features, layer.form.world.size
    itemsize = val(candidate.x).dtype.itemsize
    sent = 0
    if layer.form.name == "all_to_all":
        sent = 2 * rows * hidden * itemsize * (ranks - 1) // ranks
    elif layer.form.name == "replicated":
        sent = 2 * (rows // candidate.top_k) * hidden * itemsize * (ranks - 1) // ranks
    saved = 0
    if save == "pre_activation":
        saved = rows * sum(gemm.out_features for gemm in pair.ins) * itemsize
    flops = 2 * rows * hidden * columns
    return {"rows": rows, "flops": flops, "bytes_sent": sent, "bytes_saved": saved}


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
