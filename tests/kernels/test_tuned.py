"""Tables of tuned plans: which is asked, what is refused and said, and what ranks agree on."""

from __future__ import annotations

import dataclasses
import doctest
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import triton

import comet_compile
from comet_compile.errors import CometWarning
from comet_compile.kernels import tuned
from comet_compile.kernels.exchange_plan import ExchangePlan
from comet_compile.kernels.plan import Device, Plan, choose_plan
from comet_compile.kernels.plan_changes import PlanChangeError, change

SHIPPED = Path(comet_compile.__file__).parent / "tuned"
H100 = Device(132, 232448, (9, 0), "NVIDIA H100 80GB HBM3")
SHAPE = tuned.Shape(1, 4096, 8, 128, 2048, 768, True, False, 2)
PLAN = choose_plan(4096 * 8, 128, 2048, 768, gated=True, interleaved=False, device=H100)
EXCHANGE = ExchangePlan(PLAN, 4096, num_fetchers=24, num_senders=0, lead=(0.25, 0.25))


def document(changes: dict[str, Any] | None = None, **other: Any) -> dict[str, Any]:
    entry = {
        "shape": dataclasses.asdict(SHAPE),
        "direction": "forward",
        "complete": True,
        "changes": {"layer0.group_m": 16} if changes is None else changes,
    }
    return {
        "format": tuned.FORMAT,
        "device": tuned.describe(H100),
        "versions": {"triton": triton.__version__},
        "entries": [entry],
        **other,
    }


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A user's cache directory, empty, and no table in the package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.setattr(tuned, "shipped_file", lambda device: tmp_path / "shipped.json")
    tuned.tables.cache_clear()
    yield tmp_path
    tuned.tables.cache_clear()


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_buckets() -> None:
    assert doctest.testmod(tuned).failed == 0


def test_without_a_table_the_plan_is_the_rules(home: Path) -> None:
    assert tuned.apply(PLAN, SHAPE, H100) == PLAN
    assert PLAN.as_dict()["source"] == "planned by rule"


def test_a_table_changes_the_plan_and_is_named(home: Path) -> None:
    path = write(tuned.cached_file(H100), document())
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    found = tuned.apply(PLAN, SHAPE, H100)
    assert found.layer0 == dataclasses.replace(PLAN.layer0, group_m=16)
    assert found.as_dict()["source"] == f"planned by {path}"
    assert tuned.apply(EXCHANGE, SHAPE, H100).as_dict()["source"] == f"planned by {path}"


def test_other_shapes_keep_theirs(home: Path) -> None:
    write(tuned.cached_file(H100), document())
    for field in dataclasses.fields(SHAPE):
        value = getattr(SHAPE, field.name)
        other = dataclasses.replace(
            SHAPE, **{field.name: not value if isinstance(value, bool) else 2 * value}
        )
        assert tuned.apply(PLAN, other, H100) == PLAN, field.name


