"""Train a small mixture-of-experts language model eager, by Inductor and by comet: three curves.

    python examples/train_lm.py                            # on a CPU, about a minute
    python examples/train_lm.py --ranks 2                  # experts spread over two, over gloo
    python examples/train_lm.py --device cuda [--ranks 2]  # over NCCL

The model and the text are in models/moe_lm.py: Hugging Face's Qwen3-MoE and Python's own
reference, a tenth of it held out. All runs start from the same weights and see the same batches.
Their curves go to examples/results (or --out) as JSON and, with matplotlib, as a picture.

The script fails if comet left a layer as it was, forward or backward, if the held-out loss of a run
did not fall by LEARNED, or if comet's curve is further from eager's than rounding explains.

What rounding explains is measured, because training amplifies it: runs that differ in the last bit
of one sum drift apart, and a router near a tie sends a token elsewhere. The witnesses are Inductor,
which rounds elsewhere too, and two "nudged" eager runs, whose first weights are moved at random by
less than a unit in the last place. Comet's largest difference from eager may be FACTOR times the
largest of theirs, and a floor more:
- in the losses of all steps FLOOR, about what one tie does to a run and not to another;
- in the first EARLY steps, where drift hides no error yet, EARLY_FLOOR: a few units in the last
  place of a float32 loss. That is asked of the norms of gradients too (relative to eager's), apart
  for experts and all else, because Adam forgives gradients of a wrong scale.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch._dynamo.utils import counters

import comet_compile

HERE = Path(__file__).resolve().parent
COMPILED, NUDGED = ("inductor", "comet"), ("nudged 1", "nudged 2")
RUNS, WITNESSES = ("eager", *COMPILED, *NUDGED), ("inductor", *NUDGED)
WARM_UP, CLIP, HELD_OUT_BATCHES, LEARNED = 20, 1.0, 8, 0.5
EARLY, FACTOR, FLOOR, EARLY_FLOOR = 10, 2.0, 0.02, 2e-6


def load(path: str) -> Any:
    """Import a file of this folder, also where Python was told not to look into it."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, HERE / path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


moe_lm = load("models/moe_lm.py")


def reduce_gradients(weights: list[Tensor], masters: list[Tensor]) -> tuple[float, float]:
    """Average the gradients over the processes, into `masters`, the optimizer's float32 weights.

    Return their norms, that of the experts and that of all others.
    """
    num_ranks = dist.get_world_size()
    squares = {True: masters[0].new_zeros(()), False: masters[0].new_zeros(())}
    for weight, master in zip(weights, masters, strict=True):
        of_experts = moe_lm.is_of_experts(weight)
        gradient, weight.grad = weight.grad.float(), None
        # spread experts have met the tokens of all processes, which average their losses
        spread = of_experts and num_ranks > 1
        master.grad = gradient / num_ranks if spread else moe_lm.average(gradient)
        square = master.grad.square().sum()
        squares[of_experts] += num_ranks * moe_lm.average(square) if spread else square
    return squares[True].sqrt().item(), squares[False].sqrt().item()


@dataclasses.dataclass
class Run:
    """What one training run gave, the same in all processes."""

    losses: list[float]
    expert_norms: list[float]  # of the experts' gradients
    other_norms: list[float]
    held_out: tuple[float, float]  # loss before and after
    layers: dict[str, int]  # how many were compiled, and how many comet rewrote, on which path


def count_layers(num_layers: int, device: torch.device) -> dict[str, int]:
    """Return how many layers were compiled and rewritten, in the process with the fewest."""
    counted = {"compiled": num_layers * counters["stats"]["unique_graphs"]}
    for direction, infix in (("forward", ""), ("backward", "backward_")):
        for path in ("fused", "portable"):
            counted[f"{direction} {path}"] = counters["comet"][f"regions_{infix}{path}"]
    fewest = torch.tensor(list(counted.values()), device=device)
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    return dict(zip(counted, fewest.tolist(), strict=True))


