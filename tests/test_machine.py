"""Measured machines: numbers that are fitted, the file that keeps them, and what a plan makes of
it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("triton", reason="triton is not installed")

from comet_compile import machine_fit, machine_probe
from comet_compile.cli import main
from comet_compile.errors import CometWarning
from comet_compile.kernels import machine_file, tuned
from comet_compile.kernels.backward_cost import predict_backward
from comet_compile.kernels.cost_model import H100, Load, predict
from comet_compile.kernels.unfused_cost import predict_unfused
from comet_compile.machine_fit import Observation

DEVICE = dataclasses.replace(H100.device, name="Another GPU", num_sms=144)
OTHER = dataclasses.replace(
    H100,
    name=DEVICE.name,
    device=DEVICE,
    gemm_tf=7.0,
    row_gemm_tf=7.5,
    memory_tb=4.0,
    fixed_us=20.0,
    hidden_gemm_tf=6.5,
    weight_gemm_tf=7.2,
    sync_us=50.0,
    torch_gemm_tf=8.0,
    unfused_us=30.0,
    nccl_gb=500.0,
)


def exactly(load: Load, phases: tuple[str, ...] = (), model: Any = predict) -> Observation:
    """What phases of a layer, all but top-k if none are named, take on OTHER."""
    names = phases or tuple(one.name for one in model(load, OTHER) if one.name != "top-k")
    us = sum(one.us for one in model(load, OTHER) if one.name in names)
    return Observation(load, us, phases, model)


def observed(ranks: int) -> list[Observation]:
    """What layers on OTHER take, exactly."""
    rows = []
    for sizes in machine_probe._LAYERS if ranks == 1 else machine_probe._EXCHANGES:
        hidden, inter, experts, top_k, tokens = sizes
        load = Load(hidden, inter, experts * ranks, top_k, (tokens,) * ranks)
        rows.append(exactly(load))
        if ranks == 1:
            rows.append(exactly(load, ("tables", "layer0")))
            rows.append(exactly(load, model=predict_backward))
            rows.append(exactly(load, model=predict_unfused))
    return rows


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache directory of tuned plans and measured machines."""
    for module in (machine_file, tuned):
        monkeypatch.setattr(module, "tuned_folder", lambda: tmp_path)
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    machine_file.measured_machine.cache_clear()
    yield tmp_path
    machine_file.measured_machine.cache_clear()


def test_a_machine_is_found_from_what_layers_take_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        def size(self) -> int:
            return 2

    links = {name: getattr(OTHER, name) for name in machine_file.LINKS}
    topk = {"topk_us": OTHER.topk_us, "topk_element_ns": OTHER.topk_element_ns}
    monkeypatch.setattr(machine_probe, "_observe", lambda say: observed(1))
    monkeypatch.setattr(machine_probe, "_observe_exchanges", lambda group, say: observed(2))
    monkeypatch.setattr(machine_probe, "_topk", lambda: topk)
    monkeypatch.setattr(machine_probe, "_links", lambda group, num_sms, say: links)
    monkeypatch.setattr(machine_probe, "_nccl", lambda group, say: {"nccl_gb": OTHER.nccl_gb})
    found, error = machine_probe.measure_machine(Group(), DEVICE, print)
    assert error < 0.01
    assert found.device == DEVICE
    for name in machine_file.NUMBERS:
        # two that only one time depends on keep the ratio they have on an H100
        rel = 0.1 if name in machine_fit.BACKWARD else 0.01
        assert getattr(found, name) == pytest.approx(getattr(OTHER, name), rel=rel), name


def test_every_number_of_a_machine_is_fitted_or_measured() -> None:
    fitted = {*machine_fit.FORWARD, *machine_fit.LINKED, *machine_fit.BACKWARD}
    measured = {"topk_us", "topk_element_ns", "nccl_gb"}
    assert fitted | measured | {*machine_fit.UNFUSED} == set(machine_file.NUMBERS)