def test_the_named_file_is_asked_before_the_cached_before_the_shipped(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = write(home / "shipped.json", document({"layer0.group_m": 2}))
    assert tuned.apply(PLAN, SHAPE, H100).layer0.group_m == 2
    tuned.tables.cache_clear()
    write(tuned.cached_file(H100), document({"layer0.group_m": 4}))
    assert tuned.apply(PLAN, SHAPE, H100).layer0.group_m == 4
    named = write(home / "mine.json", document({"layer0.group_m": 32}))
    monkeypatch.setenv(tuned.VARIABLE, str(named))
    tuned.tables.cache_clear()
    assert tuned.apply(PLAN, SHAPE, H100).layer0.group_m == 32
    for off in tuned.OFF:
        monkeypatch.setenv(tuned.VARIABLE, off)
        tuned.tables.cache_clear()
        assert tuned.apply(PLAN, SHAPE, H100) == PLAN
    assert shipped.exists()


BROKEN: dict[str, tuple[Callable[[], object], str]] = {
    "torn": (lambda: json.dumps(document())[:-20], "it is not JSON"),
    "empty": (lambda: "", "it is not JSON"),
    "not a table": (lambda: [1, 2], "it holds no object"),
    "no entries": (lambda: document(entries=3), "it has no entries"),
    "a later format": (lambda: document(format=99), "its format is 99, this version reads 1"),
    "another device": (
        lambda: document(device=tuned.describe(dataclasses.replace(H100, name="A100"))),
        "it is for {'name': 'A100'",
    ),
    "another Triton": (
        lambda: document(versions={"triton": "2.1.0"}),
        "it was measured with Triton 2.1.0",
    ),
    "no versions": (lambda: document(versions=None), "it was measured with Triton unknown"),
    "a strange entry": (lambda: document(entries=[{"shape": {"rows": 3}}]), "entry 0 is not as"),
    "an entry without its end": (
        lambda: document(entries=[{"shape": {}, "changes": {}, "direction": "forward"}]),
        "entry 0 is not as",
    ),
    "a shape of lists": (
        lambda: document(
            entries=[
                {**document()["entries"][0], "shape": {**dataclasses.asdict(SHAPE), "ranks": []}}
            ]
        ),
        "entry 0 is not as",
    ),
    "an entry that is a list": (lambda: document(entries=[[]]), "entry 0 is not as"),
    "a change that is none": (lambda: document({"layer0.colour": 3}), "'layer0.colour' is no"),
    "too many steps": (lambda: document({"layer0.num_stages": 8}), "do not fit into shared"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_used_is_named_and_the_next_source_asked(home: Path, name: str) -> None:
    content, message = BROKEN[name]
    path = write(tuned.cached_file(H100), content())
    write(home / "shipped.json", document({"layer0.group_m": 2}))
    with pytest.warns(CometWarning) as caught:
        assert tuned.apply(PLAN, SHAPE, H100).layer0.group_m == 2
    (text,) = (str(one.message) for one in caught)
    assert str(path) in text
    assert message in text


def test_a_shipped_table_of_another_triton_is_passed_over_in_silence(home: Path) -> None:
    write(home / "shipped.json", document(versions={"triton": "1.0.0"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.apply(PLAN, SHAPE, H100) == PLAN


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_can_be_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = json.loads(path.read_text())
    about = written["device"]
    device = Device(about["num_sms"], 232448, tuple(about["capability"]), about["name"])
    assert tuned.shipped_file(device) == path
    # in reports there is no path of the machine
    assert tuned._name(path, device) == f"comet_compile/tuned/{path.name}"
    monkeypatch.setattr(tuned, "TRITON", written["versions"]["triton"])
    table = tuned.Table.read(path, device)
    assert table.changes
    for entry in written["entries"]:
        assert entry["complete"], "a search that was interrupted is no plan to ship"
        assert entry["us"]["tuned"] <= entry["us"]["rule"]
        shape = tuned.Shape(**entry["shape"])
        plan: Plan | ExchangePlan = choose_plan(
            shape.tokens * shape.top_k, shape.experts, shape.hidden, shape.inter,
            gated=shape.gated, interleaved=shape.interleaved, device=device,
        )  # fmt: skip
        if shape.ranks > 1:
            plan = ExchangePlan(plan, shape.tokens, 24, 0, (0.2, 0.1))
        change(plan, table.changes[shape], gated=shape.gated, device=device)


def test_a_named_file_that_is_not_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned.VARIABLE, str(home / "none.json"))
    with pytest.warns(CometWarning, match="none.json are not used: it cannot be read"):
        assert tuned.apply(PLAN, SHAPE, H100) == PLAN
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert tuned.apply(PLAN, SHAPE, H100) == PLAN


def test_without_platformdirs_there_is_no_cache(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tuned.cached_file(H100), document())
    write(home / "shipped.json", document({"layer0.group_m": 2}))
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert tuned.apply(PLAN, SHAPE, H100).layer0.group_m == 2


@pytest.mark.parametrize(
    ("plan", "changes", "message"),
    [
        (PLAN, {"layer0.block_m": 64}, "no field that may change"),
        (PLAN, {"layer0.num_programs": 64}, "no field that may change"),
        (PLAN, {"num_fetchers": 4}, "no field that may change"),
        (PLAN, {"source": "mine"}, "no field that may change"),
        (PLAN, {"layer1.block_n": 96}, "powers of 2 from 16 to 256"),
        (PLAN, {"layer1.block_n": 512}, "powers of 2 from 16 to 256"),
        (PLAN, {"layer1.block_n": "128"}, "powers of 2 from 16 to 256"),
        (PLAN, {"layer1.num_warps": 4}, "no field that may change"),
        (PLAN, {"layer0.store_n": 64}, "no field that may change"),
        (PLAN, {"grad_weight.store_n": 48}, "powers of 2 from 16 to 256"),
        (PLAN, {"layer1.num_stages": 0}, "allowed: 1 to 8"),
        (PLAN, {"layer1.num_stages": True}, "allowed: 1 to 8"),
        (PLAN, {"layer1.group_m": 0}, "allowed: 1 to 64"),
        (PLAN, {"layer1.flat": 1}, "allowed: true and false"),
        (PLAN, {"layer0.flat": True}, "no field that may change"),
        (PLAN, {"grad_hidden.paced": True}, "both paced and flat"),
        (EXCHANGE, {"num_fetchers": 0}, "num_fetchers is 0; allowed: 1 to 66"),
        (EXCHANGE, {"num_senders": 132}, "num_senders is 132; allowed: 0 to 66"),
        (EXCHANGE, {"lead": (0.5,)}, "two parts from 0 to 1"),
        (EXCHANGE, {"lead": (0.5, 1.5)}, "two parts from 0 to 1"),
        (EXCHANGE, {"capacity": 64}, "no field that may change"),
    ],
)
def test_changes_that_no_kernel_can_run(
    plan: Plan | ExchangePlan, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanChangeError, match=message):
        change(plan, changes, gated=True, device=H100)


def test_changes_of_an_exchange(home: Path) -> None:
    said = {"num_fetchers": 16, "lead": [0.5, 0.125], "layer1.group_m": 4}
    write(tuned.cached_file(H100), document(said))
    found = tuned.apply(EXCHANGE, SHAPE, H100)
    assert (found.num_fetchers, found.num_senders, found.lead) == (16, 0, (0.5, 0.125))
    assert found.gemms.layer1.group_m == 4
    assert found.capacity == EXCHANGE.capacity


def test_both_directions_of_a_shape_are_one_plan(home: Path) -> None:
    entries = document()["entries"]
    entries.append(
        {**entries[0], "changes": {"grad_weight.num_stages": 2}, "direction": "backward"}
    )
    write(tuned.cached_file(H100), document(entries=entries))
    found = tuned.apply(PLAN, SHAPE, H100)
    assert (found.layer0.group_m, found.grad_weight.num_stages) == (16, 2)


def test_a_digest_tells_tables_apart_and_not_where_they_lie(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest_of(name: str, content: object) -> str:
        monkeypatch.setenv(tuned.VARIABLE, str(write(home / name, content)))
        tuned.tables.cache_clear()
        return tuned.digest(H100)

    without = tuned.digest(H100)
    first = digest_of("a.json", document())
    assert first == digest_of("b.json", document(date="another day"))
    assert first != digest_of("c.json", document({"layer0.group_m": 4}))
    assert without not in (first, digest_of("d.json", document({"layer1.group_m": 16})))
