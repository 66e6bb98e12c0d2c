"""Rules about the sources that no linter knows: who imports whom, and what is documented."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from comet_compile.config import CometConfig

ROOT = Path(__file__).parents[2]

# A layer may import its own and those in front of it.
LAYERS = ("base", "kernels", "passes", "door")
BASE = {"_version", "config", "errors", "records", "tuned_folder"}
FORBIDDEN = {
    "base": ("torch", "triton"),
    "kernels": ("torch._inductor", "comet_compile.passes"),
    "passes": ("triton",),
    "door": ("triton",),
}
# The passes call kernels through torch.ops alone. What they import registers the operators, tells
# their meaning in plain PyTorch (to prove regions against) and the path and plan of a layer
# (`paths`, asked in the terms of `experts` and `portable`), which the report shows.
KERNELS_OPEN_TO_PASSES = {"activation", "experts", "ops", "paths", "portable", "refs", "saved_rows"}


def modules() -> Iterator[tuple[str, str, Path]]:
    """Yield (layer, dotted name, path) of every module of the package."""
    for folder in ("comet_compile", "passes", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tail = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder != "comet_compile":
                yield folder, ".".join(("comet_compile", folder, *tail)), path
            elif tail[0] in BASE:
                yield "base", ".".join(("comet_compile", *tail)), path
            else:
                yield "door", ".".join(("comet_compile", *tail)), path


MODULES = list(modules())
IDS = [name for _, name, _ in MODULES]


def imported_names(path: Path) -> set[str]:
    """Return every dotted name that a module imports, inside functions and conditions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "comet_compile" or len(parts) == 1:
        return None
    if parts[1] in ("kernels", "passes"):
        return parts[1]
    return "base" if parts[1] in BASE | {"__version__"} else "door"


@pytest.mark.parametrize(("layer", "name", "path"), MODULES, ids=IDS)
def test_imports_point_one_way(layer: str, name: str, path: Path) -> None:
    wrong = [
        imported
        for imported in imported_names(path)
        if (target := layer_of(imported)) and LAYERS.index(target) > LAYERS.index(layer)
    ]
    assert wrong == [], f"{name} is of the layer {layer!r}"


@pytest.mark.parametrize(("layer", "name", "path"), MODULES, ids=IDS)
def test_forbidden_imports(layer: str, name: str, path: Path) -> None:
    wrong = [
        imported
        for imported in imported_names(path)
        for prefix in FORBIDDEN[layer]
        if imported == prefix or imported.startswith(prefix + ".")
    ]
    assert wrong == [], f"{name} is of the layer {layer!r}"


def test_passes_reach_kernels_through_operators() -> None:
    used = {
        imported.split(".")[2]
        for layer, _, path in MODULES
        if layer == "passes"
        for imported in imported_names(path)
        if imported.startswith("comet_compile.kernels.")
    }
    assert used <= KERNELS_OPEN_TO_PASSES


def test_a_wrong_import_is_seen(tmp_path: Path) -> None:
    module = tmp_path / "m.py"
    module.write_text("def f():\n    from comet_compile.passes import find\n")
    assert {layer_of(name) for name in imported_names(module)} == {"passes"}


@pytest.mark.parametrize(("layer", "name", "path"), MODULES, ids=IDS)
def test_module_starts_with_a_docstring(layer: str, name: str, path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name} ({layer}) says nothing"


def test_mypy_is_told_which_modules_hold_kernels() -> None:
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    told = next(one["module"] for one in overrides if one.get("disallow_untyped_defs") is False)
    assert told == [name for _, name, path in MODULES if "@triton.jit\n" in path.read_text()]


def documented_fields(cls: type) -> set[str]:
    """Return the fields of a class body that a string literal follows."""
    tree = ast.parse(inspect.getsource(cls))
    body = tree.body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }


def test_every_config_field_is_documented() -> None:
    names = {field.name for field in dataclasses.fields(CometConfig)}
    assert documented_fields(CometConfig) == names


def test_readme_lists_every_option_and_variable() -> None:
    readme = (ROOT / "README.md").read_text()
    for field in dataclasses.fields(CometConfig):
        assert f"`comet.{field.name}`" in readme
        assert f"`COMET_{field.name.upper()}`" in readme


def sources() -> list[Path]:
    folders = ("comet_compile", "passes", "kernels", "tests", "examples", "benchmarks")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_sources_are_ascii() -> None:
    assert [str(path) for path in sources() if not path.read_text().isascii()] == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name
)
def test_examples_have_a_main(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert ast.get_docstring(tree)