def train(name: str, args: argparse.Namespace, device: torch.device) -> Run:
    """Train as the run `name`, data parallel over the processes."""
    torch._dynamo.reset()
    counters.clear()
    size = moe_lm.SIZES[args.device]
    batches = moe_lm.make_batches(moe_lm.read_text(False), args.steps, size, device)
    held_out = moe_lm.make_batches(moe_lm.read_text(True), HELD_OUT_BATCHES, size, device)
    model = moe_lm.make_model(size, args.seed).to(device)
    weights = list(model.parameters())
    torch.manual_seed(RUNS.index(name))  # no two nudges are alike
    if name in NUDGED:
        for weight in weights:
            unit = torch.finfo(moe_lm.dtype_of(weight)).eps
            weight.data *= 1 + unit * (torch.rand_like(weight) - 0.5)
    masters = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.data = weight.data.to(moe_lm.dtype_of(weight))

    # the one line that a user changes
    step = torch.compile(model, backend=name) if name in COMPILED else model
    optimizer = torch.optim.AdamW(masters, lr=size.learning_rate, betas=(0.9, 0.95))
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP)
    losses, norms, before = [], [], moe_lm.evaluate(model, held_out)
    for tokens_BC in batches:
        loss = moe_lm.loss_of(step, tokens_BC)
        loss.backward()
        losses.append(moe_lm.average(loss.detach()).item())
        norms.append(reduce_gradients(weights, masters))
        for master in masters:
            master.grad *= min(1.0, CLIP / math.hypot(*norms[-1]))
        optimizer.step()
        warm_up.step()
        for weight, master in zip(weights, masters, strict=True):
            weight.data.copy_(master)
    layers, after = count_layers(size.num_layers, device), moe_lm.evaluate(model, held_out)
    return Run(losses, [n for n, _ in norms], [n for _, n in norms], (before, after), layers)


@dataclasses.dataclass
class Check:
    """How far the runs are from eager at most, in one quantity."""

    quantity: str
    differences: dict[str, float]  # by run
    floor: float

    @property
    def bound(self) -> float:
        return FACTOR * max(self.differences[name] for name in WITNESSES) + self.floor

    @property
    def holds(self) -> bool:
        return self.differences["comet"] <= self.bound  # False also for NaN


def compare(runs: dict[str, Run]) -> list[Check]:
    """Return the checks of the curves, which the docstring of this file explains."""

    def check(quantity: str, field: str, steps: int | None, floor: float) -> Check:
        curves = {name: torch.tensor(getattr(run, field)[:steps]) for name, run in runs.items()}
        eager = curves.pop("eager")
        # losses are compared as they are, norms relative to eager's
        unit = torch.tensor(1.0) if field == "losses" else eager
        apart = {name: ((curve - eager) / unit).abs().max() for name, curve in curves.items()}
        return Check(quantity, {name: value.item() for name, value in apart.items()}, floor)

    return [
        check("loss, all steps", "losses", None, FLOOR),
        check(f"loss, first {EARLY} steps", "losses", EARLY, EARLY_FLOOR),
        check(f"experts' gradients, first {EARLY}", "expert_norms", EARLY, EARLY_FLOOR),
        check(f"other gradients, first {EARLY}", "other_norms", EARLY, EARLY_FLOOR),
    ]


def find_problems(runs: dict[str, Run], checks: list[Check]) -> list[str]:
    """Return what is wrong, in sentences."""
    problems = []
    layers = runs["comet"].layers
    for direction in ("forward", "backward"):
        rewritten = layers[f"{direction} fused"] + layers[f"{direction} portable"]
        if not 0 < rewritten == layers["compiled"]:
            problems.append(
                f"comet rewrote the {direction} of {rewritten} of {layers['compiled']} layers: "
                "comet_compile.explain(model, batch) gives the reason"
            )
    for check in checks:
        if not check.holds:
            problems.append(
                f"{check.quantity}: comet is {check.differences['comet']:.1e} from eager, and "
                f"rounding explains {check.bound:.1e}"
            )
    for name, run in runs.items():
        before, after = run.held_out
        if not before - after >= LEARNED:  # NaN is a problem too
            problems.append(f"{name} learned too little: held out {before:.3f}, then {after:.3f}")
    return problems


