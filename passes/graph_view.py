"""Small questions about a joint graph that several passes ask."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def val(node: fx.Node) -> Any:
    """The fake value of a node (a FakeTensor, a SymInt, a tuple ...), or None."""
    return node.meta.get("val")


def is_tensor(node: fx.Node) -> bool:
    return isinstance(val(node), torch.Tensor)


def is_value(node: fx.Node) -> bool:
    """Whether a node computes tensors, rather than a size or a check."""
    value = val(node)
    return isinstance(value, (torch.Tensor, tuple, list))


def is_float(node: fx.Node) -> bool:
    return is_tensor(node) and val(node).is_floating_point()


def widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every number of the floating-point type `narrow` is one of `wide`."""
    a, b = torch.finfo(narrow), torch.finfo(wide)
    return a.eps >= b.eps and a.max <= b.max and a.smallest_normal >= b.smallest_normal


def is_integer(node: fx.Node) -> bool:
    return is_tensor(node) and not val(node).is_floating_point() and val(node).dtype != torch.bool


def is_collective(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "_c10d_functional"


def schema_name(node: fx.Node) -> str:
    """``namespace::name`` of the operation that a node calls; "" for what is no torch operation."""
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def is_known_size(node: fx.Node) -> bool:
    """Whether a node is a size that the symbols of the graph's inputs determine: its value does
    not depend on how it is computed."""
    value = val(node)
    if isinstance(value, (int, bool)):
        return True
    if not isinstance(value, torch.SymInt):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return not free_unbacked_symbols(value)


_STORED_AS = {
    torch.ops.aten.permute,
    torch.ops.aten.transpose,
    torch.ops.aten.view,
    torch.ops.aten.reshape,
    torch.ops.aten.unsqueeze,
    torch.ops.aten.expand,
    torch.ops.aten.clone,
    torch.ops.aten._to_copy,
    torch.ops.prims.convert_element_type,
}


def stored(node: Any) -> fx.Node | None:
    """The graph input that `node` is, or is a view, a copy or a cast of; else None.

    Of inputs that are joined, as matrices in a stack are, the first.
    """
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target is torch.ops.aten.cat.default:
            first, *others = node.args[0]
            if any(stored(other) is None for other in others):
                return None
            node = first
            continue
        if getattr(node.target, "overloadpacket", None) not in _STORED_AS:
            return None
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr") else None


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    """The place of every node in graph order."""
    return {node: i for i, node in enumerate(graph.nodes)}


def ancestors(
    roots: Iterable[fx.Node], stop: Callable[[fx.Node], bool] = lambda _: False
) -> set[fx.Node]:
    """`roots` and everything they are computed from; nodes that `stop` are kept, not entered."""
    seen: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if not stop(node):
            stack.extend(node.all_input_nodes)
    return seen


def descendants(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything computed from `roots`, without the roots themselves."""
    seen: set[fx.Node] = set()
    stack = [user for root in roots for user in root.users]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return seen


def nearest_ancestors(
    root: fx.Node, order: Mapping[fx.Node, int], stops: set[fx.Node], limit: int
) -> list[fx.Node]:
    """`root` and what it is computed from, the latest first, at most `limit` nodes.

    Nodes of `stops` are neither listed nor entered.
    """
    import heapq

    found: list[fx.Node] = []
    heap = [(-order[root], root)]
    seen = {root}
    while heap and len(found) < limit:
        _, node = heapq.heappop(heap)
        found.append(node)
        for source in node.all_input_nodes:
            if source not in seen and source not in stops:
                seen.add(source)
                heapq.heappush(heap, (-order[source], source))
    return found


def dependents(roots: Iterable[fx.Node], nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Those of `nodes` (in graph order) that are computed from `roots` through `nodes`."""
    reached = set(roots)
    found: set[fx.Node] = set()
    for node in nodes:
        if node not in reached and any(s in reached for s in node.all_input_nodes):
            reached.add(node)
            found.add(node)
    return found


def backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on an incoming gradient; empty for an inference graph.

    `partitioner_tag` and `seq_nr` are not used: both are wrong for bodies of autograd.Function.
    """
    tangents = [
        node
        for node in graph.nodes
        if node.op == "placeholder" and str(node.target).startswith("tangents")
    ]
    return {n for n in (*tangents, *descendants(tangents)) if n.op != "output"}


def numel(shape: Iterable[Any]) -> Any:
    return functools.reduce(operator.mul, shape, 1)


def expression(size: Any) -> Any:
    """The sympy expression of a size (a plain int stays one)."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def ratio(numerator: Any, denominator: Any) -> int | None:
    """numerator / denominator if that is an integer whatever the symbols are, else None."""
    top, bottom = expression(numerator), expression(denominator)
    if isinstance(top, int) and isinstance(bottom, int):
        return top // bottom if bottom and top % bottom == 0 else None
    import sympy

    top, bottom = sympy.sympify(top), sympy.sympify(bottom)
    # try the quotient at one point, then hold it against the expressions: far cheaper than
    # simplifying every quotient of a large graph
    point = {symbol: 7 + i for i, symbol in enumerate(_symbols(top, bottom))}
    quotient = top.subs(point) / bottom.subs(point)
    if not quotient.is_Integer or (top - quotient * bottom).expand() != 0:
        return None
    return int(quotient)


def _symbols(*expressions: Any) -> list[Any]:
    return sorted(set().union(*(e.free_symbols for e in expressions)), key=str)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal whatever the symbols are (never adds a guard)."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return (
        bool(statically_known_true(a == b))
        if not isinstance(a, int) or not isinstance(b, int)
        else a == b
    )


def concrete(size: Any, symbols: Mapping[Any, int]) -> int:
    """The value of a size in one sample; ValueError if a run-time symbol is left."""
    expr = expression(size)
    if isinstance(expr, int):
        return expr
    expr = expr.subs(symbols)
    if not expr.is_number:
        raise ValueError(f"size {expr} is known at run time only")
    return int(expr)


def source_line(node: fx.Node) -> str:
    """The user's line that made `node`: ``file.py:12 in forward: y = self.experts(x)``.

    The innermost frame outside of libraries' own helpers, from the stack trace that Dynamo leaves
    on nodes.
    """
    frames = _frames(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    own = [frame for frame in frames if not any(part in frame[0] for part in _HELPERS)]
    file, line, function, code = (own or frames)[-1]
    return f"{file}:{line} in {function}: {code}"


# where a layer's author did not write: torch, and transformers' shared experts functions
_HELPERS = ("/site-packages/torch/", "/dist-packages/torch/", "/transformers/integrations/")


def _frames(trace: str) -> list[tuple[str, str, str, str]]:
    frames = []
    lines = trace.splitlines()
    for i, text in enumerate(lines):
        text = text.strip()
        if not text.startswith('File "'):
            continue
        file, _, rest = text[len('File "') :].partition('", line ')
        number, _, function = rest.partition(", in ")
        code = lines[i + 1].strip() if i + 1 < len(lines) else ""
        frames.append((file, number, function, code))
    return frames


def describe(node: fx.Node) -> str:
    """``name (op)`` with the op's short name, for messages."""
    target = node.target
    short = str(target) if not callable(target) else getattr(target, "__name__", str(target))
    return f"{node.name} ({short})"
