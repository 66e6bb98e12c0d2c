"""The ops of comet_compile, their plain PyTorch twins and what runs them.

`ops` registers ``comet::moe_layer`` and its backward; the passes reach nothing else. `refs` is what
they mean, `portable` (with `routing`, `grouped`, `experts`, `exchange`) what runs on any device and
process group, `agreement` what keeps ranks from running different plans.
"""

# Installed under another name, the ops would be registered twice; torch takes the last silently.
if __name__ != "comet_compile.kernels":
    raise ImportError(
        f"this folder is installed as comet_compile.kernels, and was imported as {__name__!r}: the "
        "repository root is on sys.path. Import comet_compile.kernels, or run Python with -P."
    )
