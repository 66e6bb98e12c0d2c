"""The ``comet`` command: what this machine can do, and what would happen to a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from comet_compile._version import __version__
from comet_compile.errors import CometError

__all__ = ["main"]

Command = Callable[..., Any]

_TONES = {"ok": "", "note": "yellow", "missing": "bold red"}


def _layer_options(*, several: bool) -> Callable[[Command], Command]:
    """Return a decorator that adds --shapes and --model: one of them names a layer's sizes."""
    more = " May be repeated." if several else ""
    shapes = click.option(
        "--shapes",
        multiple=several,
        metavar="HxIxExK",
        help="Sizes of a layer: hidden x intermediate x experts x top-k, such as 2048x768x128x8."
        + more,
    )
    model = click.option(
        "--model",
        multiple=several,
        metavar="CONFIG",
        help="A Hugging Face config: a config.json, its folder, or a model type such as qwen3_moe."
        + more,
    )
    return lambda command: shapes(model(command))


def _one_layer(shapes: str | None, model: str | None) -> tuple[int, int, int, int]:
    """Return the sizes that one of the two options names; CometError if it names none."""
    from comet_compile.layer_sizes import parse_sizes, sizes_of_config
    from comet_compile.targets import load_config

    return parse_sizes(shapes) if shapes else sizes_of_config(load_config(str(model)))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="comet")
def main() -> None:
    """Overlap of mixture-of-experts communication and compute, in one line:
    torch.compile(model, backend="comet").
    """


@main.command()
@click.option(
    "--measure",
    is_flag=True,
    help="Measure this GPU first (a minute or two), for the cost model that plans layers.",
)
@click.option(
    "--ep",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="With --measure: ranks whose links are measured as well, started by torchrun.",
)
def doctor(measure: bool, ep: int) -> None:
    """Show what this machine has: versions, GPUs, communication, caches, options."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from comet_compile.doctor import diagnose

    if measure and not _measure_machine(ep):
        return
    table = Table(title="comet doctor", title_justify="left", show_lines=False)
    table.add_column("topic", style="dim", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("found", overflow="fold")
    topic = ""
    for fact in diagnose():
        if topic and fact.topic != topic:
            table.add_section()
        shown = fact.topic if fact.topic != topic else ""
        # Text: a path or a variable may hold what rich takes for markup
        table.add_row(shown, Text(fact.name), Text(fact.value, style=_TONES[fact.tone]))
        topic = fact.topic
    Console().print(table)


def _measure_machine(ranks: int) -> bool:
    """Measure and keep the numbers of this machine; whether this process is to go on and show."""
    try:
        from comet_compile import machine_probe, tuner
    except ImportError as error:
        raise click.ClickException(f"comet doctor --measure needs Triton ({error})") from error
    try:
        return machine_probe.measure_and_keep(tuner.join_ranks(ranks, "doctor --measure"))
    except (CometError, ImportError, OSError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@click.argument("target")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens of the example input.")
@click.option("--train/--inference", default=False, help="Training or inference (the default).")
@click.option("--small", is_flag=True, help="Shrink a Hugging Face config to a toy.")
@click.option("--layers", type=click.IntRange(min=1), help="Layers of a Hugging Face config.")
@click.option("--device", default=None, help="Device; default: cuda where there is one, else cpu.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Also write the report, with pictures, to this file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def explain(
    target: str,
    tokens: int | None,
    train: bool,
    small: bool,
    layers: int | None,
    device: str | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Compile TARGET with comet, run it once, and say which MoE layers were rewritten and why not.

    TARGET is module:factory (or file.py:factory), a callable that returns (model, args); or a
    Hugging Face config: a config.json, its folder, or a model type such as qwen3_moe.
    """
    import torch

    from comet_compile.explainer import explain as explain_model
    from comet_compile.targets import load_target

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded = load_target(
            target, tokens=tokens, train=train, small=small, layers=layers, device=device
        )
        with torch.set_grad_enabled(train):
            report = explain_model(loaded.model, *loaded.args, **loaded.kwargs)
    except CometError as error:
        raise click.ClickException(str(error)) from error
    click.echo(report.to_json() if as_json else str(report))
    if html is not None:
        try:
            report.to_html(html)
        except (ImportError, OSError) as error:
            raise click.ClickException(str(error)) from error
        click.echo(f"wrote {html}", err=True)


