"""autograd.Functions that write in place keep their gradients (pytorch/pytorch#180642).

torch 2.11 has the bug. On a torch that has the fix, `lossy_capture` takes the fix out again, so
that the same graphs are made and mended on every version. Such a torch returns intermediates only
from functions with a side effect; that is what `FORWARDS` is for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from distributed.gloo import RankPool
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.variables import higher_order_ops
from torch.utils.checkpoint import checkpoint
from zoo.ep import tokens
from zoo.textbook import InPlaceFunctionMoE

from comet_compile import repair
from comet_compile.errors import CorrectnessWarning

FORWARDS: list[str] = []


class CopyIntoFresh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        FORWARDS.append("CopyIntoFresh")
        out = torch.empty_like(x)
        out.copy_(2 * x)
        return out

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class ArithmeticInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        FORWARDS.append("ArithmeticInPlace")
        ctx.save_for_backward(x)
        out = x.clone()
        out.mul_(x)
        out.add_(1)
        return out

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * grad * x


class SavesItsResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        FORWARDS.append("SavesItsResult")
        out = torch.empty_like(x)
        out.copy_(x.exp())
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        return out * grad


class OutArgument(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        FORWARDS.append("OutArgument")
        out = torch.empty_like(x)
        torch.mul(x, 3, out=out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


class IndexAndValues(torch.autograd.Function):
    """Two results, the first of them without a gradient."""

    @staticmethod
    def forward(ctx, x):
        FORWARDS.append("IndexAndValues")
        out = torch.empty_like(x)
        out.copy_(x * 3)
        largest = torch.empty(x.shape[0], dtype=torch.int64)
        largest.copy_(x.argmax(1))
        ctx.mark_non_differentiable(largest)
        return largest, out

    @staticmethod
    def backward(ctx, grad_largest, grad):
        return 3 * grad


class ThroughView(torch.autograd.Function):
    """Writes through a view of its result: right on every version."""

    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        out.view(-1).copy_(x.reshape(-1) * 3)
        return out

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


class SameTensorTwice(torch.autograd.Function):
    """Cannot be mended: which of the two gradients is meant for which?"""

    @staticmethod
    def forward(ctx, x):
        FORWARDS.append("SameTensorTwice")
        out = torch.empty_like(x)
        return out.copy_(x * 3), out

    @staticmethod
    def backward(ctx, grad, other):
        return 3 * grad + 5 * other


def copy_into_fresh(x):
    return CopyIntoFresh.apply(x * 2).sin()


def arithmetic_in_place(x):
    return ArithmeticInPlace.apply(x * 2).sin()


def saves_its_result(x):
    return SavesItsResult.apply(x * 2).sin()


def out_argument(x):
    return OutArgument.apply(x * 2).sin()


def index_and_values(x):
    largest, out = IndexAndValues.apply(x * 2)
    return out.sin() * largest.unsqueeze(1)


def two_in_a_row(x):
    return SavesItsResult.apply(CopyIntoFresh.apply(x).sin())


def under_checkpoint(x):
    return checkpoint(copy_into_fresh, x, use_reentrant=False)


def through_view(x):
    return ThroughView.apply(x * 2).sin()


LOSSY = [
    copy_into_fresh,
    arithmetic_in_place,
    saves_its_result,
    out_argument,
    index_and_values,
    two_in_a_row,
    under_checkpoint,
]


class Backend:
    """Runs the captured graph under AOTAutograd, mended or as it is."""

    def __init__(self, *, mend: bool, change: Callable[[torch.fx.GraphModule], None] | None = None):
        self.mend = mend
        self.change = change
        self.codes: list[str] = []
        self.computations: list[list[tuple[str, str]]] = []
        self.reports: list[repair.RepairReport] = []

    def __call__(self, gm, example_inputs):
        if self.change is not None:
            self.change(gm)
        self._record(gm)
        if self.mend:
            self.reports.append(repair.repair_autograd_functions(gm))
            gm.graph.lint()
            self._record(gm)
        return aot_eager(gm, example_inputs)

    def _record(self, gm: torch.fx.GraphModule) -> None:
        self.codes.append(gm.print_readable(print_output=False))
        self.computations.append(
            [
                (node.op, str(node.target))
                for module in gm.modules()
                if isinstance(module, torch.fx.GraphModule)
                for node in module.graph.nodes
                if node.op not in ("placeholder", "output")
            ]
        )


@pytest.fixture(autouse=True)
def lossy_capture(monkeypatch) -> Iterator[None]:
    torch._dynamo.reset()
    FORWARDS.clear()
    repair._warn.cache_clear()
    original = higher_order_ops.collect_intermediate_outputs

    def collect(tx, subtracer, outputs, filter_aliased_intermediates=False):
        return original(tx, subtracer, outputs, filter_aliased_intermediates=False)

    monkeypatch.setattr(higher_order_ops, "collect_intermediate_outputs", collect)
    yield
    torch._dynamo.reset()


def _gradient(fn: Callable[[Tensor], Tensor]) -> Tensor:
    x = torch.linspace(-1, 1, 32).view(8, 4).requires_grad_()
    fn(x).sum().backward()
    return x.grad


def _compiled_gradient(fn: Callable[[Tensor], Tensor], backend: Backend) -> Tensor:
    torch._dynamo.reset()
    return _gradient(torch.compile(fn, backend=backend, fullgraph=True))


@pytest.mark.parametrize("fn", LOSSY, ids=lambda fn: fn.__name__)
def test_lost_gradients_are_found_again(fn):
    expected = _gradient(fn)
    assert not torch.allclose(_compiled_gradient(fn, Backend(mend=False)), expected)
    backend = Backend(mend=True)
    torch.testing.assert_close(_compiled_gradient(fn, backend), expected)
    (report,) = backend.reports
    assert not report.unrepaired
    assert len(report.repaired) == (2 if fn is two_in_a_row else 1)
    assert all(f"test_repair.py:{_line(fn)}" in place for place in report.repaired)


def _line(fn: Callable[..., Any]) -> int:
    last = copy_into_fresh if fn is under_checkpoint else fn
    return last.__code__.co_firstlineno + 1


def test_graph_that_loses_nothing_is_left_as_it_is():
    backend = Backend(mend=True)
    torch.testing.assert_close(_compiled_gradient(through_view, backend), _gradient(through_view))
    assert backend.reports == [repair.RepairReport()]
    assert backend.codes[0] == backend.codes[1]


def test_mended_graph_computes_what_it_did():
    backend = Backend(mend=True)
    _compiled_gradient(copy_into_fresh, backend)
    assert backend.codes[0] != backend.codes[1]
    assert backend.computations[0] == backend.computations[1]
    assert ("call_method", "copy_") in backend.computations[1]


def test_mending_twice_is_mending_once():
    def mend(gm):
        assert repair.repair_autograd_functions(gm).repaired

    backend = Backend(mend=True, change=mend)
    _compiled_gradient(copy_into_fresh, backend)
    assert backend.reports == [repair.RepairReport()]


def test_alias_that_leaves_by_a_side_effect_is_the_result():
    seen = []

    class Leaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = torch.empty_like(x)
            seen.append(out.copy_(x * 3))
            return out

        @staticmethod
        def backward(ctx, grad):
            return 3 * grad

    def fn(x):
        seen.clear()
        return Leaks.apply(x).sin() + seen[0]

    x = torch.randn(8, 4, requires_grad=True)
    torch.compile(fn, backend=Backend(mend=True), fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(x.grad, 3 * (3 * x).cos() + 3)


def _returns_twice(x):
    first, second = SameTensorTwice.apply(x * 2)
    return first + second


def test_what_cannot_be_mended_is_named():
    backend = Backend(mend=True)
    with pytest.warns(CorrectnessWarning, match=r"test_repair.py:\d+ in _returns_twice.*180642"):
        _compiled_gradient(_returns_twice, backend)
    assert not backend.reports[0].repaired
    assert len(backend.reports[0].unrepaired) == 1
    assert backend.codes[0] == backend.codes[1]


def test_one_place_is_named_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            _compiled_gradient(_returns_twice, Backend(mend=True))
    assert [w.category for w in caught].count(CorrectnessWarning) == 1


def test_bodies_that_two_calls_share_are_left_as_they_are():
    def share(gm):
        first, second = gm.graph.find_nodes(op="call_function", target=repair._APPLY)
        second.args = (*first.args[:2], *second.args[2:])
        gm.recompile()

    def fn(x):
        return CopyIntoFresh.apply(CopyIntoFresh.apply(x).sin())

    backend = Backend(mend=True, change=share)
    with pytest.warns(CorrectnessWarning, match="180642"):
        _compiled_gradient(fn, backend)
    assert len(backend.reports[0].unrepaired) == 2
    assert backend.codes[0] == backend.codes[1]


@pytest.mark.parametrize(
    ("version", "needed"),
    [("2.11.0+cu130", True), ("2.12.1", True), ("2.13.0+cpu", False), ("2.14.0", False)],
)
def test_versions_that_need_it(version, needed, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert repair.needs_repair() == needed


class MegatronExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, x, output_splits, input_splits):
        ctx.group, ctx.output_splits, ctx.input_splits = group, output_splits, input_splits
        x = x.contiguous()
        out = x.new_empty(size=[sum(output_splits), *x.size()[1:]], dtype=x.dtype)
        dist.all_to_all_single(out, x, output_splits, input_splits, group=group)
        return out

    @staticmethod
    def backward(ctx, *grad):
        grad_x = MegatronExchange.apply(ctx.group, *grad, ctx.input_splits, ctx.output_splits)
        return None, grad_x, None, None


class DeepSpeedExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, x):
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, *grad):
        return None, DeepSpeedExchange.apply(ctx.group, *grad)


class GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, x):
        ctx.group = group
        out = x.new_empty(2 * x.shape[0], x.shape[1])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty(grad.shape[0] // 2, grad.shape[1])
        dist.reduce_scatter_tensor(out, grad.contiguous(), group=ctx.group)
        return None, out


class ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, x):
        ctx.group = group
        out = x.new_empty(x.shape[0] // 2, x.shape[1])
        dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty(2 * grad.shape[0], grad.shape[1])
        dist.all_gather_into_tensor(out, grad.contiguous(), group=ctx.group)
        return None, out


def megatron(x, counts_22):
    send, receive = counts_22[0].tolist(), counts_22[1].tolist()
    rows = MegatronExchange.apply(dist.group.WORLD, x * 2, receive, send)
    return MegatronExchange.apply(dist.group.WORLD, rows.sin(), send, receive)


def deepspeed(x, counts_22):
    rows = DeepSpeedExchange.apply(dist.group.WORLD, x * 2)
    return DeepSpeedExchange.apply(dist.group.WORLD, rows.sin())


def gather_and_scatter(x, counts_22):
    rows = GatherRows.apply(dist.group.WORLD, x * 2)
    return ScatterRows.apply(dist.group.WORLD, rows.sin())


def _exchanges(rank: int, world_size: int) -> dict[str, tuple[float, float, int]]:
    """For each way of writing it: the gradient's error as captured, mended, and calls mended."""
    counts = torch.tensor(([[3, 5], [3, 2]], [[2, 6], [5, 6]])[rank])  # send, receive
    x = torch.linspace(-1, 1, 32).view(8, 4) * (rank + 1)

    def gradient_of_x(call: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        call(leaf, counts).square().sum().backward()
        return leaf.grad

    layer = InPlaceFunctionMoE()

    def gradient_of_experts(call: Callable[[Tensor], Tensor]) -> Tensor:
        layer.zero_grad(set_to_none=True)
        call(tokens(16, seed=rank)).float().square().sum().backward()
        return layer.w_in_LHN.grad.clone()

    ways = (megatron, deepspeed, gather_and_scatter)
    result = {fn.__name__: _errors(fn, gradient_of_x, fullgraph=True) for fn in ways}
    result["layer"] = _errors(layer, gradient_of_experts, fullgraph=False)
    return result


def _errors(
    fn: Callable[..., Tensor], gradient: Callable[[Any], Tensor], *, fullgraph: bool
) -> tuple[float, float, int]:
    expected = gradient(fn)
    lossy_error = 0.0
    if repair.needs_repair():
        torch._dynamo.reset()
        lossy = gradient(torch.compile(fn, backend=Backend(mend=False), fullgraph=fullgraph))
        lossy_error = _error(lossy, expected)
    torch._dynamo.reset()
    backend = Backend(mend=True)
    mended = gradient(torch.compile(fn, backend=backend, fullgraph=fullgraph))
    calls = sum(len(report.repaired) for report in backend.reports)
    return lossy_error, _error(mended, expected), calls


def _error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max()).item()


def test_exchanges_of_the_frameworks_keep_their_gradients(pair: RankPool):
    for result in pair.run(_exchanges):
        assert set(result) == {"megatron", "deepspeed", "gather_and_scatter", "layer"}
        for name, (lossy, mended, calls) in result.items():
            assert mended == 0.0, name  # the same operations in the same order as eager
            if repair.needs_repair():  # without a side effect, others lose nothing here
                assert lossy == 1.0, name  # all zero
                assert calls >= 1, name