def test_what_is_written_is_read_again(folder: Path) -> None:
    path = machine_file.machine_path(DEVICE)
    machine_probe.write_machine(OTHER, 0.0312, 2, path, DEVICE)
    assert machine_file.read_machine(path, DEVICE) == OTHER
    assert machine_file.machine_of(DEVICE) == OTHER
    assert machine_file.machine_of(DEVICE, use_file=False) is None
    document = json.loads(path.read_text())
    assert document["median_error"] == 0.0312
    assert document["ranks"] == 2
    assert list(folder.iterdir()) == [path], "nothing half written is left"


def test_one_gpu_tells_nothing_of_links(folder: Path) -> None:
    path = machine_file.machine_path(DEVICE)
    other = dataclasses.replace(
        OTHER, pull_gb=((8, 1.0),), push_gb=((8, 1.0),), sync_us=1.0, nccl_gb=2.0
    )
    machine_probe.write_machine(other, 0.01, 1, path, DEVICE)
    found = machine_file.read_machine(path, DEVICE)
    assert (found.pull_gb, found.push_gb) == (H100.pull_gb, H100.push_gb)
    assert (found.sync_us, found.nccl_gb) == (H100.sync_us, H100.nccl_gb)
    assert found.gemm_tf == OTHER.gemm_tf


def test_tables_switched_off_are_machines_switched_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_probe.write_machine(OTHER, 0.01, 2, machine_file.machine_path(DEVICE), DEVICE)
    monkeypatch.setenv(tuned.VARIABLE, "0")
    assert machine_file.machine_of(DEVICE) is None


def test_ranks_notice_that_they_have_measured_differently(folder: Path) -> None:
    without = machine_file.digest(DEVICE)
    machine_file.measured_machine.cache_clear()
    machine_probe.write_machine(OTHER, 0.01, 2, machine_file.machine_path(DEVICE), DEVICE)
    measured = machine_file.digest(DEVICE)
    assert measured != without


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": 2}, "its format is 2, this version reads 1"),
    "device": ({"device": {"name": "a GPU"}}, "it is for {'name': 'a GPU'}, this is"),
    "triton": ({"versions": {"triton": "1.0.0"}}, "measured with Triton 1.0.0"),
    "no numbers": ({"machine": None}, "not as `comet doctor --measure` writes it"),
    "unknown": ({"machine": {"speed": 1.0}}, "not as `comet doctor --measure` writes it"),
    "zero": ({"machine": {"gemm_tf": 0}}, "its gemm_tf is 0; allowed: a number above 0"),
    "nan": ({"machine": {"gemm_tf": float("nan")}}, "its gemm_tf is nan"),
    "true": ({"machine": {"gemm_tf": True}}, "its gemm_tf is True"),
    "text": ({"machine": {"gemm_tf": "fast"}}, "its gemm_tf is 'fast'"),
    "rates": ({"machine": {"pull_gb": [[8, 1.0], [4, 2.0]]}}, "its pull_gb are no rates"),
    "no rates": ({"machine": {"push_gb": []}}, "its push_gb are no rates"),
    "no pairs": ({"machine": {"push_gb": [8, 1.0]}}, "its push_gb are no rates"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_cannot_be_used_is_named_and_passed_over(name: str, folder: Path) -> None:
    changes, message = CHANGES[name]
    path = machine_file.machine_path(DEVICE)
    machine_probe.write_machine(OTHER, 0.01, 2, path, DEVICE)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.warns(CometWarning) as said:
        assert machine_file.machine_of(DEVICE) is None
    assert message in str(said[0].message)
    assert str(path) in str(said[0].message)


def test_a_broken_file_is_named(folder: Path) -> None:
    path = machine_file.machine_path(DEVICE)
    path.write_text('{"format": 1, ')
    with pytest.warns(CometWarning, match="it is not JSON"):
        assert machine_file.machine_of(DEVICE) is None
    path.write_text("[]")
    machine_file.measured_machine.cache_clear()
    with pytest.warns(CometWarning, match="it holds no object"):
        assert machine_file.machine_of(DEVICE) is None


def test_measuring_needs_a_gpu() -> None:
    result = CliRunner().invoke(main, ["doctor", "--measure"])
    assert result.exit_code == 1
    assert "comet doctor --measure measures on an NVIDIA GPU" in result.output
