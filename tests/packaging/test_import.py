"""What importing the package does and does not do, each in an interpreter of its own."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import comet_compile

ROOT = Path(__file__).parents[2]


def run_python(code: str, cwd: Path | None = None, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_import_is_light(tmp_path: Path) -> None:
    result = run_python(
        "import sys, comet_compile\n"
        "print(comet_compile.__version__, [m for m in ('torch', 'triton') if m in sys.modules])",
        tmp_path,
    )
    assert result.stdout == f"{comet_compile.__version__} []\n", result.stderr


def test_config_needs_no_torch(tmp_path: Path) -> None:
    result = run_python(
        "import sys, comet_compile\n"
        "comet_compile.CometConfig.from_options({'comet.strict': True})\n"
        "print('torch' in sys.modules)",
        tmp_path,
    )
    assert result.stdout == "False\n", result.stderr


def test_loading_the_backend_touches_no_gpu(tmp_path: Path) -> None:
    result = run_python(
        "import torch\ntorch._dynamo.lookup_backend('comet')\nprint(torch.cuda.is_initialized())",
        tmp_path,
    )
    assert result.stdout == "False\n", result.stderr


def test_passes_load_no_triton(tmp_path: Path) -> None:
    # torch itself may load it; the passes must add nothing
    result = run_python(
        "import sys, torch._inductor.compile_fx\n"
        "before = 'triton' in sys.modules\n"
        "import comet_compile.passes\n"
        "print(('triton' in sys.modules) == before)",
        tmp_path,
    )
    assert result.stdout == "True\n", result.stderr


def test_entry_point_names_the_backend() -> None:
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="comet")
    assert entry.value == "comet_compile.backend:comet"


def test_dynamo_lists_the_backend_without_an_import(tmp_path: Path) -> None:
    result = run_python("import torch._dynamo as d; print('comet' in d.list_backends())", tmp_path)
    assert result.stdout == "True\n", result.stderr


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_bare_import_from_the_checkout_is_refused(folder: str) -> None:
    # ImportError, as whoever probes for another package of that name expects
    code = f"import sys; sys.path.insert(0, '.')\ntry:\n    import {folder}\n"
    code += "except ImportError as error:\n    print(error)"
    result = run_python(code, ROOT)
    assert f"installed as comet_compile.{folder}" in result.stdout, result.stderr


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fuse'"):
        comet_compile.fuse  # noqa: B018
