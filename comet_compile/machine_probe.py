"""``comet doctor --measure``: the numbers of this machine that the cost model plans with.

On one GPU: layers of different sizes, forward and backward, from which rates and latencies are
fitted (`machine_fit`), top-k, and the same layers on torch's operators, one by one: what a layer
that is not fused runs on here. (An H100's built-in numbers of unfused layers are Inductor's.)
Between ranks, started by torchrun, also how fast CTAs copy over the links, NCCL, and what a call
between ranks takes besides. Times are the device's (`time_us`).
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from comet_compile import machine_fit
from comet_compile.kernels import link_rates, machine_file
from comet_compile.kernels.backward_cost import predict_backward
from comet_compile.kernels.cost_model import H100, Load, Machine, predict
from comet_compile.kernels.plan import Device, read_device
from comet_compile.kernels.unfused_cost import predict_unfused
from comet_compile.kernels.workspace import workspace_for
from comet_compile.machine_fit import Observation
from comet_compile.tuning_file import head, write_whole
from comet_compile.tuning_layer import LayerSize, TunedLayer, make_layer, median_us

__all__ = ["measure_and_keep", "measure_machine", "write_machine"]

Say = Callable[[str], None]

# hidden, inter, experts, top-k, tokens: products and memory as the limit, many and few experts
_LAYERS = (
    (2048, 768, 64, 8, 8192),
    (4096, 14336, 4, 2, 8192),
    (7168, 2048, 32, 8, 4096),
    (2048, 1024, 64, 8, 2048),
    (2048, 768, 128, 8, 64),
    (2048, 768, 128, 8, 1),
)
# of a rank: calls that are all latency, and calls that move much
_EXCHANGES = ((2048, 768, 32, 8, 64), (2048, 768, 64, 8, 1024), (2048, 768, 64, 8, 8192))
_PULLS = (8, 16, 24, 32, 64)
_PUSHES = (4, 8, 12, 64)  # and as many as there are multiprocessors
_COPIED = 64 * 2**20
_TOPK = (1, 16384, 128, 8)
"""Fewest and most tokens, experts, top-k."""
# what is fitted to layers of each kind, one after the other
_FITTED: dict[Any, Sequence[str | tuple[str, ...]]] = {
    predict: machine_fit.FORWARD,
    # whole backwards do not tell the two apart: their products are in a fixed ratio
    predict_backward: [machine_fit.BACKWARD],
    predict_unfused: machine_fit.UNFUSED,
}


def measure_machine(group: Any, device: Device, say: Say) -> tuple[Machine, float]:
    """Return this machine and the median error with which the model then predicts what was
    measured; of several ranks all return the same."""
    rows = _observe(say)
    start = dataclasses.replace(H100, name=device.name, device=device, **_topk())
    machine = start
    for model, fields in _FITTED.items():
        machine = machine_fit.descend([row for row in rows if row.model is model], fields, machine)
    if group is not None and group.size() > 1:
        machine = dataclasses.replace(
            machine, **_links(group, device.num_sms, say), **_nccl(group, say)
        )
        linked = _observe_exchanges(group, say)
        machine = machine_fit.descend(linked, machine_fit.LINKED, machine)
        rows += linked
    return machine, machine_fit.median_error(rows, machine)


def measure_and_keep(group: Any) -> bool:
    """Measure, write what was found into the cache directory, and say so; whether this is rank 0.

    Raises ImportError without platformdirs, OSError where the file cannot be written.
    """
    device = read_device(torch.cuda.current_device())
    path = machine_file.machine_path(device)
    is_first = group is None or group.rank() == 0
    console = Console(quiet=not is_first)
    machine, error = measure_machine(group, device, lambda text: console.print(f"measuring {text}"))
    if is_first:
        write_machine(machine, error, 1 if group is None else group.size(), path, device)
    console.print(
        f"the cost model predicts what was measured within {100 * error:.1f} % (median); "
        f"kept in {path}",
        soft_wrap=True,
    )
    return is_first


def write_machine(machine: Machine, error: float, ranks: int, path: Path, device: Device) -> None:
    """Write a machine as `machine_file` reads it, whole or not at all. Raises OSError."""
    values = dataclasses.asdict(machine)
    names = [*machine_file.NUMBERS, *(machine_file.LINKS if ranks > 1 else ())]
    if ranks == 1:
        names = [name for name in names if name not in ("sync_us", "nccl_gb")]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(
        path,
        {
            **head(device),
            "format": machine_file.FORMAT,
            "machine": {name: values[name] for name in names},
            "ranks": ranks,
            "median_error": round(error, 4),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "command": shlex.join(["comet", *sys.argv[1:]]),
        },
    )


def _observe(say: Say) -> list[Observation]:
    """Return what layers on this GPU take, both directions; of several ranks the slowest counts."""
    found = []
    for sizes in _LAYERS:
        say(f"a layer of {_describe(sizes)}")
        hidden, inter, experts, top_k, tokens = sizes
        load = Load(hidden, inter, experts, top_k, (tokens,))
        for backward in (False, True):
            if backward and tokens < 2048:
                continue  # latencies, which the forwards tell
            layer = make_layer(LayerSize(*sizes), None, backward=backward)
            model = predict_backward if backward else predict
            found.append(Observation(load, median_us(layer), model=model))
            if not backward and layer.run_layer0 is not None:
                first = dataclasses.replace(layer, run=layer.run_layer0)
                found.append(Observation(load, median_us(first), ("tables", "layer0")))
            if not backward and layer.run_unfused is not None:
                unfused = dataclasses.replace(layer, run=layer.run_unfused)
                found.append(Observation(load, median_us(unfused), model=predict_unfused))
            del layer
            torch.cuda.empty_cache()
    return found


def _observe_exchanges(group: Any, say: Say) -> list[Observation]:
    found = []
    for sizes in _EXCHANGES:
        say(f"between ranks, a layer of {_describe(sizes)}")
        hidden, inter, experts, top_k, tokens = sizes
        load = Load(hidden, inter, experts * group.size(), top_k, (tokens,) * group.size())
        layer = make_layer(LayerSize(*sizes), group, backward=False)
        found.append(Observation(load, median_us(layer)))
    return found


def _topk() -> dict[str, Any]:
    """Return what softmax and top-k take: fixed, and per score."""
    few, many, experts, top_k = _TOPK
    times = []
    for tokens in (few, many):
        scores = torch.randn(tokens, experts, device="cuda")

        def choose(_: Any, scores: torch.Tensor = scores) -> tuple[torch.Tensor, ...]:
            return tuple(torch.topk(scores.softmax(-1), top_k))

        times.append(median_us(TunedLayer(None, choose)))
    per_score = max(1e-3, 1e3 * (times[1] - times[0]) / ((many - few) * experts))
    return {"topk_us": times[0], "topk_element_ns": per_score}


def _links(group: Any, num_sms: int, say: Say) -> dict[str, Any]:
    """Return GB/s by the number of CTAs, all ranks copying from or to the next one at once."""
    device = torch.device("cuda", torch.cuda.current_device())
    offset = 2**20  # behind the flags
    workspace = workspace_for(offset + _COPIED, group, device)
    own = torch.empty(_COPIED // 2, dtype=torch.bfloat16, device=device)
    peer = (group.rank() + 1) % group.size()
    pushes = sorted({*_PUSHES, num_sms})
    rates: dict[str, Any] = {}
    for name, numbers, push in (("pull_gb", _PULLS, False), ("push_gb", pushes, True)):
        say(f"links, {'pushing' if push else 'pulling'}")
        found = []
        for num_ctas in numbers:

            def copy(_: Any, num_ctas: int = num_ctas, push: bool = push) -> tuple[()]:
                link_rates.copy_peer(own, workspace.peers, peer, offset, num_ctas, push=push)
                return ()

            found.append((num_ctas, round(_COPIED / median_us(TunedLayer(None, copy)) / 1e3, 1)))
        rates[name] = tuple(found)
    return rates


def _nccl(group: Any, say: Say) -> dict[str, Any]:
    """Return GB/s of an even all-to-all, in each direction."""
    say("NCCL's all-to-all")
    sent = torch.empty(_COPIED // 2, dtype=torch.bfloat16, device="cuda")
    received = torch.empty_like(sent)

    def exchange(_: Any) -> tuple[()]:
        dist.all_to_all_single(received, sent, group=group)
        return ()

    moved = _COPIED * (group.size() - 1) / group.size()
    return {"nccl_gb": round(moved / median_us(TunedLayer(None, exchange)) / 1e3, 1)}


def _describe(sizes: Sequence[int]) -> str:
    hidden, inter, experts, top_k, tokens = sizes
    return f"{experts} experts of {hidden} x {inter}, top-{top_k}, {tokens} tokens"
