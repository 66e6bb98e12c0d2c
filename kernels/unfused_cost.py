"""How long a layer takes that is not fused: what `cost_model` is held against before it is chosen.

The layer as frameworks write it and Inductor compiles it: slots sorted by expert, tokens copied
into that order, two grouped GEMMs of torch with the activation between them, the rows weighted,
brought back and added up::

    time = top-k + sorting + copying rows + GEMM + activation + GEMM + weighting and adding up

Between ranks every slot's row crosses by NCCL, there and back, and waits for the host, which reads
how many go where; behind the first transfer the rows are brought into order once more. Each phase
takes the longer of its products and its bytes, as in the fused layer.

Legend: as in `cost_model`.
"""

from __future__ import annotations

from comet_compile.kernels.cost_model import Load, Machine, Phase, gemm_us, plan_of

# of a slot: counting, sorting and gathering indices
_SLOT_US = 0.7e-3
# times that a row is read or written: into the experts' order, and back with weight and sum
_COPIES, _SUMS = 2.0, 3.5


def predict_unfused(load: Load, machine: Machine) -> list[Phase]:
    """Return the phases of an unfused forward on the busiest rank, in order."""
    most, rows, bandwidth = max(load.tokens), load.busiest_rows, machine.memory_tb * 1e6
    busy, plan = load.busy_experts, plan_of(load, machine)
    row_bytes = 2 * load.hidden
    topk = machine.topk_us + most * load.experts * machine.topk_element_ns * 1e-3
    rate = machine.torch_gemm_tf
    first = gemm_us(plan.layer1, rows, busy, load.hidden, 2 * load.inter, 1, rate, machine)
    second = gemm_us(plan.layer1, rows, busy, load.inter, load.hidden, 1, rate, machine)
    experts = [
        Phase("copy rows", _COPIES * rows * row_bytes / bandwidth, "memory"),
        Phase("GEMM in", *first),
        Phase("activation", 6 * rows * load.inter / bandwidth, "memory"),
        Phase("GEMM out", *second),
    ]
    slots = most * load.top_k
    sort = Phase("sort", machine.unfused_us + slots * _SLOT_US, "latency")
    back = Phase("weight and sum", _SUMS * slots * row_bytes / bandwidth, "memory")
    if load.ranks == 1:
        return [Phase("top-k", topk, "latency"), sort, *experts, back]
    moved = rows * (load.ranks - 1) / load.ranks * row_bytes
    transfer = moved / (machine.nccl_gb * 1e3)
    pack = Phase("copy to send", _COPIES * slots * row_bytes / bandwidth, "memory")
    again = Phase("order again", _COPIES * rows * row_bytes / bandwidth, "memory")
    return [
        Phase("top-k", topk, "latency"),
        sort,
        pack,
        Phase("read splits", machine.host_us, "latency"),
        Phase("dispatch", transfer, "link", transfer, transfer),
        *experts,
        again,
        Phase("combine", transfer, "link", transfer, transfer),
        back,
    ]
