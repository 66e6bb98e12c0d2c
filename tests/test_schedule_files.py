"""The files of a schedule: what a page shows, what is joined in it, and names that are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("jinja2", reason="jinja2 is not installed")

from comet_compile.cli import main
from comet_compile.kernels.schedule import FETCH, MULTIPLY, OTHER, SEND, WAIT, Schedule, Span
from comet_compile.schedule_files import ScheduleFileError, render_page, write_schedule

SCHEDULE = Schedule(
    [
        Span(0, None, OTHER, "tables", 0.0, 1000.0),
        Span(0, 0, FETCH, "fetch <turn 1>", 1000.0, 3000.0),
        Span(0, 1, MULTIPLY, "layer0, tile 0", 1000.0, 2000.0),
        Span(0, 1, MULTIPLY, "layer0, tile 2", 2000.1, 3000.0),
        Span(0, 1, WAIT, "wait for turn 1", 3000.0, 3500.0),
        Span(1, 0, SEND, "send block 4", 3500.0, 4000.0),
    ],
    num_ctas=2,
)


def test_a_page_shows_every_lane_and_needs_no_other_file() -> None:
    page = render_page(SCHEDULE, "a <layer>", "measured")
    assert "a &lt;layer&gt;" in page
    assert "4000 us, measured" in page
    assert not re.search(r"""(src|href)=|@import|url\(|<script""", page)
    rects = re.findall(r'<rect class="(\w+)" .*?<title>(.*?)</title>', page)
    assert rects == [
        ("other", "all CTAs: tables, 0.0 to 1000.0 us"),
        ("fetch", "CTA 0: fetch &lt;turn 1&gt;, 1000.0 to 3000.0 us"),
        # tiles that follow each other are one span; a change of what is done is not
        ("multiply", "CTA 1: layer0, tile 0 and 1 more, 1000.0 to 3000.0 us"),
        ("wait", "CTA 1: wait for turn 1, 3000.0 to 3500.0 us"),
        ("send", "CTA 0: send block 4, 3500.0 to 4000.0 us"),
    ]
    # rank 0: the other CTA multiplies while one fetches; rank 1: nobody does
    assert re.findall(r"(\d+ %) of the communication", page) == ["100 %", "0 %"]


def test_the_end_of_a_name_says_what_is_written(tmp_path: Path) -> None:
    write_schedule(SCHEDULE, tmp_path / "a.json", "layer", "measured")
    events = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    assert events[0]["args"]["name"] == "rank 0 (measured)"
    assert {"name": "send block 4", "cat": "send", "pid": 1, "tid": 0}.items() <= events[-1].items()
    write_schedule(SCHEDULE, tmp_path / "a.html", "layer", "measured")
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    with pytest.raises(ScheduleFileError, match=r"ends in '\.txt'; allowed: \.json"):
        write_schedule(SCHEDULE, tmp_path / "a.txt", "layer", "measured")


def test_simulate_refuses_a_name_before_it_begins(tmp_path: Path) -> None:
    arguments = ["simulate", "--shapes", "512x256x16x2", "--trace", str(tmp_path / "a.svg")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "ends in '.svg'" in result.output
    assert "predicted" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --shapes and --model"),
        (["--shapes", "512x256x16x2", "--model", "qwen3_moe"], "give one of --shapes and --model"),
        (["--shapes", "512x256"], "'512x256' is no shape"),
        (["--shapes", "512x256x15x2"], "2 ranks cannot share 15 experts evenly"),
        (["--shapes", "512x256x16x2", "--ep", "1"], "1 is not in the range"),
    ],
)
def test_trace_says_what_is_missing(arguments: list[str], message: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    result = CliRunner().invoke(main, ["trace", *arguments])
    assert result.exit_code != 0
    assert message in result.output
