"""The wheel holds every module under one import name, the licence and the data files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("comet_compile", "passes", "kernels")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build a wheel from a copy of the sources; return the names of the files in it."""
    pytest.importorskip("build", reason="building a wheel needs the package 'build'")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"],
        cwd=copy,
        check=True,
        capture_output=True,
        timeout=240,
    )
    (wheel,) = (copy / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_every_module(wheel_names: set[str]) -> None:
    wanted = set()
    for folder in FOLDERS:
        inside = (
            Path("comet_compile") if folder == "comet_compile" else Path("comet_compile", folder)
        )
        for path in (ROOT / folder).rglob("*.py"):
            wanted.add((inside / path.relative_to(ROOT / folder)).as_posix())
    assert wanted - wheel_names == set()


def test_wheel_holds_the_data_files(wheel_names: set[str]) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "comet_compile").rglob("*")
        if path.suffix not in (".py", ".pyc") and path.is_file()
    }
    assert "comet_compile/py.typed" in wanted
    assert wanted - wheel_names == set()


def test_wheel_installs_one_import_name(wheel_names: set[str]) -> None:
    top = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"comet_compile"}


def test_wheel_carries_the_licence(wheel_names: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)
