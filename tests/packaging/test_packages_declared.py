"""What pyproject.toml declares is what the checkout holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = PYPROJECT["tool"]["setuptools"]["package-dir"]


def test_declared_packages_are_the_folders_with_an_init() -> None:
    # A folder that is missing here works in an editable install and is absent from the wheel.
    found = set()
    for package, folder in MAPPED.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *parts)))
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_modules_of_a_package_lie_in_a_declared_package() -> None:
    without_init = {
        str(module.parent.relative_to(ROOT))
        for folder in MAPPED.values()
        for module in (ROOT / folder).rglob("*.py")
        if not (module.parent / "__init__.py").exists()
    }
    assert without_init == set()


def test_no_top_level_import_name_but_ours_is_declared() -> None:
    assert {p.split(".")[0] for p in PYPROJECT["tool"]["setuptools"]["packages"]} == {
        "comet_compile"
    }


def test_constraints_pin_every_tool_of_the_development_extra() -> None:
    pins = (ROOT / "constraints" / "dev.txt").read_text()
    pinned = {line.split("==")[0] for line in pins.splitlines() if "==" in line}
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = {spec.split(">=")[0] for group in extras.values() for spec in group if ">=" in spec}
    wanted |= {spec.split(">=")[0] for spec in PYPROJECT["project"]["dependencies"]}
    assert wanted - pinned == set()