def provenance(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the curves."""
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"comet_compile": comet_compile.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "triton"):
        if importlib.util.find_spec(package):
            versions[package] = importlib.metadata.version(package)
    cuda = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"python examples/train_lm.py --device {args.device} --ranks {args.ranks} "
        f"--steps {args.steps} --seed {args.seed}",
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "ranks": args.ranks,
        "backend": dist.get_backend(),
        "versions": versions,
        "dtype": str(moe_lm.dtype_of(torch.empty(0, device=device))),
        "experts_dtype": str(moe_lm.dtype_of(torch.empty(0, 0, 0, device=device))),
        "size": dataclasses.asdict(moe_lm.SIZES[args.device]),
    }


def show(runs: dict[str, Run], checks: list[Check], problems: list[str]) -> None:
    """Print how far the runs are apart, what comet rewrote and what is wrong."""
    print(
        f"\n{'largest difference from eager':32}", *(f"{name:>9}" for name in (*RUNS[1:], "bound"))
    )
    for check in checks:
        values = (*(check.differences[name] for name in RUNS[1:]), check.bound)
        print(f"{check.quantity:32}", *(f"{value:9.1e}" for value in values))
    print("layers:", ", ".join(f"{number} {key}" for key, number in runs["comet"].layers.items()))
    for problem in problems:
        print("FAILED:", problem)


def run_all(args: argparse.Namespace, device: torch.device) -> bool:
    """Train every run, judge and write the curves; return whether nothing is wrong."""
    # about a cached function inside transformers, said once per process by any backend
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    # comet does not count the layers of a graph that comes from a cache
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    runs = {}
    for name in RUNS:
        run = runs[name] = train(name, args, device)
        if dist.get_rank() == 0:
            print(f"{name:9} loss {run.losses[0]:.4f} to {run.losses[-1]:.4f}", end=", ")
            print("held out {:.4f} to {:.4f}".format(*run.held_out), flush=True)
    checks = compare(runs)
    problems = find_problems(runs, checks)
    if dist.get_rank() == 0:
        show(runs, checks, problems)
        document = provenance(args, device) | {
            "checks": [dataclasses.asdict(check) | {"bound": check.bound} for check in checks],
            "problems": problems,
            "runs": {name: dataclasses.asdict(run) for name, run in runs.items()},
        }
        ranks = f"_{args.ranks}ranks" if args.ranks > 1 else ""
        path = args.out / f"train_lm_{args.device}{ranks}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        if importlib.util.find_spec("matplotlib"):
            load("plot_curves.py").draw(path)
        else:
            print(f"no picture without matplotlib; later: plot_curves.py {path.name}")
    return not problems


def worker(rank: int, args: argparse.Namespace, port: int) -> None:
    """Do all as process `rank` of the group; exit with 1 if something is wrong."""
    on_gpu = args.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    elif args.ranks > 1:
        torch.set_num_threads(1)  # the processes share the cores
        # oneDNN would prepare itself for each number of rows that an expert gets
        torch.backends.mkldnn.set_flags(False)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    backend, gpu = ("nccl", device) if on_gpu else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=rank, world_size=args.ranks, device_id=gpu)
    try:
        fine = run_all(args, device)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if not fine:
        sys.exit(1)


def main(argv: list[str] | None = None) -> int:
    """Train, compare and draw; return 0 if nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=1, help="processes, one GPU each")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder")
    args = parser.parse_args(argv)
    num_experts = moe_lm.SIZES[args.device].num_experts
    if args.ranks < 1 or num_experts % args.ranks:
        parser.error(f"{args.ranks} ranks cannot share {num_experts} experts evenly")
    if args.device == "cuda" and torch.cuda.device_count() < args.ranks:
        parser.error(f"--ranks {args.ranks} needs as many GPUs, not {torch.cuda.device_count()}")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        if args.ranks == 1:
            worker(0, args, store.port)
        else:
            mp.spawn(worker, (args, store.port), args.ranks)
    except mp.ProcessExitedException as error:
        return error.exit_code or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
