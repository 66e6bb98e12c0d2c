"""What a case runs: one callable per baseline over shared weights and inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from comet_compile import records
from moe_bench.shapes import Case


@dataclasses.dataclass
class Workload:
    """A layer or model with its inputs, in one mode.

    `functions` has a callable per baseline that is not made by compiling `layer`; `inputs` are
    handed to each unless `inputs_of` names others. `grad_out` ([T, H], or None for a scalar
    loss) starts the backward of mode "train", `leaves` receive gradients. `errors` compares
    what a run returned, and the gradients that it left behind, with float32. Every forward, the
    one that compiles included, is inside `context`. With `fullgraph`, what does not compile as one
    graph fails.
    """

    case: Case
    mode: str
    layer: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    leaves: list[Tensor]
    errors: Callable[[Tensor], dict[str, float]]
    functions: dict[str, Callable[..., Tensor]] = dataclasses.field(default_factory=dict)
    inputs_of: dict[str, tuple[Tensor, ...]] = dataclasses.field(default_factory=dict)
    grad_of: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    grad_out: Tensor | None = None
    has_reference: Callable[[str], bool] = lambda baseline: baseline != "gemms"
    flops: float = 0.0
    why_portable: Callable[[], str | None] | None = None
    host_splits: bool = False
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    fullgraph: bool = False

    @property
    def train(self) -> bool:
        """Whether a run is forward and backward."""
        return self.mode == "train"

    def supports(self, baseline: str) -> bool:
        """Whether the baseline has a meaning for this workload."""
        return baseline in self.functions or baseline not in ("gemms", "comet-op")

    def path(self, candidate: Candidate) -> str:
        """Return which path comet's operator takes when `candidate` runs, as far as is known."""
        rewritten = [r for r in candidate.regions if r["status"] != "rejected"]
        if not rewritten and candidate.baseline != "comet-op":
            return "not rewritten"
        if self.why_portable is None:
            if candidate.environ:
                return "portable: COMET_PORTABLE is set"
            return " and ".join(sorted({str(r["status"]) for r in rewritten}))
        with variables(candidate.environ):
            reason = self.why_portable()
        return "fused" if reason is None else f"portable: {reason}"

    def why_no_graph(self, candidate: Candidate) -> str | None:
        """Return why a CUDA graph of `candidate` is not tried, None if it is."""
        if not self.host_splits or candidate.baseline == "gemms":
            return None
        fused = candidate.regions and all(r["status"] == "fused" for r in candidate.regions)
        return None if fused else "reads splits on the host"


@dataclasses.dataclass
class Candidate:
    """One baseline, ready to run."""

    baseline: str
    workload: Workload
    function: Callable[..., Tensor]
    environ: dict[str, str] = dataclasses.field(default_factory=dict)
    regions: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def before(self) -> None:
        """Drop gradients; not timed."""
        for leaf in self.workload.leaves:
            leaf.grad = None

    def run(self) -> Tensor:
        """Run forward, or forward and backward, once."""
        load = self.workload
        inputs = load.inputs_of.get(self.baseline, load.inputs)
        with variables(self.environ), torch.set_grad_enabled(load.train):
            with load.context():
                out = self.function(*inputs)
            if load.train:
                out.backward(load.grad_of.get(self.baseline, load.grad_out))
        return out.detach()


@contextlib.contextmanager
def variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables inside the block."""
    if not values:
        yield
        return
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def recorded(candidate: Candidate) -> Iterator[None]:
    """Keep how comet's regions ended; no compile cache may hand back code without the pass."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    with (
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
        records.collect() as graphs,
    ):
        try:
            yield
        finally:
            candidate.regions = [_region(r) for graph in graphs for r in graph.regions]


def make_candidate(baseline: str, workload: Workload, ready: dict[str, Candidate]) -> Candidate:
    """Return the baseline's candidate; compiled code is made by its first run."""
    if baseline in workload.functions:
        return Candidate(baseline, workload, workload.functions[baseline])
    if baseline == "eager":
        return Candidate(baseline, workload, workload.layer)
    compiled = functools.partial(torch.compile, workload.layer, fullgraph=workload.fullgraph)
    if baseline == "inductor":
        return Candidate(baseline, workload, compiled(backend="inductor"))
    if baseline == "inductor-max-autotune":
        mode = "max-autotune-no-cudagraphs"
        return Candidate(baseline, workload, compiled(mode=mode))
    if baseline == "comet-portable":
        # The path is chosen at run time, so one compilation serves both.
        if "comet" in ready:
            function, regions = ready["comet"].function, ready["comet"].regions
        else:
            function, regions = compiled(backend="comet"), []
        environ = {"COMET_PORTABLE": "1"}
        return Candidate(baseline, workload, function, environ, regions)
    return Candidate(baseline, workload, compiled(backend="comet"))


def _region(region: records.RegionRecord) -> dict[str, Any]:
    return {
        "status": region.status,
        "family": region.family,
        "reason": region.reason,
        "detail": region.detail,
        "backward": region.backward,
        "plan": {key: str(value) for key, value in region.plan.items()},
    }
