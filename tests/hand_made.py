"""Records made by hand, as the passes would publish them; some of the strings are nasty."""

from __future__ import annotations

from typing import Any

from comet_compile.dump import write_dump
from comet_compile.records import GraphPicture, GraphRecord, PictureNode, RegionRecord
from comet_compile.report import GraphBreak, Report

SCRIPT = "<script>window.hacked = 1</script>"
NASTY_CODE = f'out = self.experts(x) & "y" # {SCRIPT}</pre></svg>'
LONG_NAME = "model.layers.17.feed_forward." + "very_long_module_name_" * 6 + "experts"


def before_picture() -> GraphPicture:
    """Return 12 nodes of an all-to-all layer: two exchanges around two grouped GEMMs."""
    nodes = (
        PictureNode("x", "placeholder", "bf16[16, 32]", "input"),
        PictureNode("ids", "placeholder", "i64[16, 2]", "input"),
        PictureNode("w_in", "placeholder", "bf16[8, 32, 64]", "input"),
        PictureNode("w_out", "placeholder", "bf16[8, 32, 32]", "input"),
        PictureNode("sort", "aten.sort.default", "(i64[32], i64[32])", "index"),
        PictureNode("index", "aten.index.Tensor", "bf16[32, 32]", "compute"),
        PictureNode("a2a", "_c10d_functional.all_to_all_single.default", "bf16[u0, 32]", "comm"),
        PictureNode("_grouped_mm", "aten._grouped_mm.default", "bf16[u0, 64]", "compute"),
        PictureNode("_grouped_mm_1", "aten._grouped_mm.default", "bf16[u0, 32]", "compute"),
        PictureNode("a2a_1", "_c10d_functional.all_to_all_single.default", "bf16[32, 32]", "comm"),
        PictureNode("index_add", "aten.index_add.default", "bf16[16, 32]", "compute"),
        PictureNode(SCRIPT, "output", "bf16[16, 32]" * 9, "output"),
    )
    edges = (
        (1, 4), (4, 5), (0, 5), (5, 6), (6, 7), (2, 7), (7, 8), (3, 8), (8, 9), (9, 10),
        (4, 10), (4, 6), (4, 9), (10, 11),
    )  # fmt: skip
    return GraphPicture(nodes, edges)


def after_picture() -> GraphPicture:
    """Return 6 nodes: the layer's inputs, one comet op, its output."""
    inputs = before_picture().nodes[:4]
    op = PictureNode("moe_layer", "comet.moe_layer.default", "(bf16[16, 32], ...)", "comet")
    out = PictureNode("getitem", "<built-in function getitem>", "bf16[16, 32]", "output")
    return GraphPicture((*inputs, op, out), ((0, 4), (1, 4), (2, 4), (3, 4), (4, 5)))


def region(name: str = "layers.0.experts", **changes: Any) -> RegionRecord:
    """Return a rewritten region with both pictures, with `changes` made."""
    fields: dict[str, Any] = {
        "name": name,
        "graph_id": 0,
        "status": "portable",
        "family": "all_to_all",
        "reason": None,
        "detail": "",
        "where": 'File "/home/user/model.py", line 41, in forward, code: y = self.experts(x)',
        "plan": {"activation": "silu_glu", "product_dtype": "torch.float32", "chunks": 2},
        "estimate": {"flops": 123_456_789, "link_bytes": 4 << 20},
        "backward": "portable",
        "before": before_picture(),
        "after": after_picture(),
    }
    return RegionRecord(**{**fields, **changes})


def refused(name: str = "layers.3.experts", **changes: Any) -> RegionRecord:
    """Return a region refused for dynamic splits, with a picture of what was left."""
    fields: dict[str, Any] = {
        "status": "rejected",
        "family": "unknown",
        "reason": "dynamic_splits",
        "detail": f"the splits of a2a are read in {SCRIPT}",
        "where": f'File "/home/user/model.py", line 77, in forward, code: {NASTY_CODE}',
        "plan": {},
        "estimate": {},
        "backward": "none",
        "after": None,
    }
    return region(name, **{**fields, **changes})


def graph(*regions: RegionRecord, graph_id: int = 0, **changes: Any) -> GraphRecord:
    """Return a training graph that holds `regions`."""
    fields: dict[str, Any] = {
        "graph_id": graph_id,
        "kind": "training",
        "num_nodes_before": 431,
        "num_nodes_after": 305,
        "seconds": 0.123,
        "regions": regions,
        "before_text": f"def forward(self, x):\n    y = x + 1  # {SCRIPT}\n" + "z = y * 2; " * 60,
        "after_text": "def forward(self, x):\n    return torch.ops.comet.moe_layer(x)\n",
    }
    return GraphRecord(**{**fields, **changes})


def report() -> Report:
    """Return two graphs with four regions, one of them refused, and one graph break."""
    first = graph(region("layers.0.experts"), region(LONG_NAME, status="fused", backward="fused"))
    second = graph(region("layers.2.experts", graph_id=1), refused(graph_id=1), graph_id=1)
    breaks = (GraphBreak(f"call to print({SCRIPT})", "/home/user/model.py:90"),)
    return Report((first, second), breaks, num_graphs=2)


def write_dumps(directory: str, process: int, number: int) -> None:
    """Write `number` dumps of equal names; here because a spawned process has to import it."""
    for i in range(number):
        write_dump(directory, graph(before_text=f"{process}.{i}"))
