"""`comet tune` with a made-up clock: what it finds, keeps, goes on with, and refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("triton", reason="plans need Triton")

from comet_compile import tuner, tuning_bar, tuning_file
from comet_compile.cli import main
from comet_compile.kernels import tuned
from comet_compile.kernels.exchange_plan import ExchangePlan
from comet_compile.kernels.plan import Device, GemmTiles, Plan, choose_plan
from comet_compile.layer_sizes import LayerSizeError, sizes_of_config
from comet_compile.tuner import Job
from comet_compile.tuning_layer import LayerSize
from comet_compile.tuning_search import Search, padded_work

H100 = Device(132, 232448, (9, 0), "NVIDIA H100 80GB HBM3")
SIZE = LayerSize(2048, 768, 128, 8, 4096)
FORWARD, BACKWARD = Job(SIZE, 1, "forward"), Job(SIZE, 1, "backward")
PLAN = choose_plan(4096 * 8, 128, 2048, 768, gated=True, interleaved=False, device=H100)
EXCHANGE = ExchangePlan(PLAN, 4096, num_fetchers=24, num_senders=0, lead=(0.25, 0.25))

Clock = Callable[[Any], float]


def likes_groups(plan: Any) -> float:
    """A layer that is fastest with layer0.group_m = 32 and layer1.num_stages = 2."""
    gemms: Plan = plan if isinstance(plan, Plan) else plan.gemms
    steps = abs(math.log2(gemms.layer0.group_m / 32)) + abs(gemms.layer1.num_stages - 2)
    return 100.0 + 5 * steps


def search_of(
    clock: Clock, job: Job = FORWARD, plan: Any = PLAN, measured: list[Any] | None = None
) -> Search:
    def measure(plans: Sequence[Any]) -> list[float]:
        if measured is not None:
            measured.extend(plans)
        return [clock(one) for one in plans]

    return Search(job.shape, job.direction, plan, H100, measure)


# -- what is found -----------------------------------------------------------------------------


def test_the_fastest_neighbours_are_found() -> None:
    search = search_of(likes_groups)
    search.run()
    assert search.best == {"layer0.group_m": 32, "layer1.num_stages": 2}
    assert (search.measured_rule, search.measured_best) == (likes_groups(PLAN), 100.0)


def test_a_gain_below_the_noise_is_none() -> None:
    search = search_of(lambda plan: 100.0 - 0.001 * plan.layer0.group_m)
    search.run()
    assert search.best == {}
    assert search.measured_best == search.measured_rule


def test_what_turns_out_slower_in_the_end_is_dropped() -> None:
    calls = itertools.count()
    # the rule's plan is slow at first, while a candidate is compared with it
    search = search_of(lambda plan: 200.0 if plan == PLAN and next(calls) < 1 else 100.0)
    search.run()
    assert search.best == {}


def test_plans_that_cannot_run_or_compute_otherwise_are_left() -> None:
    search = search_of(lambda plan: math.inf if plan != PLAN else 100.0)
    search.run()
    assert search.best == {}
    assert search.num_tried > 5


def test_only_plans_that_the_device_can_run_are_measured() -> None:
    measured: list[Any] = []
    search = search_of(lambda plan: 100.0, measured=measured)
    search.run()
    assert search.num_pruned > 0
    for plan in measured:
        for gemm in ("layer0", "layer1"):
            tiles: GemmTiles = getattr(plan, gemm)
            columns = tiles.block_n * (2 if gemm == "layer0" else 1)
            stored = tiles.block_m * tiles.block_n * 2
            used = tiles.num_stages * (tiles.block_m + columns) * tiles.block_k * 2 + stored
            assert used <= H100.shared_bytes
        assert plan.grad_weight == PLAN.grad_weight, "the forward's search leaves the backward"


def test_the_backward_leaves_what_the_forward_shares_with_it() -> None:
    measured: list[Any] = []
    search = search_of(lambda plan: 100.0, BACKWARD, measured=measured)
    search.run()
    assert {plan.layer0 for plan in measured} == {PLAN.layer0}
    assert {plan.layer1 for plan in measured} == {PLAN.layer1}
    assert len({plan.grad_weight for plan in measured}) > 1


def test_an_exchange_is_tuned_in_its_own_fields_too() -> None:
    def clock(plan: Any) -> float:
        away = abs(plan.num_fetchers - 12) + abs(plan.num_senders - 4)
        return 100.0 + away + 10 * abs(plan.lead[0] - 0.6)

    job = Job(SIZE, 2, "forward")
    search = search_of(clock, job, EXCHANGE)
    search.run()
    assert search.best == {"num_fetchers": 12, "num_senders": 4, "lead": (0.6, 0.25)}


def test_padded_work() -> None:
    tiles = GemmTiles(64, 128, 64, 4, 3, 8, num_programs=4)
    # 2 experts of 65 rows are 4 tiles of rows, 200 columns 2 of columns: 2 rounds of 4 programs
    assert padded_work(tiles, rows=130, experts=2, columns=200) == 2 * 64 * 128
    assert padded_work(tiles, rows=1, experts=100, columns=128) == 64 * 128


# -- what is kept ------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "table.json"


def tune(table: Path, clock: Clock, jobs: Sequence[Job] = (FORWARD,), **options: Any) -> Any:
    return tuner.tune(
        jobs,
        None,
        table,
        H100,
        make_search=lambda job, group, device: search_of(clock, job),
        **options,
    )


def entries(table: Path) -> dict[str, dict[str, Any]]:
    return {entry["direction"]: entry for entry in json.loads(table.read_text())["entries"]}


def test_what_is_found_is_what_a_plan_then_takes(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(table, likes_groups)
    entry = entries(table)["forward"]
    assert entry["changes"] == {"layer0.group_m": 32, "layer1.num_stages": 2}
    assert entry["us"] == {"rule": likes_groups(PLAN), "tuned": 100.0}
    assert entry["complete"] is True
    assert entry["command"].startswith("comet")
    monkeypatch.setenv(tuned.VARIABLE, str(table))
    tuned.tables.cache_clear()
    plan = tuned.apply(PLAN, FORWARD.shape, H100)
    assert (plan.layer0.group_m, plan.layer1.num_stages) == (32, 2)
    assert plan.source == f"planned by {table}"
    tuned.tables.cache_clear()


def test_a_later_run_tunes_only_what_is_new(table: Path) -> None:
    assert len(tune(table, likes_groups)) == 1
    assert [s.direction for s in tune(table, likes_groups, (FORWARD, BACKWARD))] == ["backward"]
    assert tune(table, likes_groups, (FORWARD, BACKWARD)) == []
    assert len(tune(table, likes_groups, (FORWARD, BACKWARD), again=True)) == 2


def test_an_interrupted_search_keeps_its_best_and_is_gone_on_with(table: Path) -> None:
    def interrupted(plan: Any) -> float:
        if plan.layer0.group_m == 32 and plan.layer1.num_stages != PLAN.layer1.num_stages:
            raise KeyboardInterrupt
        return likes_groups(plan)

    with pytest.raises(KeyboardInterrupt):
        tune(table, interrupted, (FORWARD, BACKWARD))
    left = entries(table)
    assert list(left) == ["forward"], "what was not begun is not there"
    assert left["forward"]["complete"] is False
    assert left["forward"]["changes"] == {"layer0.group_m": 32}

    measured: list[Any] = []
    tuner.tune(
        (FORWARD,),
        None,
        table,
        H100,
        make_search=lambda job, group, device: search_of(likes_groups, job, measured=measured),
    )
    assert measured[0].layer0.group_m == 32, "it starts from what was found"
    assert entries(table)["forward"]["complete"] is True
    assert entries(table)["forward"]["changes"] == {"layer0.group_m": 32, "layer1.num_stages": 2}


def test_a_file_that_cannot_be_gone_on_with_is_set_aside(table: Path) -> None:
    table.parent.mkdir()
    table.write_text('{"format": 1, "entr')
    said: list[str] = []
    tune(table, likes_groups, progress=tuner.Progress(say=said.append))
    assert list(entries(table)) == ["forward"]
    assert table.with_name("table.json.old").read_text() == '{"format": 1, "entr'
    (text,) = said
    assert "could not be gone on with: it is not JSON" in text
    assert "table.json.old" in text


def test_a_write_that_fails_leaves_the_table_whole(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(table, likes_groups)
    before = table.read_text()

    def no_space(source: str, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning_file.os, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        tune(table, likes_groups, (BACKWARD,))
    assert table.read_text() == before
    assert {path.name for path in table.parent.iterdir()} <= {"table.json", "table.json.lock"}


def write_many(path: str, direction: str, count: int) -> None:
    for number in range(count):
        size = dataclasses.replace(SIZE, tokens=2**number)
        search = search_of(likes_groups, Job(size, 1, direction))
        entry = tuning_file.entry_of(search, complete=True)
        tuning_file.add_entry(Path(path), H100, entry, print)


def test_two_processes_that_tune_at_once_lose_nothing(table: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=write_many, args=(str(table), direction, 8))
        for direction in tuner.DIRECTIONS
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if table.exists():
            json.loads(table.read_text())  # whole at any time
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(json.loads(table.read_text())["entries"]) == 16


def test_a_lock_that_is_not_let_go_is_named(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    monkeypatch.setattr(tuning_file, "_LOCK_SECONDS", 0.05)
    table.parent.mkdir()
    with (
        filelock.FileLock(f"{table}.lock"),
        pytest.raises(TimeoutError, match=r"table\.json\.lock for 0\.05 s"),
    ):
        tune(table, likes_groups)


# -- the command -------------------------------------------------------------------------------


def comet(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["tune", *arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to tune: give --shapes or --model"),
        (("--shapes", "2048x768"), "'2048x768' is no shape; allowed: hidden x intermediate"),
        (("--shapes", "axbxcxd"), "'axbxcxd' is no shape"),
        (("--shapes", "2047x768x8x2"), "sizes 2047 and 768; allowed: multiples of 8"),
        (("--shapes", "64x64x8x9"), "top-9 of 8 experts; allowed: 1 to 8"),
        (("--shapes", "64x64x8x2", "--ep", "3"), "3 ranks cannot share 8 experts evenly"),
        (("--shapes", "64x64x8x2", "--tokens", "0"), "Invalid value for '--tokens'"),
        (("--model", "no_such_model"), "no_such_model"),
    ],
)
def test_what_makes_no_job_is_said(arguments: tuple[str, ...], message: str) -> None:
    if "--model" in arguments:
        pytest.importorskip("transformers")
    result = comet(*arguments)
    assert result.exit_code != 0
    assert message in result.output


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner.torch.cuda, "is_available", lambda: False)
    result = comet("--shapes", "64x64x8x2")
    assert result.exit_code == 1
    assert "measures on an NVIDIA GPU, and this machine shows none" in result.output


def test_ranks_that_were_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    result = comet("--shapes", "64x64x8x2", "--ep", "2")
    assert result.exit_code == 1
    assert "torchrun --nproc-per-node 2 --no-python comet tune --ep 2" in result.output


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command as on a GPU, with the made-up clock; returns the cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuner, "join_ranks", lambda ranks: None)
    monkeypatch.setattr(tuning_bar, "this_device", lambda: H100)
    monkeypatch.setattr(
        tuner, "_make_search", lambda job, group, device: search_of(likes_groups, job)
    )
    return tmp_path


def test_the_command_writes_this_gpus_table_and_says_where(command: Path) -> None:
    arguments = ("--shapes", "2048x768x128x8", "--tokens", "4096", "--direction", "forward")
    result = comet(*arguments)
    assert result.exit_code == 0, result.output
    path = command / "comet_compile" / "tuned" / "nvidia-h100-80gb-hbm3.json"
    assert str(path) in result.output.replace("\n", "")
    assert list(entries(path)) == ["forward"]
    assert "layer0.group_m = 32" in result.output
    again = comet(*arguments)
    assert "1 of 1 were there already" in again.output


def test_ctrl_c(command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(plan: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "_make_search", lambda job, group, device: search_of(stop, job))
    result = comet("--shapes", "2048x768x128x8", "--out", str(command / "mine.json"))
    assert result.exit_code == 1
    assert "the same command goes on with the rest" in result.output


def test_sizes_of_hugging_face_configs() -> None:
    transformers = pytest.importorskip("transformers")
    for_model = transformers.AutoConfig.for_model
    for name, sizes in {
        "qwen3_moe": (2048, 768, 128, 8),
        "mixtral": (4096, 14336, 8, 2),
        "olmoe": (2048, 2048, 64, 8),
        "deepseek_v3": (7168, 2048, 256, 8),
        "gpt_oss": (2880, 2880, 128, 4),
    }.items():
        assert sizes_of_config(for_model(name)) == sizes, name
    with pytest.raises(LayerSizeError, match="a llama config names no number of experts"):
        sizes_of_config(for_model("llama"))


def test_shapes_that_fall_into_one_class_are_one_job() -> None:
    sizes = [(64, 64, 8, 2), (64, 64, 8, 2)]
    jobs = tuner.jobs_for(sizes, [1000, 1024, 2048], 2, ["forward"], gated=True)
    assert [job.size.tokens for job in jobs] == [1000, 2048]
    assert {job.shape.experts for job in jobs} == {4}
