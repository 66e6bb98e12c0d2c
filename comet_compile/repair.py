"""Right gradients for autograd.Functions that write in place, on torch releases that lose them.

pytorch/pytorch#180642: up to torch 2.11 Dynamo lets the forward body of an
``autograd.Function`` return every intermediate beside its real results. ``out.copy_(rows)``
*is* ``out``, so one tensor leaves the body twice, autograd takes the later place for its own, and
the gradient of ``out`` arrives in the slot of the unused copy: zero, silently, under every
backend. This is how Megatron, DeepSpeed, Tutel and fairseq exchange their tokens::

    out = x.new_empty(...)
    dist.all_to_all_single(out, x, ...)  # traced as all_to_all_single, wait_tensor, copy_
    return out

The repair does on the captured graph what the fix of PyTorch (pytorch/pytorch#180921) does while
capturing: each tensor leaves the forward body once. Neither body computes anything else than
before, so nothing needs to be known of the collectives or of how forward and backward belong
together, and any other function that writes in place is mended with them.

Changes: the outputs of forward bodies, the matching placeholders of backward bodies, the indices
into the result. Keeps: every computation of every graph (dead code elimination would delete
``copy_`` calls from a Dynamo graph, where mutation is not yet functional).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.torch_version import TorchVersion

from comet_compile.errors import CorrectnessWarning

__all__ = ["RepairReport", "needs_repair", "repair_autograd_functions"]

_APPLY = torch.ops.higher_order.autograd_function_apply
_STACK_ENTRY = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@dataclasses.dataclass(frozen=True)
class RepairReport:
    """The calls that lost gradients, by the user's source line: mended, and left as they were."""

    repaired: tuple[str, ...] = ()
    unrepaired: tuple[str, ...] = ()


def needs_repair() -> bool:
    """Whether this torch may capture autograd.Functions that lose gradients.

    2.11 does and 2.13 does not, both tried; 2.12 was not. There the repair is safe either way:
    in a graph of a torch that has the fix, no tensor leaves a body twice.
    """
    return TorchVersion(torch.__version__) < "2.13"


def repair_autograd_functions(gm: fx.GraphModule) -> RepairReport:
    """Mend in `gm`, a Dynamo graph, and its subgraphs every call that would lose gradients.

    A call that cannot be mended stays as it is, and a :class:`CorrectnessWarning` names its place.
    """
    calls = list(_apply_calls(gm))
    body_uses = Counter(id(body) for call in calls for body in (call.forward, call.backward))
    repaired, unrepaired = [], []
    for call in calls:
        if not _loses_gradients(call):
            continue
        place = _source_place(call.node)
        shared = any(body_uses[id(body)] > 1 for body in (call.forward, call.backward))
        if not shared and _return_each_tensor_once(call):
            repaired.append(place)
        else:
            unrepaired.append(place)
            _warn(place)
    return RepairReport(tuple(repaired), tuple(unrepaired))


@dataclasses.dataclass(frozen=True)
class _ApplyCall:
    """One ``autograd_function_apply(forward, backward, *inputs)`` of the graph of `owner`.

    The forward body returns ``(outputs, saved)``, the backward body takes
    ``(*gradients of outputs, *saved)``.
    """

    owner: fx.GraphModule
    node: fx.Node
    forward: fx.GraphModule
    backward: fx.GraphModule

    @property
    def outputs(self) -> list[Any]:
        outputs, _ = self.forward.graph.output_node().args[0]
        return list(outputs) if isinstance(outputs, tuple | list) else [outputs]

    @property
    def gradients(self) -> list[fx.Node]:
        placeholders = self.backward.graph.find_nodes(op="placeholder")
        return placeholders[: len(self.outputs)]

    @property
    def origins(self) -> list[int]:
        """For each output, the first output that is the same tensor."""
        values = [_example_value(output) for output in self.outputs]
        return [
            next(j for j, other in enumerate(values) if j == i or _is_same(value, other))
            for i, value in enumerate(values)
        ]


def _apply_calls(gm: fx.GraphModule) -> Iterator[_ApplyCall]:
    for owner in gm.modules():
        if not isinstance(owner, fx.GraphModule):
            continue
        for node in owner.graph.find_nodes(op="call_function", target=_APPLY):
            bodies = [_body(owner, argument) for argument in node.args[:2]]
            if all(isinstance(body, fx.GraphModule) for body in bodies):
                yield _ApplyCall(owner, node, *bodies)


