"""Time MoE layers under comet beside eager, Inductor and torch's bare GEMMs, in one run.

    python benchmarks/moe_layer.py --suite local block --out local.json
    python benchmarks/moe_layer.py --suite ep --out ep.json              # a process per GPU
    torchrun --nproc-per-node 2 benchmarks/moe_layer.py --suite ep --out ep.json
    python benchmarks/moe_layer.py --suite local --device cpu --tiny     # a try without a GPU

`--list` names the cases and `--help` the options; README.md says what is measured and how. The
code lies in the folder moe/ beside this file.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def load_package() -> None:
    """Import the folder moe/ as the package `moe_bench`, wherever Python was started."""
    init = Path(__file__).resolve().parent / "moe" / "__init__.py"
    spec = importlib.util.spec_from_file_location("moe_bench", init)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["moe_bench"] = module
    spec.loader.exec_module(module)


def main() -> int:
    """Run the benchmark; the exit code is 0 even where single rows failed (they say so)."""
    load_package()
    from moe_bench.cli import run  # type: ignore[import-not-found]

    return run(sys.argv, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
