"""Use an installed comet_compile as a user would; `make package` runs this outside the checkout."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import comet_compile


def main() -> None:
    assert "torch" not in sys.modules, "importing comet_compile imported torch"
    assert "triton" not in sys.modules, "importing comet_compile imported triton"

    import torch

    home = Path(comet_compile.__file__).resolve()
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"imported from {home}"
    assert importlib.metadata.version("comet-compile") == comet_compile.__version__
    assert "comet" in torch._dynamo.list_backends(), "the entry point was not found"

    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 4)
    x = torch.randn(2, 8)
    compiled = torch.compile(linear, backend="comet")
    torch.testing.assert_close(compiled(x), linear(x))
    assert not torch.cuda.is_initialized(), "a CPU model initialised CUDA"
    print(f"comet_compile {comet_compile.__version__} works from {home.parent}")


if __name__ == "__main__":
    main()
