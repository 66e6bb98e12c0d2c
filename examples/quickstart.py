"""Train three small mixture-of-experts language models, eager beside comet, and compare them.

    python examples/quickstart.py

It starts one process per GPU, or two processes over gloo where there is none, and takes two models
from Hugging Face (every process holds all of their experts) and one expert-parallel model written
in plain torch.distributed (the experts are spread over the processes). None of them knows of
comet_compile. The one line that does is in `train`:

    torch.compile(model, backend="comet")

Every model is trained three times from the same seed: eager, compiled, and eager in float32. The
error of a value is its distance from the float32 value, relative to it in norm. The compiled model
may have at most twice the error that eager has, and one rounding to bfloat16 more.

A router near a tie chooses by rounding, and one other expert changes gradients by far more than
rounding does. So outputs and gradients are held against a float32 model that is made to choose
what the run chose, and the choices are checked for themselves: their error is the float32 score
that they give up.

Names end in their dimensions: B sequences of C characters, T = B * C tokens, A experts per token,
S = T * A slots, R rows received, E experts, L of them local, P processes, H features, I of an
expert's inner ones, N = 2 * I columns of gate and up together.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import comet_compile

TEXT = Path(__file__).parent / "data" / "public_domain.txt"
VOCABULARY = 128  # the text is ASCII: one token per byte
HIDDEN, INNER, NUM_LAYERS, NUM_EXPERTS, TOP_K = 64, 32, 2, 8, 2
SEQUENCES, CHARACTERS = 4, 64
BF16_ROUNDING = 2.0**-8
SHARDS = ("w_in_LHN", "w_out_LIH")
OUTPUTS, CHOICES, LOSSES = "outputs", "choices of experts", "losses of all steps"


OF_BOTH = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "use_cache": False,
    "eos_token_id": None,
    "pad_token_id": None,
}


def qwen3_moe() -> transformers.PreTrainedModel:
    """Return a small Qwen3-MoE, experts as Hugging Face runs them by default (grouped_mm)."""
    inner = {"moe_intermediate_size": INNER, "num_key_value_heads": 2, "head_dim": 16}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**OF_BOTH, **inner))


def olmoe() -> transformers.PreTrainedModel:
    """Return a small OLMoE."""
    return transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(**OF_BOTH, intermediate_size=INNER, num_key_value_heads=4)
    )


class Router(nn.Module):
    """Chooses A experts per token, and their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        weights_TA, ids_TA = self.scores(x_TH).float().softmax(-1).topk(TOP_K)
        return weights_TA / weights_TA.sum(-1, keepdim=True), ids_TA


