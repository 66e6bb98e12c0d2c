"""Joint (or inference) graphs of models, as the MoE pass gets them, without generating code.

A graph is captured by letting torch.compile go as far as Inductor's joint passes and no further.
Graphs of all-to-all layers come from a process group of the "fake" backend: they are looked at
and never run, since its collectives leave their outputs unwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass

from comet_compile import fallback_gemm, repair
from comet_compile.config import CometConfig
from comet_compile.passes.moe_pass import MoePass

MOE = torch.ops.comet.moe_layer.default
MOE_BACKWARD = torch.ops.comet.moe_layer_backward.default


class _Captured(Exception):
    """Ends a compilation once its joint graph was seen."""


@dataclasses.dataclass
class _Recorder(CustomGraphPass):
    """Copies every graph that reaches the joint passes."""

    abort: bool
    graphs: list[fx.Graph]

    def __call__(self, graph: fx.Graph) -> None:
        self.graphs.append(clone(graph))
        if self.abort:
            raise _Captured

    def uuid(self) -> None:
        return None


def clone(graph: fx.Graph) -> fx.Graph:
    """Return a copy to edit; names, fake values and the owning module stay."""
    copied = fx.Graph(graph.owning_module)
    table: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        table[node] = copied.node_copy(node, lambda n: table[n])
        table[node].name = node.name
    return copied


def capture(
    model: Callable[..., Any],
    *inputs: Any,
    train: bool,
    dynamic: bool | None = None,
) -> fx.Graph:
    """Return the one joint graph of `model(*inputs)`, or its inference graph."""
    (graph,) = _capture(model, inputs, train, abort=True, fullgraph=True, dynamic=dynamic)
    return graph


def capture_all(model: Callable[..., Any], *inputs: Any) -> list[fx.Graph]:
    """Return the inference graph of every part of a model with graph breaks, which is run."""
    return _capture(model, inputs, train=False, abort=False, fullgraph=False, dynamic=None)


def _capture(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    train: bool,
    *,
    abort: bool,
    fullgraph: bool,
    dynamic: bool | None,
) -> list[fx.Graph]:
    from torch._inductor.compile_fx import compile_fx

    recorder = _Recorder(abort, [])
    patches = {"joint_custom_post_pass": recorder, "fx_graph_cache": False}

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if repair.needs_repair():
            repair.repair_autograd_functions(gm)
        fallback_gemm.make_backward_traceable(gm)
        return compile_fx(gm, example_inputs, inner_compile=_eager, config_patches=patches)

    torch._dynamo.reset()
    inputs = [_leaf(value, train) for value in inputs]
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=dynamic)
    with (
        torch._dynamo.config.patch(capture_scalar_outputs=True),
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch.set_grad_enabled(train),
    ):
        try:
            compiled(*inputs)
        except Exception:
            if not (abort and recorder.graphs):
                raise
    torch._dynamo.reset()
    return recorder.graphs


def _leaf(value: Any, train: bool) -> Any:
    # a copy would lose the marks that Dynamo reads off a tensor
    if not (train and isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.detach().clone().requires_grad_()


def _eager(gm: fx.GraphModule, _: Any, **__: Any) -> Callable[..., Any]:
    """Stands in for Inductor's code generation."""

    def call(args: list[Any]) -> Any:
        values = tuple(args)
        args.clear()
        return gm.forward(*values)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


@contextlib.contextmanager
def fake_group(size: int = 2) -> Iterator[None]:
    """Make this process rank 0 of a world of `size` that does not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


# -- running the pass -------------------------------------------------------------------------


def run_pass(graph: fx.Graph, **options: Any) -> dict[str, int]:
    """Run the MoE pass on `graph` itself; returns its counters."""
    counters["comet"].clear()
    MoePass(CometConfig(**options))(graph)
    return dict(counters["comet"])


def rejections(counts: dict[str, int]) -> list[str]:
    """Return the reasons of refusal that were counted."""
    prefix = "rejected."
    return sorted(name[len(prefix) :] for name in counts if name.startswith(prefix))


def num_rewritten(counts: dict[str, int]) -> int:
    return counts.get("regions_portable", 0) + counts.get("regions_fused", 0)


def is_rewritten(counts: dict[str, int]) -> bool:
    return num_rewritten(counts) > 0


# -- looking at graphs ------------------------------------------------------------------------


def listing(graph: fx.Graph) -> list[str]:
    """Return one line per node with everything that a rewrite could change."""
    return [
        f"{node.format_node()} {node.kwargs} {_described(node.meta.get('val'))}"
        for node in graph.nodes
    ]


def _described(value: Any) -> Any:
    """Return a value to print; a fake tensor takes longer to print than a node to run."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    return [_described(v) for v in value] if isinstance(value, (list, tuple)) else value


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def nodes_of(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=target))


def only(graph: fx.Graph, target: Any) -> fx.Node:
    (node,) = nodes_of(graph, target)
    return node


def normalized(nodes: Sequence[fx.Node]) -> str:
    """Return one line per call, values numbered in graph order: ``%3 = aten.mm(%0, %1)``.

    The options of comet's ops follow on lines of their own.
    """
    numbers = {node: f"%{i}" for i, node in enumerate(nodes[0].graph.nodes)}
    lines = []
    for node in nodes:
        args = fx.node.map_arg(node.args, lambda n: _Text(numbers[n]))
        options = [f"{k}={v}" for k, v in node.kwargs.items()]
        name = str(node.target).removesuffix(".default").replace("built-in function ", "")
        call = ", ".join(str(a) for a in args)
        if name.startswith("comet"):
            lines.append(f"{numbers[node]} = {name}({call},")
            lines += textwrap.wrap(", ".join(options) + ")", 90, initial_indent="    ",
                                   subsequent_indent="    ")  # fmt: skip
        else:
            lines.append(f"{numbers[node]} = {name}({', '.join([call, *options])})")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Text:
    text: str

    def __repr__(self) -> str:
        return self.text


def small_block(name: str, implementation: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Return the MoE block of a small Hugging Face model."""
    from zoo import hf

    return hf.moe_block(name, implementation, dtype)
