"""The joint-graph pass: every MoE layer of a graph is found, proven, and replaced or refused.

Contract: a `CustomGraphPass`. Deterministic, idempotent, and a function of facts that all ranks
share (the graph, group sizes, options); it communicates nothing. A graph without expert GEMMs is
left after one look at its nodes.

Per region: find -> prove (forward) -> prove (backward) -> check that it can die -> replace.
Each step can only turn the region into a refusal with a reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils._python_dispatch import _disable_current_modes

from comet_compile import records
from comet_compile._version import __version__
from comet_compile.config import CometConfig
from comet_compile.errors import CometError
from comet_compile.kernels import ops as _ops  # noqa: F401, registers torch.ops.comet.*
from comet_compile.kernels import paths
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.portable import Routed
from comet_compile.passes import expert_gemms, find, loops, pictures
from comet_compile.passes.arguments import emit_arguments
from comet_compile.passes.backward import Gradients, Matches, find_gradients
from comet_compile.passes.describe import bytes_saved, describe, estimate, summary
from comet_compile.passes.graph_view import backward_nodes, source_line, val
from comet_compile.passes.identity import group_facts, group_size, source_digest
from comet_compile.passes.memo import region_key, roles_of, scores_key
from comet_compile.passes.prove import Layer, prove, weighting
from comet_compile.passes.ranges import are_distinct, interval
from comet_compile.passes.reasons import Rejection, RejectReason, more_telling
from comet_compile.passes.region import Candidate, ExpertPair
from comet_compile.passes.rewrite import (
    Rewritten,
    blocked,
    effects,
    finish,
    replace,
)

log = logging.getLogger(__name__)

Sink = Callable[[records.GraphRecord], None]

_graph_ids = itertools.count()

# cuts whose forward is proven but not their backward; narrower ones hardly fare better
_MAX_BACKWARD_TRIES = 4
# the part of a device's memory, 1 / this, that a graph's all-to-all layers may keep rows in
_PART_TO_KEEP = 8


class RegionRefused(CometError):
    """A region was refused while `comet.strict` asks for every region to be replaced."""


class MoePass(CustomGraphPass):
    """Rewrites MoE layers of a joint (or inference) graph into `comet::moe_layer`."""

    def __init__(self, config: CometConfig | None = None, sink: Sink | None = None) -> None:
        self.config = config or CometConfig()
        # who reads a record of every graph with regions, beside the open collectors
        self.sink = sink

    def uuid(self) -> Any:
        """Identity for compile caches: sources, options, versions and the groups' sizes.

        None (no caching) while graphs are dumped: on a warm cache no pass would run to do it.
        """
        if self.config.dump is not None:
            return None
        return (
            "comet_compile",
            __version__,
            torch.__version__,
            source_digest(),
            self.config.fingerprint(),
            group_facts(),
        )

    def __call__(self, graph: fx.Graph) -> None:
        if not self.config.enabled:
            return
        # fake tensors and functionalisation are on while Inductor calls passes; proofs run for real
        with _disable_current_modes():
            _Session(self.config, graph, self.sink).run()


@dataclasses.dataclass
class _Session:
    """One run of the pass over one graph."""

    config: CometConfig
    graph: fx.Graph
    sink: Sink | None
    rewritten: list[Rewritten] = dataclasses.field(default_factory=list)
    proofs: dict[Hashable, Layer | Rejection] = dataclasses.field(default_factory=dict)
    matches: Matches = dataclasses.field(default_factory=Matches)
    effects: list[fx.Node] = dataclasses.field(default_factory=list)
    arranged: list[loops.Loop] = dataclasses.field(default_factory=list)
    bytes_saved: int = 0  # by the layers rewritten so far

    @property
    def is_recording(self) -> bool:
        """Texts and pictures cost time: they are made when somebody reads them."""
        return self.sink is not None or records.is_collecting()

    def run(self) -> None:
        before, num_before = self._text(), len(self.graph.nodes)
        started = time.perf_counter()
        backward = backward_nodes(self.graph)
        self.arranged = loops.arrange_loops(self.graph, backward)
        if self.arranged:
            backward = backward_nodes(self.graph)
        pairs, refused = expert_gemms.find_pairs(self.graph, backward)
        pairs = [p for p in pairs if not p.dense or find.is_routed(p, self.graph, backward)]
        self._undo(loop for loop in self.arranged if not any(p in loop for p in pairs))
        if not pairs and not refused:
            log.debug("comet: no MoE region in a graph of %d nodes", len(self.graph.nodes))
            self._publish(started, num_before, [], before, bool(backward))
            return
        self.graph_id, self.effects = next(_graph_ids), effects(self.graph)
        regions = [self._region(pair) for pair in pairs]
        regions += [self._refusal(node, rejection) for node, rejection in refused]
        if self.rewritten:
            finish(self.graph, self.rewritten)
            self.graph.lint()
        self._count(regions)
        self._publish(started, num_before, regions, before, bool(backward))
        if self.config.strict:
            _raise_refused(regions)

    def _undo(self, arranged: Iterable[loops.Loop]) -> None:
        """Take the stacks of loops back: what is not rewritten is left as it was."""
        for loop in list(arranged):
            loop.edits.undo()
            self.arranged.remove(loop)

    # -- one region ---------------------------------------------------------------------------

    def _region(self, pair: ExpertPair) -> records.RegionRecord:
        try:
            with _one_thread():
                outcome = self._prove(pair, backward_nodes(self.graph))
        except Exception as error:
            # nothing is changed yet: a model that compiles without comet must compile with it
            log.warning("comet: internal error at %s", pair.out.node.name, exc_info=True)
            detail = f"{pair.out.node.name}: {type(error).__name__}: {error}"
            outcome = Rejection(RejectReason.INTERNAL_ERROR, detail)
        if isinstance(outcome, Rejection):
            self._undo(loop for loop in self.arranged if pair in loop)
            return self._refusal(pair.out.node, outcome)
        layer, gradients = outcome
        before = self._picture(layer) if self.is_recording else None
        where = source_line(pair.out.node) or source_line(layer.candidate.y)
        work, arguments = estimate(layer), emit_arguments(layer)
        path = _choose_path(layer, arguments, work["rows"])
        save = self._save(layer, path) if gradients else "nothing"
        work["bytes_saved"] = bytes_saved(layer, save)
        self.bytes_saved += work["bytes_saved"]
        rewritten = replace(
            layer, gradients, arguments, save, self.graph, free_saved=_may_free_early()
        )
        if path.reads_host:
            rewritten.mark_syncing()
        self.rewritten.append(rewritten)
        after = pictures.around_op(rewritten.forward) if self.is_recording else None
        return records.RegionRecord(
            name=rewritten.forward.name,
            graph_id=self.graph_id,
            status="fused" if path.is_fused else "portable",
            family=layer.form.name,
            reason=None,
            detail=describe(layer),
            where=where,
            plan={**path.plan, "save": save},
            estimate=work,
            backward=_backward_path(gradients, path),
            before=before,
            after=after,
        )

    def _prove(
        self, pair: ExpertPair, backward: set[fx.Node]
    ) -> tuple[Layer, Gradients | None] | Rejection:
        for loop in self.arranged:
            if pair in loop and loop.why_not:
                detail = f"{pair.out.node.name}: {loop.why_not}"
                return Rejection(RejectReason.SEPARATE_EXPERTS, detail)
        refusal: Rejection | None = None
        failed_backward = 0
        for candidate in find.candidates(pair, self.graph, backward):
            if isinstance(candidate, Rejection):
                return refusal or candidate
            layer = self._prove_forward(candidate)
            if isinstance(layer, Rejection):
                log.debug("comet: %s refused: %s", candidate, layer)
                refusal = more_telling(refusal, layer)
                continue
            gradients = None
            if backward:
                gradients = find_gradients(layer, self.graph, backward, self.matches)
            if isinstance(gradients, Gradients) and not self.config.backward:
                return Rejection(RejectReason.BACKWARD_DISABLED, f"{candidate.y.name} is trained")
            if isinstance(gradients, Rejection):
                log.debug("comet: %s refused: %s", candidate, gradients)
                refusal = more_telling(refusal, gradients)
                failed_backward += 1
                if failed_backward == _MAX_BACKWARD_TRIES:
                    break
                continue
            stuck = blocked(layer, gradients, backward, self.effects)
            if stuck is not None:
                log.debug("comet: %s refused: %s", candidate, stuck)
                refusal = more_telling(refusal, stuck)
                continue
            return layer, gradients
        assert refusal is not None
        return refusal

    def _prove_forward(self, candidate: Candidate) -> Layer | Rejection:
        """`prove`, once for regions that are the same expression of their inputs."""
        numbers = self.matches.terms.numbered(candidate.nodes, roles_of(candidate))
        # beside the expression: what lies above the ids, and what is read off the nodes' order
        ids = candidate.ids
        key = (
            region_key(candidate, numbers),
            interval(ids),
            are_distinct(ids),
            weighting(candidate),
            scores_key(candidate, self.matches.terms),
        )
        if key not in self.proofs:
            self.proofs[key] = prove(candidate, self.config.max_proof_rows, group_size)
        known = self.proofs[key]
        return known if isinstance(known, Rejection) else known.transferred(candidate)

    def _save(self, layer: Layer, path: paths.Choice) -> str:
        """What the forward keeps, by option, path and what the layers before keep already."""
        if not layer.form.shards_tokens:
            return "pre_activation" if self.config.save == "auto" else self.config.save
        if not path.may_keep or self.config.save == "nothing":
            return "nothing"
        # whether little more than a rank's share was enough, a captured backward could not ask
        save = "balanced" if _may_free_early() else "pre_activation"
        if self.config.save != "auto":
            return save
        device = val(layer.candidate.x).device
        total = torch.cuda.get_device_properties(device).total_memory
        fits = self.bytes_saved + bytes_saved(layer, save) <= total // _PART_TO_KEEP
        return save if fits else "nothing"

    # -- records ------------------------------------------------------------------------------

    def _refusal(self, node: fx.Node, rejection: Rejection) -> records.RegionRecord:
        return records.RegionRecord(
            name=node.name,
            graph_id=self.graph_id,
            status="rejected",
            family="unknown",
            reason=rejection.reason.value,
            detail=rejection.detail,
            where=source_line(node),
            plan={},
            estimate={},
            backward="none",
            before=pictures.around_op(node) if self.is_recording else None,
            after=None,
        )

    def _picture(self, layer: Layer) -> records.GraphPicture:
        return pictures.of_region(layer.candidate.nodes, layer.candidate.inputs, layer.candidate.y)

    def _text(self) -> str:
        if not self.is_recording:
            return ""
        module = fx.GraphModule(self.graph.owning_module or torch.nn.Module(), self.graph)
        return module.print_readable(print_output=False)

    def _count(self, regions: list[records.RegionRecord]) -> None:
        comet = counters["comet"]
        comet["regions_found"] += len(regions)
        for region in regions:
            comet[f"regions_{region.status}"] += 1
            if region.reason:
                comet[f"rejected.{region.reason}"] += 1
            if region.backward != "none":
                comet[f"regions_backward_{region.backward}"] += 1
        if _is_first_rank():
            log.info("%s", summary(regions))

    def _publish(
        self,
        started: float,
        num_before: int,
        regions: list[records.RegionRecord],
        before: str,
        training: bool,
    ) -> None:
        if not self.is_recording:
            return
        seconds = time.perf_counter() - started
        record = records.GraphRecord(
            graph_id=regions[0].graph_id if regions else next(_graph_ids),
            kind="training" if training else "inference",
            num_nodes_before=num_before,
            num_nodes_after=len(self.graph.nodes),
            seconds=seconds,
            regions=tuple(regions),
            before_text=before,
            after_text=self._text() if self.rewritten else before,
        )
        records.publish(record)
        if regions and self.sink is not None:
            self.sink(record)


def _raise_refused(regions: list[records.RegionRecord]) -> None:
    refused = [r for r in regions if r.status == "rejected"]
    if refused:
        lines = [f"{r.where or r.name}: {r.reason}: {r.detail}" for r in refused]
        raise RegionRefused(
            f"comet.strict is on and {len(refused)} of {len(regions)} MoE regions were refused:\n"
            + "\n".join(lines)
        )


def _backward_path(
    gradients: Gradients | None, path: paths.Choice
) -> Literal["fused", "portable", "none"]:
    if gradients is None:
        return "none"
    return "fused" if path.is_fused else "portable"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Interpret with one thread of the processor.

    A proof is thousands of products of three columns. Shared out, each waits for all threads, and
    with a process per GPU there are more of those than cores: the first run of a layer of 8192
    tokens and 128 experts on two GPUs of a machine with 32 cores took 69 s with all of them, 31
    with one (benchmarks/results/ep_h100.json, ep_qwen3_h100.json, first_run_s).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _may_free_early() -> bool:
    """Whether a backward may give memory back that the graph still holds: not where Inductor
    captures graphs, or plans memory, and counts on finding it."""
    from torch._inductor import config

    return not (config.triton.cudagraphs or config.memory_planning)


def _choose_path(layer: Layer, arguments: list[Any], rows: int) -> paths.Choice:
    """How the new op will run, from the fake tensors that it is given."""
    tensors: list[Any] = [None if n is None else val(n) for n in arguments]
    math = LayerMath(layer.activation, layer.weight_place, layer.product_dtype)
    return paths.choose_path(
        layer.form.name,
        Routed(*tensors[:3]),
        ExpertParams(*tensors[3:]),
        math,
        rows=rows,
    )


def _is_first_rank() -> bool:
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
