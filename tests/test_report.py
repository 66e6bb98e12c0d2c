"""The text and JSON forms of a report, and the layout of its pictures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import subprocess
import sys

import hand_made
import pytest
import torch

from comet_compile.passes.reasons import RejectReason
from comet_compile.records import GraphPicture, PictureNode
from comet_compile.report import (
    GraphBreak,
    Report,
    advice_for,
    plain,
    short_place,
    short_plan,
    summary_line,
)
from comet_compile.report_html import render_html
from comet_compile.report_picture import layout_picture


def test_text_shows_each_region_with_its_place_and_the_reason_below() -> None:
    lines = str(hand_made.report()).splitlines()
    row = next(line for line in lines if line.startswith("layers.3.experts"))
    assert row.split() == ["layers.3.experts", "rejected", "unknown", "model.py:77", "none", "-"]
    below = "\n".join(lines[lines.index(row) + 1 :])
    assert below.startswith("    dynamic_splits: the splits of a2a are read in <script>")
    assert "to change: " + RejectReason.DYNAMIC_SPLITS.advice[:40] in below
    assert "rewrote 3 of 4 MoE regions in 2 graphs (1 rejected: dynamic_splits)" in lines
    assert any(line.split()[:1] == ["model.py:90"] and "call to print" in line for line in lines)


@pytest.mark.parametrize(
    ("backward", "bytes_saved", "below"),
    [
        ("fused", 65536, "8 experts; keeps 65.5 kB for its backward"),
        ("portable", 0, "8 experts; its backward computes its rows again"),
        ("none", 0, "8 experts"),
    ],
)
def test_text_says_what_a_layer_keeps(backward: str, bytes_saved: int, below: str) -> None:
    region = hand_made.region(
        backward=backward, detail="8 experts", estimate={"bytes_saved": bytes_saved}
    )
    report = Report((hand_made.graph(region),), num_graphs=1)
    assert f"    {below}" in str(report).splitlines()


@pytest.mark.parametrize("width", [80, 110, 200])
def test_text_is_as_wide_as_asked_and_loses_no_name(width: int) -> None:
    text = hand_made.report().to_text(width)
    assert max(map(len, text.splitlines())) <= width
    # a name longer than its column goes on in the next lines of the same column
    column = text.split("layers.0.experts", 1)[1].split("layers.2.experts", 1)[0]
    folded = "".join(line[:28].strip() for line in column.splitlines()[1:])
    assert hand_made.LONG_NAME in folded.replace("-", "")


def test_text_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = str(hand_made.report())
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert str(hand_made.report()) == expected
    assert "\x1b" not in expected


def test_empty_report_says_what_was_looked_for() -> None:
    assert str(Report((), num_graphs=2)).startswith("no MoE region found in 2 graphs\ncomet looks")
    assert "switched off" in str(Report(()))


def test_summary_counts_equal_reasons() -> None:
    regions = [
        hand_made.refused(reason="dynamic_splits"),
        hand_made.refused(reason="no_tokens"),
        hand_made.refused(reason="dynamic_splits"),
    ]
    expected = "rewrote 0 of 3 MoE regions in 1 graph (3 rejected: dynamic_splits x2, no_tokens)"
    assert summary_line(regions, 1) == expected
    assert summary_line([hand_made.region()], 1) == "rewrote 1 of 1 MoE region in 1 graph"


@pytest.mark.parametrize("reason", list(RejectReason))
def test_every_reason_has_advice(reason: RejectReason) -> None:
    advice = advice_for(reason.value)
    assert len(advice.split()) >= 5
    text = str(Report((hand_made.graph(hand_made.refused(reason=reason.value)),)))
    assert advice.split(".")[0] in " ".join(text.split())


def test_unknown_reason_falls_back_to_its_detail() -> None:
    assert advice_for("no_such_reason") == ""
    assert advice_for(None) == ""
    text = str(Report((hand_made.graph(hand_made.refused(reason="no_such_reason")),)))
    assert "no_such_reason: the splits of a2a" in text
    assert "to change" not in text


@pytest.mark.parametrize(
    ("where", "short"),
    [
        ('File "/a/b/model.py", line 3, in forward, code: x', "model.py:3"),
        ("/a/b/model.py:31", "model.py:31"),
        ("C:\\a\\model.py:31", "model.py:31"),
        ('File "/a b/model.py", line 3', "model.py:3"),
        ("<stdin>", "<stdin>"),
        ("", ""),
    ],
)
def test_short_place(where: str, short: str) -> None:
    assert short_place(where) == short


def test_short_plan_drops_whole_entries() -> None:
    plan = {"form": "local", "act": "silu_glu", "t": "torch.float32", "chunks": 2, "none": None}
    assert short_plan(plan) == "silu_glu, float32, chunks=2"
    assert short_plan(plan, 22) == "silu_glu, float32, ..."
    assert short_plan({}) == ""


def test_json_holds_the_contract_and_no_pictures() -> None:
    document = json.loads(hand_made.report().to_json())
    refused = document["regions"][3]
    names = {f.name for f in dataclasses.fields(hand_made.refused())} - {"before", "after"}
    assert set(refused) == names | {"advice"}
    assert refused["status"] == "rejected"
    assert refused["reason"] == "dynamic_splits"
    assert refused["advice"] == RejectReason.DYNAMIC_SPLITS.advice
    assert [g["num_regions"] for g in document["graphs"]] == [2, 2]
    assert document["graph_breaks"][0]["where"] == "/home/user/model.py:90"
    assert document["num_graphs"] == 2


def test_json_takes_what_json_does_not_know() -> None:
    plan = {"dtype": torch.bfloat16, "sizes": torch.Size([2, 3]), "ratio": float("nan"), 3: {"b"}}
    document = Report((hand_made.graph(hand_made.region(plan=plan)),)).to_json()
    assert json.loads(document, parse_constant=pytest.fail)["regions"][0]["plan"] == {
        "dtype": "torch.bfloat16",
        "sizes": [2, 3],
        "ratio": "nan",
        "3": ["b"],
    }
    assert plain(RejectReason.NO_TOKENS) == "no_tokens"


def test_report_module_loads_no_torch_and_no_templates() -> None:
    code = (
        "import sys, comet_compile.report\n"
        "from comet_compile.report import Report, GraphBreak\n"
        "str(Report((), (GraphBreak('r', 'w'),))), Report(()).to_json()\n"
        "sys.exit(' '.join({'torch', 'jinja2', 'networkx'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("missing", ["jinja2", "networkx"])
def test_html_without_its_packages_names_the_extra(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install comet-compile\[report\]"):
        render_html(hand_made.report())


def test_html_of_an_empty_report_explains_itself() -> None:
    page = render_html(Report((), (GraphBreak("a & b", "model.py:1"),), num_graphs=1))
    assert "no MoE region found in 1 graph" in page
    assert "comet looks for grouped expert GEMMs" in page
    assert "a &amp; b" in page


def random_picture(seed: int, num_nodes: int) -> GraphPicture:
    rng = random.Random(seed)
    nodes = tuple(
        PictureNode(f"n{i}", "aten.add.Tensor", "f32[2]", "compute") for i in range(num_nodes)
    )
    pairs = list(itertools.combinations(range(num_nodes), 2))
    return GraphPicture(nodes, tuple(rng.sample(pairs, min(len(pairs), 2 * num_nodes))))


@pytest.mark.parametrize(
    "picture",
    [hand_made.before_picture(), hand_made.after_picture()]
    + [random_picture(seed, n) for seed, n in enumerate((1, 2, 7, 25, 60))],
)
def test_layout_keeps_boxes_apart_inside_the_picture_and_edges_downward(
    picture: GraphPicture,
) -> None:
    layout = layout_picture(picture)
    assert len(layout.boxes) == len(picture.nodes)
    assert len(layout.links) == len(picture.edges)
    for a, b in itertools.combinations(layout.boxes, 2):
        apart_x = a.x + a.width <= b.x or b.x + b.width <= a.x
        assert apart_x or a.y + a.height <= b.y or b.y + b.height <= a.y
    for box in layout.boxes:
        assert box.x >= 0
        assert box.x + box.width <= layout.width
        assert box.y + box.height <= layout.height
    for a, b in picture.edges:
        assert layout.boxes[a].y < layout.boxes[b].y


def test_layout_puts_a_weight_beside_its_gemm() -> None:
    boxes = {
        box.tooltip.split()[0]: box for box in layout_picture(hand_made.before_picture()).boxes
    }
    layer_height = boxes["_grouped_mm_1"].y - boxes["_grouped_mm"].y
    assert boxes["_grouped_mm_1"].y - boxes["w_out"].y == pytest.approx(layer_height)


@pytest.mark.parametrize("edges", [((0, 1), (1, 0)), ((0, 0), (0, 1)), ()])
def test_layout_survives_loops_and_no_edges(edges: tuple[tuple[int, int], ...]) -> None:
    picture = dataclasses.replace(random_picture(0, 2), edges=edges)
    assert len(layout_picture(picture).boxes) == 2
    assert layout_picture(GraphPicture((), ())).boxes == ()
