"""How long a fused backward takes: `cost_model` for the other direction, rows kept by the forward.

    time = tables + bringing gradients and tokens into the experts' order
         + gradients of the hidden rows, of both matrices, of the tokens' rows + their sums

The kernel of the hidden rows' gradients takes the time of its products and of its bytes, one after
the other: its epilogue reads the kept rows and writes twice as many. A tile of the matrices'
gradients is as many steps as its expert has rows, and is written whole. Between ranks, tokens and
gradients are published and fetched before, by all multiprocessors, and the tokens' gradients are
sent back as sums are in the forward.

Legend: as in `cost_model`; R rows of the busiest rank.
"""

from __future__ import annotations

from comet_compile.kernels.cost_model import (
    Load,
    Machine,
    Phase,
    exchange_tables_us,
    gemm_us,
    plan_of,
    rate_at,
)


def predict_backward(load: Load, machine: Machine) -> list[Phase]:
    """Return the phases of a backward that gives all gradients, on the busiest rank, in order."""
    plan, rows, busy = plan_of(load, machine), load.busiest_rows, load.busy_experts
    most, bandwidth, row_bytes = max(load.tokens), machine.memory_tb * 1e6, 2 * load.hidden
    # rows of padding are cleared, half a tile of every expert
    padded = rows + 0.5 * plan.block_m * busy
    arrange = 2 * (padded + most) * row_bytes / bandwidth
    inner = gemm_us(
        plan.layer1, rows, busy, 2 * load.inter, load.hidden, 1, machine.row_gemm_tf, machine
    )
    first = [*_hidden(load, machine), *_matrices(load, machine)]
    if load.ranks == 1:
        tables = 2 + most * load.top_k * 0.15e-3
        sums = (rows + most) * row_bytes / bandwidth
        return [
            Phase("tables", tables, "latency"),
            Phase("arrange", arrange, "memory"),
            *first,
            Phase("tokens", *inner),
            Phase("sums", sums, "memory"),
        ]
    publish = 5 + 4 * most * row_bytes / bandwidth
    fetch = 2 * load.moved_bytes / (rate_at(machine.pull_gb, machine.device.num_sms) * 1e3)
    push = load.moved_bytes / (rate_at(machine.push_gb, machine.device.num_sms) * 1e3)
    reduced = rows * (load.ranks - 1) / load.ranks * row_bytes / bandwidth
    sending = max(reduced, push)
    sums = most * (load.top_k / load.ranks + load.ranks) * row_bytes / bandwidth
    return [
        Phase("publish", publish, "memory"),
        Phase("tables", exchange_tables_us(load, machine, plan), "latency"),
        Phase("fetch", fetch, "link", fetch, fetch),
        Phase("arrange", arrange, "memory"),
        *first,
        Phase("tokens + send", inner[0] + sending, inner[1], push, sending),
        Phase("sums", sums, "memory"),
    ]


def _hidden(load: Load, machine: Machine) -> list[Phase]:
    rows = load.busiest_rows
    products = 2 * rows * load.hidden * load.inter / _sm_rate(machine, machine.hidden_gemm_tf)
    columns = load.hidden + 5 * load.inter  # gradients, kept rows and theirs, h times its weight
    moved = 2.0 * (rows * columns + load.busy_experts * load.hidden * load.inter)
    memory = moved / (machine.memory_tb * 1e6)
    bound = "products" if products > memory else "memory"
    return [Phase("hidden rows", products + memory, bound)]


def _matrices(load: Load, machine: Machine) -> list[Phase]:
    block = plan_of(load, machine).block_m
    per_expert = load.busiest_rows / max(load.busy_experts, 1e-9)
    row_tiles = max(1.0, per_expert / block + 0.5)
    steps = load.busy_experts * block * row_tiles
    rate = _sm_rate(machine, machine.weight_gemm_tf)
    phases = []
    for name, columns in (("w_out", load.inter), ("w_in", 2 * load.inter)):
        products = 2 * steps * load.hidden * columns / rate
        memory = 2.0 * load.experts / load.ranks * load.hidden * columns / machine.memory_tb / 1e6
        longer, shorter = max(products, memory), min(products, memory)
        bound = "products" if products > memory else "memory"
        phases.append(Phase(name, longer + machine.hide * shorter, bound))
    return phases


def _sm_rate(machine: Machine, tf_of_sm: float) -> float:
    """Flops of all multiprocessors in a microsecond."""
    return tf_of_sm * machine.device.num_sms * 1e6
