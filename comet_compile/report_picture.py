"""Layered layout of a region's graph picture: data in, coordinates out.

Steps:
1. layers are networkx's topological generations; a node that only feeds later layers is pulled
   down to its first user, so that a weight stands beside the GEMM that reads it;
2. an edge over several layers gets one bend per layer it passes, so that it runs around boxes;
3. boxes of a layer are ordered by the mean position of their neighbours, a few sweeps each way;
4. x positions are the least-squares fit to the neighbours' positions that keeps boxes apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from comet_compile.records import GraphPicture, PictureNode, Role

if TYPE_CHECKING:
    import networkx

_BOX_HEIGHT = 40.0
_LAYER_GAP = 30.0
_BOX_GAP = 18.0
_BEND_WIDTH = 8.0
_MARGIN = 14.0
_TITLE_CHAR, _LABEL_CHAR = 7.3, 6.1  # advance of 12px and 10px monospace digits, rounded up
_MAX_CHARS = 34
_SWEEPS = 12
_DTYPES = {
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
    "int32": "i32",
    "int64": "i64",
}
_DTYPE = re.compile(rf"\b({'|'.join(_DTYPES)})\b")
_DROPPED_NAMESPACES = ("aten", "prims", "_c10d_functional", "_operator")


@dataclasses.dataclass(frozen=True)
class Box:
    """One node's rectangle (x, y is its top left corner) and the two lines written in it."""

    x: float
    y: float
    width: float
    height: float
    title: str
    label: str
    tooltip: str
    role: Role


@dataclasses.dataclass(frozen=True)
class PictureLayout:
    """A picture ready to draw: `links` are SVG path strings, from producer to user."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    links: tuple[str, ...]


@dataclasses.dataclass
class _Layered:
    """The graph with bends: `layers` of vertex ids; ids from `num_nodes` on are bends."""

    num_nodes: int
    layers: list[list[int]]
    above: dict[int, list[int]]
    below: dict[int, list[int]]
    routes: list[list[int]]


def layout_picture(picture: GraphPicture) -> PictureLayout:
    """Return where to draw every node and edge of `picture`."""
    if not picture.nodes:
        return PictureLayout(2 * _MARGIN, 2 * _MARGIN, (), ())
    layered = _insert_bends(_as_dag(picture))
    _order_layers(layered)
    labels = [_labels(node) for node in picture.nodes]
    widths = [_box_width(*label) for label in labels]
    centers = _place(layered, widths)
    layer_of = {v: i for i, layer in enumerate(layered.layers) for v in layer}
    boxes = tuple(
        Box(
            x=centers[i] - widths[i] / 2,
            y=_MARGIN + layer_of[i] * (_BOX_HEIGHT + _LAYER_GAP),
            width=widths[i],
            height=_BOX_HEIGHT,
            title=labels[i][0],
            label=labels[i][1],
            tooltip=" ".join(part for part in (node.name, node.op, node.shape) if part),
            role=node.role,
        )
        for i, node in enumerate(picture.nodes)
    )
    lanes = [centers[v] for v in range(layered.num_nodes, len(centers))]
    return PictureLayout(
        width=max([box.x + box.width for box in boxes] + lanes) + _MARGIN,
        height=max(box.y for box in boxes) + _BOX_HEIGHT + _MARGIN,
        boxes=boxes,
        links=tuple(_link_paths(layered, centers, layer_of, boxes)),
    )


def _as_dag(picture: GraphPicture) -> networkx.DiGraph:
    import networkx

    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(picture.nodes)))
    graph.add_edges_from((a, b) for a, b in picture.edges if a != b)
    if not networkx.is_directed_acyclic_graph(graph):
        # a picture that folds several nodes into one box may loop; nodes are in graph order
        graph.remove_edges_from([(a, b) for a, b in graph.edges if a > b])
    return graph


def _insert_bends(graph: networkx.DiGraph) -> _Layered:
    import networkx

    depth = {v: i for i, layer in enumerate(networkx.topological_generations(graph)) for v in layer}
    for v in reversed(list(networkx.topological_sort(graph))):
        if graph.in_degree(v) <= 1 and graph.out_degree(v):
            depth[v] = min(depth[user] for user in graph.successors(v)) - 1
    used = {d: i for i, d in enumerate(sorted(set(depth.values())))}
    depth = {v: used[d] for v, d in depth.items()}

    layers: list[list[int]] = [[] for _ in used]
    for v in sorted(depth):
        layers[depth[v]].append(v)
    num_vertices = len(depth)
    routes = []
    for a, b in sorted(graph.edges):
        num_bends = depth[b] - depth[a] - 1
        bends = list(range(num_vertices, num_vertices + num_bends))
        num_vertices += num_bends
        for i, bend in enumerate(bends):
            layers[depth[a] + 1 + i].append(bend)
        routes.append([a, *bends, b])
    above: dict[int, list[int]] = {v: [] for v in range(num_vertices)}
    below: dict[int, list[int]] = {v: [] for v in range(num_vertices)}
    for route in routes:
        for a, b in itertools.pairwise(route):
            below[a].append(b)
            above[b].append(a)
    return _Layered(len(depth), layers, above, below, routes)


def _order_layers(layered: _Layered) -> None:
    """Reorder each layer in place by the mean index of its neighbours; keep the best seen."""
    best, fewest = [list(layer) for layer in layered.layers], _count_crossings(layered)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        neighbours = layered.above if down else layered.below
        layers = layered.layers if down else layered.layers[::-1]
        for fixed, moving in itertools.pairwise(layers):
            index = {v: i for i, v in enumerate(fixed)}
            own = {v: i for i, v in enumerate(moving)}
            moving.sort(key=lambda v: _mean((index[n] for n in neighbours[v]), own[v]))
        crossings = _count_crossings(layered)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layered.layers], crossings
    layered.layers = best


def _count_crossings(layered: _Layered) -> int:
    total = 0
    for upper, lower in zip(layered.layers, layered.layers[1:], strict=False):
        index = {v: i for i, v in enumerate(lower)}
        ends = [sorted(index[n] for n in layered.below[v]) for v in upper]
        seen: list[int] = []
        for group in ends:
            total += sum(1 for end in group for other in seen if other > end)
            seen.extend(group)
    return total


def _place(layered: _Layered, widths: Sequence[float]) -> list[float]:
    """Return the x of every vertex's centre, the leftmost box starting at the margin."""
    num_vertices = len(layered.above)
    extent = [widths[v] if v < layered.num_nodes else _BEND_WIDTH for v in range(num_vertices)]
    x = [0.0] * num_vertices
    for layer in layered.layers:
        position = 0.0
        for v in layer:
            x[v] = position + extent[v] / 2
            position += extent[v] + _BOX_GAP
    for sweep in range(2 * _SWEEPS):
        for layer in layered.layers if sweep % 2 == 0 else layered.layers[::-1]:
            wanted = [_wanted_x(layered, x, v) for v in layer]
            gaps = [(extent[a] + extent[b]) / 2 + _BOX_GAP for a, b in itertools.pairwise(layer)]
            # a bend that moves makes its long edge wavy, a box that moves does not show
            weights = [1.0 if v < layered.num_nodes else 4.0 for v in layer]
            for v, position in zip(layer, _spread(wanted, gaps, weights), strict=True):
                x[v] = position
    left = min(x[v] - extent[v] / 2 for v in range(num_vertices))
    return [value - left + _MARGIN for value in x]