@main.command()
@_layer_options(several=True)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    multiple=True,
    default=(64, 1024, 4096),
    show_default=True,
    help="Tokens of one rank. May be repeated.",
)
@click.option(
    "--ep",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Ranks that share the experts, started by torchrun.",
)
@click.option(
    "--direction",
    type=click.Choice(("forward", "backward")),
    multiple=True,
    help="Only this direction; default: both.",
)
@click.option("--ungated", is_flag=True, help="Experts of two matrices, without a gate.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The table to write; default: this GPU's in the cache directory.",
)
@click.option("--again", is_flag=True, help="Also tune what the table has already.")
def tune(
    shapes: tuple[str, ...],
    model: tuple[str, ...],
    tokens: tuple[int, ...],
    ep: int,
    direction: tuple[str, ...],
    ungated: bool,
    out: Path | None,
    again: bool,
) -> None:
    """Measure plans for layers on this machine's GPU, and keep the faster ones in a table.

    Fused layers of these shapes take them from then on, and `comet explain` says so. Ctrl-C keeps
    what is done; the same command goes on with the rest. COMET_TUNED names another table, or
    switches them off (0).
    """
    from comet_compile.layer_sizes import parse_sizes, sizes_of_config
    from comet_compile.targets import load_config

    if not shapes and not model:
        raise click.UsageError("nothing to tune: give --shapes or --model")
    try:
        from comet_compile import tuner
        from comet_compile.tuning_bar import shown
    except ImportError as error:
        raise click.ClickException(f"comet tune needs Triton ({error})") from error
    try:
        sizes = [parse_sizes(text) for text in shapes]
        sizes += [sizes_of_config(load_config(name)) for name in model]
        jobs = tuner.jobs_for(sizes, tokens, ep, direction or tuner.DIRECTIONS, gated=not ungated)
        group = tuner.join_ranks(ep)
        shown(jobs, group, out, again=again)
    except (CometError, ImportError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise click.ClickException(
            "stopped; what was found is kept, and the same command goes on with the rest"
        ) from None


@main.command()
@_layer_options(several=False)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    help="Tokens of one rank.",
)
@click.option(
    "--ep",
    type=click.IntRange(min=2),
    default=2,
    show_default=True,
    help="Ranks that share the experts, started by torchrun.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    multiple=True,
    default=(Path("comet_trace.json"), Path("comet_trace.html")),
    show_default=True,
    help="File to write: .json for Perfetto, .html for a picture. May be repeated.",
)
def trace(
    shapes: str | None, model: str | None, tokens: int, ep: int, out: tuple[Path, ...]
) -> None:
    """Measure what every CTA of every rank does in a forward: multiply, fetch, send, wait.

    Runs a layer of random weights with kernels that note the time. To be started by torchrun:

    torchrun --nproc-per-node 2 --no-python comet trace --shapes 2048x768x128x8
    """
    if (shapes is None) == (model is None):
        raise click.UsageError("give one of --shapes and --model")
    try:
        from comet_compile import tracer, tuner
    except ImportError as error:
        raise click.ClickException(f"comet trace needs Triton ({error})") from error
    try:
        sizes = _one_layer(shapes, model)
        (job,) = tuner.jobs_for([sizes], [tokens], ep, ["forward"], gated=True)
        tracer.show(job.size, tuner.join_ranks(ep, "trace"), out)
    except (CometError, ImportError, OSError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@_layer_options(several=False)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    help="Tokens of one rank.",
)
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    multiple=True,
    default=(2, 4, 8, 72),
    show_default=True,
    help="GPUs of one NVLink domain. May be repeated.",
)
@click.option(
    "--link",
    type=click.FloatRange(min=0.01),
    multiple=True,
    default=(1.0,),
    show_default=True,
    help="Speed of the links in multiples of an H100's: 0.44 for an H800. May be repeated.",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    multiple=True,
    help="Write what every CTA does, by the first combination, to this file: .json for Perfetto, "
    ".html for a picture. May be repeated.",
)
@click.option(
    "--direction",
    type=click.Choice(("forward", "backward")),
    default="forward",
    show_default=True,
)
@click.option(
    "--hot",
    type=click.FloatRange(min=1.0),
    multiple=True,
    default=(1.0,),
    show_default=True,
    help="Tokens of the busiest expert, in multiples of its share. May be repeated.",
)
def simulate(
    shapes: str | None,
    model: str | None,
    tokens: int,
    ranks: tuple[int, ...],
    link: tuple[float, ...],
    hot: tuple[float, ...],
    trace: tuple[Path, ...],
    direction: str,
) -> None:
    """Predict a layer between H100s: its phases, what bounds them, what is hidden.

    Needs no GPU. Everything printed is predicted, not measured; how far off the model is on layers
    that were measured says benchmarks/results/cost_model.md.
    """
    if (shapes is None) == (model is None):
        raise click.UsageError("give one of --shapes and --model")
    try:
        from comet_compile.simulated import shown

        shown(_one_layer(shapes, model), tokens, ranks, link, hot, direction, trace)
    except (CometError, OSError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
