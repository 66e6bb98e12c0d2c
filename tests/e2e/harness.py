"""Compile a model, run it beside eager and a float32 copy, and compare everything it computes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numerics
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from zoo import ep

BACKEND = "comet"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What compiling and running left behind."""

    comet: dict[str, int]
    graphs: int
    model: nn.Module
    """The compiled module, to call it again."""


@contextlib.contextmanager
def fresh_compilation(codegen: bool = False) -> Iterator[None]:
    """Start from no compiled code and empty counters, and let no cache skip the pass.

    Without `codegen`, Inductor does all it does but generate C++: its code calls ATen kernels,
    and a model compiles in 2 seconds instead of 20.
    """
    torch._dynamo.reset()
    counters.clear()
    with (
        torch._inductor.config.patch(
            fx_graph_cache=False, fallback_by_default=not codegen, compile_threads=1
        ),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def snapshot(model: nn.Module) -> Outcome:
    """Return the counters as they stand now."""
    return Outcome(
        comet=dict(counters["comet"]),
        graphs=counters["stats"]["unique_graphs"],
        model=model,
    )


def compile_and_compare(
    model: nn.Module,
    inputs: Sequence[Tensor],
    *,
    train: bool,
    reference: nn.Module | None = None,
    wrap: Callable[[nn.Module], Callable[..., Any]] = lambda model: model,
    backend: str | None = None,
    codegen: bool = False,
    **compile_options: Any,
) -> Outcome:
    """Run every input through eager, a float32 copy and the compiled model; compare all results.

    Results are the output and, if `train`, the gradients of parameters and of float inputs.
    `reference` takes the place of the float32 copy; `wrap` makes the callable that is compiled
    from the module (for example one that checkpoints it). `compile_options` go to torch.compile,
    with fullgraph=True unless they say otherwise.
    """
    wide = copy.deepcopy(model).float() if reference is None else reference
    refs = [results(wide, wide, _widened(x), train) for x in inputs]
    eagers = [results(model, model, x, train) for x in inputs]
    compile_options.setdefault("fullgraph", True)
    with fresh_compilation(codegen):
        compiled = torch.compile(wrap(model), backend=backend or BACKEND, **compile_options)
        for step, x in enumerate(inputs):
            got = results(model, compiled, x, train)
            assert_all_match(got, refs[step], eagers[step], f"step {step}")
        return snapshot(compiled)


def compare_with_oracle(
    model: nn.Module,
    steps: Sequence[Sequence[Tensor]],
    *,
    rank: int,
    train: bool,
    input_grad: bool = True,
    wrap: Callable[[nn.Module], Callable[..., Any]] = lambda model: model,
    codegen: bool = False,
    **compile_options: Any,
) -> Outcome:
    """Compare an expert parallel model of the zoo with its oracle over all experts.

    `steps` holds, per step, the tokens [T, H] of every rank of the group; `rank` is this one's
    place in it. Gradients of experts come from the tokens of all ranks.
    """
    oracle = ep.oracle_of(model)

    def own(call: Callable[..., Any], x: Tensor) -> dict[str, Tensor]:
        return results(model, call, x, train, ep.gradients_of, input_grad)

    refs = [_oracle_results(oracle, model, xs, rank, train, input_grad) for xs in steps]
    eagers = [own(model, xs[rank]) for xs in steps]
    compile_options.setdefault("fullgraph", True)
    with fresh_compilation(codegen):
        compiled = torch.compile(wrap(model), backend=BACKEND, **compile_options)
        for step, xs in enumerate(steps):
            got = own(compiled, xs[rank])
            assert_all_match(got, refs[step], eagers[step], f"rank {rank}, step {step}")
        return snapshot(compiled)


def _oracle_results(
    oracle: nn.Module,
    model: nn.Module,
    xs: Sequence[Tensor],
    rank: int,
    train: bool,
    input_grad: bool,
) -> dict[str, Tensor]:
    """Return this rank's results, with the experts' gradients summed over the ranks' tokens."""
    own: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}

    def gradients(module: nn.Module) -> Mapping[str, Tensor | None]:
        return ep.oracle_gradients(module, model)

    for peer, x in enumerate(xs):
        found = results(oracle, oracle, x.float(), train, gradients, input_grad)
        for name, value in found.items():
            if ".w_" in name:
                total[name] = total.get(name, 0) + value
        if peer == rank:
            own = found
    return own | total


def results(
    model: nn.Module,
    call: Callable[..., Any],
    x: Tensor,
    train: bool,
    gradients: Callable[[nn.Module], Mapping[str, Tensor | None]] | None = None,
    input_grad: bool = True,
) -> dict[str, Tensor]:
    """Return the output of `call(x)` and, if `train`, the gradients of a fixed random loss."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_(train and input_grad and x.is_floating_point())
    with torch.set_grad_enabled(train):
        out = first_tensor(call(x))
    found = {"output": out.detach()}
    if not train:
        return found
    generator = torch.Generator().manual_seed(11)
    cotangent = torch.randn(out.shape, generator=generator).bfloat16().to(out)
    out.backward(cotangent)
    if x.requires_grad:
        found["grad of input"] = _gradient(x.grad)
    named = gradients or (lambda m: {name: p.grad for name, p in m.named_parameters()})
    for name, grad in named(model).items():
        found[f"grad of {name}"] = _gradient(grad)
    return found


def first_tensor(out: Any) -> Tensor:
    """Return the tensor to compare: the output, its logits, or the first of a tuple."""
    if hasattr(out, "logits"):
        return out.logits
    return out[0] if isinstance(out, tuple) else out


def assert_all_match(
    got: Mapping[str, Tensor], ref: Mapping[str, Tensor], eager: Mapping[str, Tensor], where: str
) -> None:
    """Apply the tolerance of `numerics` to every named result."""
    assert set(got) == set(ref) == set(eager), set(got) ^ set(ref) | set(got) ^ set(eager)
    for name, value in got.items():
        # float64: the bound is earned from eager also where a parameter is float32 already
        numerics.assert_matches_ref(value, ref[name].double(), eager[name], what=f"{where}, {name}")


def assert_rewritten(outcome: Outcome, num_layers: int, *, train: bool) -> None:
    """Assert that each MoE layer of each compiled graph was rewritten, both ways if training."""
    expected = num_layers * outcome.graphs
    comet = outcome.comet
    forward = sum(comet.get(f"regions_{how}", 0) for how in ("fused", "portable"))
    backward = sum(comet.get(f"regions_backward_{how}", 0) for how in ("fused", "portable"))
    text = f"expected {expected} regions ({num_layers} layers, {outcome.graphs} graphs): {comet}"
    assert comet.get("regions_found", 0) == expected, text
    assert forward == expected, text
    assert backward == (expected if train else 0), text
    assert comet.get("regions_rejected", 0) == 0, text


def assert_untouched(outcome: Outcome) -> None:
    """Assert that nothing was rewritten."""
    rewritten = ("regions_fused", "regions_portable")
    assert not any(outcome.comet.get(name) for name in rewritten), outcome.comet


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _gradient(grad: Tensor | None) -> Tensor:
    assert grad is not None, "a parameter or input got no gradient"
    if hasattr(grad, "full_tensor"):
        grad = grad.full_tensor()
    return grad.detach().clone()
