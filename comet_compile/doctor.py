"""What this machine can do for comet: facts for ``comet doctor``, gathered without side effects.

A machine without a GPU is only asked whether it has one: no CUDA context, no process group and
no folder is made.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from comet_compile._version import __version__

__all__ = ["Fact", "diagnose"]

Tone = Literal["ok", "note", "missing"]

# Gradients through an autograd.Function that fills a tensor in place are zero under every
# backend: https://github.com/pytorch/pytorch/issues/180642
_ZERO_GRADIENT_TORCH = ("2.11.",)


class Fact(NamedTuple):
    """One line of the table; `tone` says whether the reader should care."""

    topic: str
    name: str
    value: str
    tone: Tone = "ok"


def diagnose(environ: Mapping[str, str] = os.environ) -> list[Fact]:
    """Return every fact, grouped by topic in the order they are shown."""
    return [
        *_versions(),
        *_devices(),
        *_communication(),
        *_compiler(environ),
        *_environment(environ),
    ]


def _versions() -> list[Fact]:
    facts = [
        Fact("versions", "comet_compile", __version__),
        Fact("versions", "python", platform.python_version()),
        Fact("versions", "torch", torch.__version__),
    ]
    optional = {
        "triton": "the fused GPU kernels need it",
        "transformers": "comet explain on Hugging Face configs needs it",
        "jinja2": "HTML reports need it",
        "networkx": "HTML reports need it",
    }
    for package, need in optional.items():
        try:
            facts.append(Fact("versions", package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            facts.append(Fact("versions", package, f"not installed ({need})", "note"))
    if torch.__version__.startswith(_ZERO_GRADIENT_TORCH):
        facts.append(
            Fact(
                "versions",
                "torch 2.11 and autograd.Function",
                "compiled gradients through an in-place all-to-all are silently zero "
                "(pytorch/pytorch#180642); comet repairs the common wrappers and warns about "
                "the others; torch 2.13 has the fix",
                "note",
            )
        )
    return facts


def _devices() -> list[Fact]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "none found" if built else "none (this torch is built without CUDA)"
        return [Fact("devices", "GPU", f"{why}; comet runs its portable path", "note")]
    facts = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        value = (
            f"{device.name}, sm_{device.major}{device.minor}, {device.multi_processor_count} SMs, "
            f"{device.total_memory / 2**30:.0f} GiB"
        )
        facts.append(Fact("devices", f"cuda:{index}", value))
    return facts


def _communication() -> list[Fact]:
    if not dist.is_available():
        return [Fact("communication", "torch.distributed", "not in this torch build", "missing")]
    present = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
        "ucc": dist.is_ucc_available(),
    }
    backends = ", ".join(name for name, available in present.items() if available) or "none"
    return [
        Fact("communication", "process group backends", backends),
        Fact("communication", "symmetric memory", *_symmetric_memory()),
    ]


def _symmetric_memory() -> tuple[str, Tone]:
    """Return whether the GPUs of this host can address each other's memory, in words."""
    try:
        import torch.distributed._symmetric_memory
    except ImportError as error:
        return f"not in this torch build ({error})", "note"
    if not torch.cuda.is_available():
        return "no GPU", "note"
    num_devices = torch.cuda.device_count()
    if num_devices == 1:
        return "one GPU: nothing to share", "ok"
    cut_off = [
        f"{a}-{b}"
        for a in range(num_devices)
        for b in range(a + 1, num_devices)
        if not torch.cuda.can_device_access_peer(a, b)
    ]
    if cut_off:
        return f"no peer access between GPUs {', '.join(cut_off)}", "note"
    return f"all {num_devices} GPUs have peer access", "ok"


def _compiler(environ: Mapping[str, str]) -> list[Fact]:
    from torch._dynamo import list_backends
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    found = "comet" in list_backends(exclude_tags=())
    registered = (
        Fact("compiler", "backend", 'torch.compile(model, backend="comet") is registered')
        if found
        else Fact(
            "compiler",
            "backend",
            'entry point "comet" not found: reinstall with pip install comet-compile',
            "missing",
        )
    )
    # not cache_dir(), which makes the folder and sets the variable
    inductor = environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
    triton = environ.get("TRITON_CACHE_DIR") or os.path.join(inductor, "triton")
    return [
        registered,
        Fact("compiler", "Inductor cache", inductor),
        Fact("compiler", "Triton cache", triton),
        _tuned_plans(),
    ]


def _tuned_plans() -> Fact:
    from comet_compile.tuned_folder import tuned_folder

    try:
        folder = tuned_folder()
    except ImportError:
        return Fact("compiler", "measured here", "platformdirs not found, so none are kept", "note")
    files = sorted(path.name for path in folder.glob("*.json"))
    return Fact("compiler", "measured here", f"{folder}: {', '.join(files) or 'nothing'}")


def _environment(environ: Mapping[str, str]) -> list[Fact]:
    from comet_compile.config import CometConfig
    from comet_compile.errors import OptionError

    names = sorted(name for name in environ if name.startswith("COMET_"))
    facts = [Fact("environment", name, environ[name]) for name in names]
    try:
        CometConfig.from_options(environ=environ)
    except OptionError as error:
        facts.append(Fact("environment", "COMET_*", str(error), "missing"))
    return facts or [Fact("environment", "COMET_*", "none set: every option has its default")]