def _body(owner: fx.GraphModule, argument: Any) -> torch.nn.Module | None:
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        return owner.get_submodule(str(argument.target))
    return None


def _example_value(output: Any) -> Any:
    return output.meta.get("example_value") if isinstance(output, fx.Node) else None


def _is_same(value: Any, other: Any) -> bool:
    # The very object: an in-place op returns its first argument. A view of it is another tensor
    # to autograd, and does no harm.
    return isinstance(value, torch.Tensor) and value is other


def _loses_gradients(call: _ApplyCall) -> bool:
    """Whether a result that is used leaves the forward body in two places."""
    origins = call.origins
    times = Counter(origins)
    return any(times[origins[i]] > 1 for i, getitem in _getitems(call) if getitem.users)


def _getitems(call: _ApplyCall) -> list[tuple[int, fx.Node]]:
    return [
        (int(user.args[1]), user) for user in call.node.users if user.target is operator.getitem
    ]


def _return_each_tensor_once(call: _ApplyCall) -> bool:
    """Drop the outputs that are another output; False, and nothing done, if one is needed."""
    origins = call.origins
    dropped = {i for i, origin in enumerate(origins) if i != origin}
    if any(user.target is not operator.getitem for user in call.node.users):
        return False
    if any(call.gradients[i].users for i in dropped):
        return False  # the function itself returns one tensor twice and tells the two apart
    _use_first_occurrences(call, origins)
    _drop_outputs(call, dropped)
    return True


def _use_first_occurrences(call: _ApplyCall, origins: list[int]) -> None:
    """Let whoever reads a later occurrence of a tensor read the first one."""
    firsts = dict(reversed(_getitems(call)))
    for i, getitem in _getitems(call):
        origin = origins[i]
        if i == origin:
            continue
        if getitem.users:
            if origin not in firsts:
                with call.owner.graph.inserting_after(call.node):
                    first = call.owner.graph.call_function(operator.getitem, (call.node, origin))
                first.meta.update(getitem.meta)
                firsts[origin] = first
            else:
                call.node.append(firsts[origin])  # in front of everything that reads it now
            getitem.replace_all_uses_with(firsts[origin])
        call.owner.graph.erase_node(getitem)


def _drop_outputs(call: _ApplyCall, dropped: set[int]) -> None:
    node, outputs, gradients = call.node, call.outputs, call.gradients
    kept = [i for i in range(len(outputs)) if i not in dropped]
    new_index = {old: new for new, old in enumerate(kept)}

    output_node = call.forward.graph.output_node()
    _, saved = output_node.args[0]
    output_node.args = ((tuple(outputs[i] for i in kept), saved),)
    for i in dropped:
        call.backward.graph.erase_node(gradients[i])

    for i, getitem in _getitems(call):
        getitem.args = (node, new_index[i])
    not_differentiable = node.kwargs["non_differentiable_idx"]
    node.kwargs = {
        **node.kwargs,
        "non_differentiable_idx": [new_index[i] for i in not_differentiable if i in new_index],
    }
    values = node.meta.get("example_value")
    if isinstance(values, tuple | list) and len(values) == len(outputs):
        node.meta["example_value"] = tuple(values[i] for i in kept)

    for graph_module in (call.forward, call.backward, call.owner):
        graph_module.graph.lint()
        graph_module.recompile()


def _source_place(node: fx.Node) -> str:
    entries = _STACK_ENTRY.findall(node.meta.get("stack_trace") or "")
    if not entries:
        return "an autograd.Function of this model"
    path, line, function = entries[-1]
    return f"{path}:{line} in {function}"


@functools.cache  # once per place: torch clears the registry in which `warnings` keeps this
def _warn(place: str) -> None:
    warnings.warn(
        f"{place}: torch {torch.__version__} silently computes wrong gradients for the "
        "autograd.Function called here, under every torch.compile backend, because its forward "
        "returns one tensor in several places (pytorch/pytorch#180642); comet_compile cannot "
        "mend this one. Use torch >= 2.13, or return a clone of the tensor from the second place.",
        CorrectnessWarning,
        stacklevel=3,
    )
