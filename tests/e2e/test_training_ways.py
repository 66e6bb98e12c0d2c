"""The ways in which people train a model give eager's gradients, with every layer rewritten."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from e2e import harness
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

pytest.importorskip("transformers")

from zoo import hf

from comet_compile import accumulate_gradients
from comet_compile.kernels import paths
from comet_compile.kernels.lent_gradients import LOANS

NAME = "qwen3_moe"
# one way to train: (the module, what to call in its place, its input) -> gradients by name
Way = Callable[[nn.Module, Callable[..., Tensor], Tensor], dict[str, Tensor]]

aten = torch.ops.aten
MATMULS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten._grouped_mm.default)


class Checkpointed(nn.Module):
    """Layers with residual connections, each of them under a checkpoint: x + layer(x)."""

    def __init__(self, layers: Sequence[nn.Module], **options: Any):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False, **self.options)
        return x


def _saves_matmuls(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in MATMULS else CheckpointPolicy.PREFER_RECOMPUTE


# -- activation checkpointing -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ({}, 2),
        (
            {"context_fn": functools.partial(create_selective_checkpoint_contexts, _saves_matmuls)},
            1,
        ),
    ],
    ids=["full", "selective"],
)
def test_checkpoints_inside_the_compiled_model(
    options: dict[str, Any], runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint has the layer run again in the backward, one that saves matmuls has not."""
    forwards = _count_forwards(monkeypatch)
    model = Checkpointed(_blocks(), **options)
    assert_same_training(model, _plain, layers=2)
    assert len(forwards) == 2 * runs


def test_checkpoint_around_a_compiled_block(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = _count_forwards(monkeypatch)
    block = hf.moe_block(NAME)

    def way(module: nn.Module, call: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
        return _plain(module, lambda x: checkpoint(call, x, use_reentrant=False), x)

    assert_same_training(block, way)
    assert len(forwards) == 2


def test_gradient_checkpointing_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = _count_forwards(monkeypatch)
    model = hf.causal_lm(NAME)
    model.model.layers = model.model.layers[:1]  # one is enough, and compiles in half the time
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    def way(module: nn.Module, call: Callable[..., Any], ids: Tensor) -> dict[str, Tensor]:
        return _plain(module, lambda ids: call(ids, use_cache=False).logits, ids)

    assert_same_training(model, way, x=hf.input_ids())
    assert len(forwards) == 2


def _count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by one at each run of `comet::moe_layer` on one device."""
    seen: list[str] = []
    run = paths.local_forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append("local")
        return run(*args, **kwargs)

    monkeypatch.setattr(paths, "local_forward", counted)
    return seen


# -- gradients of more than one backward pass, or of less than everything ---------------------


@pytest.mark.parametrize("lends", [False, True])
def test_gradients_accumulate_over_micro_batches(lends: bool) -> None:
    other = hf.hidden_states(NAME, seed=1)

    def way(module: nn.Module, call: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
        module.zero_grad(set_to_none=True)
        for micro_batch in (x, other.to(x.dtype)):
            loss = _loss(call(micro_batch))
            with accumulate_gradients(module if lends else ()):
                loss.backward()
                assert call is module or LOANS.are_none, "comet's layers take what is lent"
        return _gradients(module)

    assert_same_training(hf.moe_block(NAME), way)


def test_a_graph_that_is_kept_gives_twice_the_gradient() -> None:
    def way(
        module: nn.Module, call: Callable[..., Tensor], x: Tensor, passes: int = 2
    ) -> dict[str, Tensor]:
        module.zero_grad(set_to_none=True)
        x = x.detach().clone().requires_grad_()
        loss = _loss(call(x))
        for rest in reversed(range(passes)):
            loss.backward(retain_graph=rest > 0)
        return {**_gradients(module), "input": x.grad}

    block = hf.moe_block(NAME)
    twice = assert_same_training(block, way)
    with harness.fresh_compilation():
        compiled = torch.compile(block, backend=harness.BACKEND, fullgraph=True)
        once = way(block, compiled, hf.hidden_states(NAME), passes=1)
    for name, gradient in twice.items():
        # exact: the second pass repeats the first, and doubling only moves the exponent
        torch.testing.assert_close(gradient, 2 * once[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "wanted",
    [
        ("experts.down_proj",),
        ("gate.weight", "input"),
    ],
    ids=",".join,
)
def test_autograd_grad_of_a_subset(wanted: tuple[str, ...]) -> None:
    def way(module: nn.Module, call: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
        module.zero_grad(set_to_none=True)
        x = x.detach().clone().requires_grad_()
        sources = {**dict(module.named_parameters()), "input": x}
        found = torch.autograd.grad(_loss(call(x)), [sources[name] for name in wanted])
        assert all(source.grad is None for source in sources.values())
        return dict(zip(wanted, found, strict=True))

    assert_same_training(hf.moe_block(NAME), way)


# "" freezes all parameters: the gradient only passes through
@pytest.mark.parametrize("frozen", ["experts", "gate", "experts.down_proj", ""])
def test_frozen_parameters(frozen: str) -> None:
    block = hf.moe_block(NAME)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))

    def way(module: nn.Module, call: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
        module.zero_grad(set_to_none=True)
        x = x.detach().clone().requires_grad_()
        _loss(call(x)).backward()
        return {**_gradients(module), "input": x.grad}

    found = assert_same_training(block, way)
    assert not [name for name in found if frozen and name.startswith(frozen)]


# -- what is refused --------------------------------------------------------------------------


def test_double_backward_says_that_it_is_not_supported() -> None:
    """torch.compile itself refuses it, in the words that a user of any backend sees."""
    block = hf.moe_block(NAME)
    x = hf.hidden_states(NAME).requires_grad_()
    with harness.fresh_compilation():
        compiled = torch.compile(block, backend=harness.BACKEND, fullgraph=True)
        (gradient,) = torch.autograd.grad(_loss(compiled(x)), x, create_graph=True)
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            _loss(gradient).backward()
        harness.assert_rewritten(harness.snapshot(compiled), 1, train=True)


# -- helpers ----------------------------------------------------------------------------------


def assert_same_training(
    model: nn.Module, way: Way, *, x: Tensor | None = None, layers: int = 1
) -> dict[str, Tensor]:
    """Return what `way` finds with the compiled model, held against eager and a float32 copy."""
    x = hf.hidden_states(NAME) if x is None else x
    wide = copy.deepcopy(model).float()
    ref = way(wide, wide, x.float() if x.is_floating_point() else x)
    eager = way(model, model, x)
    with harness.fresh_compilation():
        compiled = torch.compile(model, backend=harness.BACKEND, fullgraph=True)
        got = way(model, compiled, x)
        harness.assert_rewritten(harness.snapshot(compiled), layers, train=True)
    harness.assert_all_match(got, ref, eager, "compiled")
    return got


def _plain(module: nn.Module, call: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
    return harness.results(module, call, x, train=True)


def _loss(out: Tensor) -> Tensor:
    """A fixed random combination of all elements, exact in bfloat16."""
    generator = torch.Generator().manual_seed(11)
    cotangent = torch.randn(out.shape, generator=generator).bfloat16()
    return (out.float() * cotangent.float()).sum()


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    """Clones of the gradients of what is trained; what is frozen must have none."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            found[name] = parameter.grad.detach().clone()
    return found


def _blocks() -> list[nn.Module]:
    return hf.moe_blocks(hf.causal_lm(NAME))