class ExpertParallelMoE(nn.Module):
    """A routed layer that keeps E / P experts in each process, as a user writes it today."""

    def __init__(self) -> None:
        super().__init__()
        self.group = dist.group.WORLD
        self.num_ranks = dist.get_world_size()
        self.num_local = NUM_EXPERTS // self.num_ranks
        self.gate = Router()
        own = slice(dist.get_rank() * self.num_local, (dist.get_rank() + 1) * self.num_local)
        # every rank draws all experts and keeps its own: the model is the same for any P
        self.w_in_LHN = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN, 2 * INNER)[own] * 0.1)
        self.w_out_LIH = nn.Parameter(torch.randn(NUM_EXPERTS, INNER, HIDDEN)[own] * 0.1)

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TA, ids_TA = self.gate(x_TH)
        ids_S = ids_TA.view(-1)

        # dispatch: one row per slot, sorted by expert and hence by the process that has it
        order_S = ids_S.argsort(stable=True)
        counts_E = ids_S.new_zeros(NUM_EXPERTS).scatter_add(0, ids_S, torch.ones_like(ids_S))
        counts_PL = counts_E.view(self.num_ranks, self.num_local)
        received_PL = all_to_all_single(counts_PL, None, None, self.group)
        send, recv = counts_PL.sum(1).tolist(), received_PL.sum(1).tolist()
        x_RH = all_to_all_single_autograd(x_TH[order_S // TOP_K], recv, send, self.group)

        # experts: rows came process by process, the grouped GEMM wants them expert by expert
        local_ids_L = torch.arange(self.num_local, device=x_TH.device)
        local_ids_R = local_ids_L.repeat(self.num_ranks).repeat_interleave(
            received_PL.view(-1), output_size=sum(recv)
        )
        by_expert_R = local_ids_R.argsort(stable=True)
        offs_L = received_PL.sum(0).cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(x_RH[by_expert_R], self.w_in_LHN, offs=offs_L).chunk(2, -1)
        y_RH = F.grouped_mm(F.silu(gate) * up, self.w_out_LIH, offs=offs_L)

        # combine: back the same way, then the weighted sum over each token's experts
        y_RH = y_RH[by_expert_R.argsort()]
        y_SH = all_to_all_single_autograd(y_RH, send, recv, self.group)
        y_TAH = y_SH[order_S.argsort()].view(-1, TOP_K, HIDDEN)
        return (y_TAH * weights_TA.unsqueeze(-1)).sum(1).to(x_TH.dtype)


class ExpertParallelLM(nn.Module):
    """A residual language model: mix with the token before, then the routed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.mixers = nn.ModuleList(nn.Linear(2 * HIDDEN, HIDDEN) for _ in range(NUM_LAYERS))
        self.moes = nn.ModuleList(ExpertParallelMoE() for _ in range(NUM_LAYERS))
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2 * NUM_LAYERS + 1))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens_BC: Tensor) -> Tensor:
        x_BCH = self.embedding(tokens_BC)
        for i, (mixer, moe) in enumerate(zip(self.mixers, self.moes, strict=True)):
            normed = self.norms[2 * i](x_BCH)
            before = F.pad(normed, (0, 0, 1, 0))[:, :-1]
            x_BCH = x_BCH + mixer(torch.cat([normed, before], -1))
            normed = self.norms[2 * i + 1](x_BCH)
            x_BCH = x_BCH + moe(normed.flatten(0, 1)).view_as(x_BCH)
        return self.head(self.norms[-1](x_BCH))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Qwen3-MoE (Hugging Face)": qwen3_moe,
    "OLMoE (Hugging Face)": olmoe,
    "expert-parallel LM": ExpertParallelLM,
}


@dataclasses.dataclass
class Run:
    """What one training run gave: values of the first step by name, and the loss of every step."""

    values: dict[str, Tensor]
    choices: list[Tensor]  # of experts in the first step, ids [T, A] of each layer
    exact: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # `values` in float32


def make_model(
    build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Return the model with the same initial values, rounded to bfloat16, at every call."""
    torch.manual_seed(0)
    return build().to(torch.bfloat16).to(device=device, dtype=dtype)


def make_batches(num_steps: int, device: torch.device) -> list[Tensor]:
    """Return this process's own batches of the text, int64 [B, C] each."""
    text = torch.tensor(list(TEXT.read_bytes()))
    generator = torch.Generator().manual_seed(dist.get_rank())
    windows = text.unfold(0, CHARACTERS, 1)
    picks = torch.randint(len(windows), (num_steps, SEQUENCES), generator=generator)
    return [windows[rows].to(device) for rows in picks]


def average(value: Tensor) -> Tensor:
    """Return the mean of `value` over the processes."""
    dist.all_reduce(value)
    return value / dist.get_world_size()


def record_choices(model: nn.Module) -> list[Tensor]:
    """Return a list to which every router of `model` will add the ids [T, A] that it chose."""
    choices: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(lambda _router, _x, found: choices.append(found[-1]))
    return choices


class Choosing(TorchFunctionMode):
    """Makes every router choose what another run chose, layer by layer."""

    def __init__(self, choices: list[Tensor]) -> None:
        super().__init__()
        self.choices = iter(choices)
        self.best: list[Tensor] = []  # sum of each token's best scores [T], per layer
        self.chosen: list[Tensor] = []  # and of those that were chosen instead

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in (torch.topk, Tensor.topk):
            return result
        ids_TA = next(self.choices)
        scores_TA = args[0].gather(-1, ids_TA)
        self.best.append(result[0].detach().sum(-1))
        self.chosen.append(scores_TA.detach().sum(-1))
        return scores_TA, ids_TA


def train(model: nn.Module, batches: list[Tensor], compiled: bool = False) -> Run:
    """Train `model` on `batches`, data-parallel over the processes."""
    step = torch.compile(model, backend="comet") if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    recorded = record_choices(model)
    values: dict[str, Tensor] = {}
    losses: list[float] = []
    for tokens_BC in batches:
        recorded.clear()  # before each step: Dynamo compiles for the length that the list has
        result = step(tokens_BC)
        logits = getattr(result, "logits", result).float()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BC[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if name.endswith(SHARDS):  # no other process has these experts
                parameter.grad /= dist.get_world_size()
            else:
                parameter.grad = average(parameter.grad)
        if not losses:
            values = {name: p.grad.float() for name, p in model.named_parameters()}
            values[OUTPUTS] = logits.detach()
            choices = list(recorded)
        losses.append(average(loss.detach()).item())
        optimizer.step()
    return Run({**values, LOSSES: torch.tensor(losses)}, choices)


def add_exact(run: Run, model: nn.Module, batches: list[Tensor], exact: Run) -> None:
    """Add what `run` should have found: the values of `model`, in float32, with its choices.

    Of the choices, the value is the float32 scores [T] of each token's experts, and exact are the
    best ones. Losses are those of `exact`, a float32 run with choices of its own.
    """
    with Choosing(run.choices) as router:
        twin = train(model, batches[:1])
    run.values[CHOICES] = torch.cat(router.chosen)
    run.exact = {**twin.values, CHOICES: torch.cat(router.best), LOSSES: exact.values[LOSSES]}


@dataclasses.dataclass
class Check:
    """One quantity of one model: how far comet is from eager, and both from float32."""

    quantity: str
    difference: float  # max |comet - eager|
    eager_error: float
    comet_error: float

    @property
    def bound(self) -> float:
        return 2 * self.eager_error + BF16_ROUNDING

    @property
    def holds(self) -> bool:
        return self.comet_error <= self.bound  # False also for NaN


def check(name: str, comet: Run, eager: Run) -> Check:
    errors = [
        ((run.values[name] - run.exact[name]).norm() / run.exact[name].norm()).item()
        for run in (eager, comet)
    ]
    return Check(name, (comet.values[name] - eager.values[name]).abs().max().item(), *errors)


def compare(comet: Run, eager: Run) -> list[Check]:
    """Return the checks of choices, outputs, the worst gradient, and losses."""
    checks = {name: check(name, comet, eager) for name in comet.exact}
    named = {name: checks.pop(name) for name in (CHOICES, OUTPUTS, LOSSES)}
    worst = max(checks.values(), key=lambda c: c.comet_error / c.bound)
    gradients = dataclasses.replace(worst, quantity=f"gradients (worst of {len(checks)})")
    return [named[CHOICES], named[OUTPUTS], gradients, named[LOSSES]]


def count_other_choices(run: Run, other: Run) -> str:
    """Return for how many tokens, over all layers and processes, other experts were chosen."""
    ids, other_ids = (torch.cat(r.choices).sort().values for r in (run, other))
    differ = (ids != other_ids).any(-1)
    counts = torch.stack([differ.sum(), (~differ).sum()])
    dist.all_reduce(counts)
    return f"{counts[0]} of {counts.sum()}"


def show(console: Console, comet: Run, eager: Run, checks: list[list[Check]]) -> None:
    """Print the losses and, per quantity, the check of the process that is nearest its bound."""
    num_steps = len(eager.values[LOSSES])
    shown = range(0, num_steps, -(-num_steps // 10))
    table = Table("loss at step", *(str(step) for step in shown))
    for label, run in (("eager", eager), ("comet", comet)):
        table.add_row(label, *(f"{run.values[LOSSES][step]:.4f}" for step in shown))
    console.print(table)
    table = Table("", "max |comet - eager|", "error of eager", "error of comet", "bound", "")
    for of_all_ranks in zip(*checks, strict=True):
        worst = max(of_all_ranks, key=lambda c: c.comet_error / c.bound)
        errors = (worst.difference, worst.eager_error, worst.comet_error, worst.bound)
        ok = all(c.holds for c in of_all_ranks)
        table.add_row(worst.quantity, *(f"{e:.2e}" for e in errors), "ok" if ok else "BROKEN")
    console.print(table)


def run_model(
    name: str, build: Callable[[], nn.Module], num_steps: int, device: torch.device
) -> bool:
    """Return whether all layers of one model were rewritten and every bound holds."""
    console = Console(quiet=dist.get_rank() != 0, width=100, highlight=False)
    batches = make_batches(num_steps, device)
    exact = train(make_model(build, torch.float32, device), batches)
    eager = train(make_model(build, torch.bfloat16, device), batches)
    comet = train(make_model(build, torch.bfloat16, device), batches, compiled=True)

    for run in (eager, comet):
        add_exact(run, make_model(build, torch.float32, device), batches, exact)

    checks: list[list[Check]] = [[]] * dist.get_world_size()
    dist.all_gather_object(checks, compare(comet, eager))
    from_eager, from_float32 = count_other_choices(comet, eager), count_other_choices(eager, exact)
    console.rule(name)
    show(console, comet, eager, checks)
    console.print(f"tokens with other experts: {from_eager}, comet from eager; ", end="")
    console.print(f"{from_float32}, eager from float32\n")
    report = comet_compile.explain(make_model(build, torch.bfloat16, device), batches[0])
    console.print(str(report), markup=False, soft_wrap=True)
    rewritten = sum(region.status != "rejected" for region in report.regions)
    if rewritten != NUM_LAYERS:
        console.print(f"{name}: {rewritten} of {NUM_LAYERS} MoE layers were rewritten")
        return False
    return all(c.holds for of_rank in checks for c in of_rank)


def worker(rank: int, args: argparse.Namespace, world_size: int, port: int) -> None:
    """Run every model as process `rank` of the group."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # the processes share the cores
    # about a cached function inside transformers, said once per process by any backend
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    backend, gpu = ("nccl", device) if on_gpu else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=gpu)
    try:
        results = [
            run_model(name, build, args.steps, device)
            for name, build in MODELS.items()
            if args.only.lower() in name.lower()
        ]
        dist.barrier()
    finally:
        dist.destroy_process_group()
    if not all(results):
        sys.exit(1)


def main() -> int:
    """Start the processes; return 0 if all layers were rewritten and every bound holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="training steps per model")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--dump", default="comet_dump", help="folder for the graphs")
    args = parser.parse_args()
    if not any(args.only.lower() in name.lower() for name in MODELS):
        parser.error(f"--only {args.only!r} is in none of the names {', '.join(MODELS)}")

    dump = Path(os.environ.setdefault("COMET_DUMP", args.dump)).resolve()
    world_size = torch.cuda.device_count() or 2
    if NUM_EXPERTS % world_size:
        world_size = 1
    console = Console(highlight=False)
    console.print(f"comet_compile {comet_compile.__version__}, torch {torch.__version__}, ", end="")
    console.print(f"{world_size} processes, the first step of each model compiles it")

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        mp.spawn(worker, args=(args, world_size, store.port), nprocs=world_size)
    except mp.ProcessExitedException as error:
        console.print("a bound is broken, or a layer was not rewritten: see above")
        return error.exit_code or 1
    console.print(f"every bound holds; graphs before and after: {dump}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