def _wanted_x(layered: _Layered, x: Sequence[float], v: int) -> float:
    """Return the mean x of the neighbours of `v`; bends pull each other most, to lie straight."""
    total = mass = 0.0
    for n in (*layered.above[v], *layered.below[v]):
        weight = (1.0, 2.0, 8.0)[(v >= layered.num_nodes) + (n >= layered.num_nodes)]
        total += weight * x[n]
        mass += weight
    return total / mass if mass else x[v]


def _spread(
    wanted: Sequence[float], gaps: Sequence[float], weights: Sequence[float]
) -> list[float]:
    """Return the positions nearest to `wanted` (least squares) that keep `gaps` between them.

    With the gaps subtracted this is monotone regression: neighbours that would overlap are
    pooled at their weighted mean.
    """
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    pools: list[list[float]] = []  # [mean, weight, count]
    for value, offset, weight in zip(wanted, offsets, weights, strict=True):
        pools.append([value - offset, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, mass, count = pools.pop()
            last = pools[-1]
            last[0] = (last[0] * last[1] + mean * mass) / (last[1] + mass)
            last[1] += mass
            last[2] += count
    means = [pool[0] for pool in pools for _ in range(int(pool[2]))]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def _link_paths(
    layered: _Layered, centers: Sequence[float], layer_of: dict[int, int], boxes: Sequence[Box]
) -> Iterable[str]:
    arriving: dict[int, list[int]] = {}
    for i, route in enumerate(layered.routes):
        arriving.setdefault(route[-1], []).append(i)
    entry = {}
    for v, incoming in arriving.items():
        incoming.sort(key=lambda i: centers[layered.routes[i][-2]])
        for k, i in enumerate(incoming):
            entry[i] = centers[v] + ((k + 1) / (len(incoming) + 1) - 0.5) * boxes[v].width * 0.7
    for i, route in enumerate(layered.routes):
        x, y = centers[route[0]], boxes[route[0]].y + _BOX_HEIGHT
        path = [f"M{x:.1f} {y:.1f}"]
        for v in route[1:]:
            top = _MARGIN + layer_of[v] * (_BOX_HEIGHT + _LAYER_GAP)
            end = entry[i] if v == route[-1] else centers[v]
            middle = (y + top) / 2
            path.append(f"C{x:.1f} {middle:.1f} {end:.1f} {middle:.1f} {end:.1f} {top:.1f}")
            x, y = end, top
            if v != route[-1]:
                y = top + _BOX_HEIGHT
                path.append(f"V{y:.1f}")
        yield "".join(path)


def _labels(node: PictureNode) -> tuple[str, str]:
    """Return the two lines of a box: what it does, then its name and shape."""
    op = _short_op(node.op)
    shape = _DTYPE.sub(lambda match: _DTYPES[match[0]], node.shape)
    if node.role in ("input", "output") or op in ("", "placeholder", "output"):
        return _clip(node.name), _clip(shape)
    return _clip(op), _clip(f"{node.name}  {shape}".strip())


def _short_op(op: str) -> str:
    """Return ``index`` for ``aten.index.Tensor``; comet's own ops keep their namespace."""
    parts = op.removeprefix("torch.ops.").replace("::", ".").split(".")
    if len(parts) == 3:
        del parts[2]
    if len(parts) == 2 and parts[0] in _DROPPED_NAMESPACES:
        del parts[0]
    return ".".join(parts)


def _clip(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 3] + "..."


def _box_width(title: str, label: str) -> float:
    return max(70.0, len(title) * _TITLE_CHAR, len(label) * _LABEL_CHAR) + 20.0


def _mean(values: Iterable[Any], default: float) -> float:
    items = list(values)
    return sum(items) / len(items) if items else default
