"""The files of COMET_DUMP and the artefacts of the structured trace."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path

import hand_made
import pytest
import torch.distributed as dist
from torch._logging._internal import trace_log
from torch.testing._internal.distributed.fake_pg import FakeStore

from comet_compile import dump
from comet_compile.dump import is_tracing, trace_artifacts, write_dump


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_dump_holds_texts_plan_and_refusals(tmp_path: Path) -> None:
    record = hand_made.graph(hand_made.region(), hand_made.refused(), graph_id=3)
    folder = write_dump(tmp_path / "made" / "on_demand", record)
    assert folder is not None
    assert folder == tmp_path / "made" / "on_demand" / "rank0_graph3_training"
    assert names(folder) == {"before.txt", "after.txt", "plan.json", "rejected.txt"}
    assert (folder / "before.txt").read_text() == record.before_text
    assert (folder / "after.txt").read_text() == record.after_text
    document = json.loads((folder / "plan.json").read_text())
    assert document["graph"]["num_nodes_before"] == 431
    assert document["regions"][0]["plan"]["activation"] == "silu_glu"
    rejected = (folder / "rejected.txt").read_text()
    assert rejected.startswith("layers.3.experts\n")
    assert "dynamic_splits: the splits of a2a" in rejected
    assert "to change: " in rejected
    assert "layers.0.experts" not in rejected


def test_dump_without_refusals_has_no_file_of_them(tmp_path: Path) -> None:
    folder = write_dump(tmp_path, hand_made.graph(hand_made.region()))
    assert folder is not None
    assert "rejected.txt" not in names(folder)


def test_dump_is_as_readable_as_other_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    folder = write_dump(tmp_path, hand_made.graph())
    assert folder is not None
    assert folder.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert names(tmp_path) == {"other", folder.name}


def test_second_dump_of_a_name_gets_a_number(tmp_path: Path) -> None:
    record = hand_made.graph(hand_made.region())
    write_dump(tmp_path, record)
    write_dump(tmp_path, record)
    assert names(tmp_path) == {"rank0_graph0_training", "rank0_graph0_training_2"}


def test_dump_carries_the_rank(tmp_path: Path) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    try:
        folder = write_dump(tmp_path, hand_made.graph(kind="inference"))
    finally:
        dist.destroy_process_group()
    assert folder is not None
    assert folder.name == "rank2_graph0_inference"


def test_name_taken_between_look_and_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_dump(tmp_path, hand_made.graph(before_text="first"))
    assert first is not None
    exists, calls = Path.exists, iter([False])
    monkeypatch.setattr(Path, "exists", lambda self: next(calls, exists(self)))
    second = write_dump(tmp_path, hand_made.graph(before_text="second"))
    assert second is not None
    assert (first / "before.txt").read_text() == "first"
    assert (second / "before.txt").read_text() == "second"


def test_processes_do_not_clobber_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    num_processes, number = 3, 20
    processes = [
        context.Process(target=hand_made.write_dumps, args=(os.fspath(tmp_path), p, number))
        for p in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    written = {(folder / "before.txt").read_text() for folder in tmp_path.iterdir()}
    assert written == {f"{p}.{i}" for p in range(num_processes) for i in range(number)}
    assert len(names(tmp_path)) == num_processes * number


def test_dump_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING, logger="comet_compile.dump"):
        assert write_dump(tmp_path / "file", hand_made.graph(graph_id=5)) is None
    assert "could not write the dump of graph 5" in caplog.text


def test_dump_that_fails_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dump, "_claim", fail)
    assert write_dump(tmp_path, hand_made.graph()) is None
    assert names(tmp_path) == set()


class Sink(logging.Handler):
    """Keeps what the structured trace would write: {artefact name: (encoding, payload)}."""

    def __init__(self) -> None:
        super().__init__()
        self.artifacts: dict[str, tuple[str, str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        artifact = getattr(record, "metadata", {}).get("artifact")
        if artifact is not None:
            self.artifacts[artifact["name"]] = (artifact["encoding"], record.payload)  # type: ignore[attr-defined]


def test_trace_artifacts_reach_the_structured_trace() -> None:
    sink, record = Sink(), hand_made.graph(hand_made.region(), hand_made.refused())
    trace_log.addHandler(sink)
    try:
        assert is_tracing()
        trace_artifacts(record)
    finally:
        trace_log.removeHandler(sink)
    assert sink.artifacts["comet_before"] == ("string", record.before_text)
    assert sink.artifacts["comet_after"] == ("string", record.after_text)
    encoding, payload = sink.artifacts["comet_report"]
    assert encoding == "json"
    assert [r["status"] for r in json.loads(payload)["regions"]] == ["portable", "rejected"]
