"""`.tolist()` stays in the graph of a comet frame, and nobody pays for it.

A stand-in with the mark of the comet backend takes the place of the real one: what is tested
is which graphs Dynamo makes, not what is done with them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from distributed.gloo import RankPool
from functorch.compile import make_boxed_func
from torch._dynamo import convert_frame
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.utils import counters
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from zoo.ep import tokens
from zoo.textbook import FuncolMoE
from zoo.titan import TitanMoE

from comet_compile import capture, records

OFF = {"comet.capture_scalars": False}


class Recorder:
    """A backend that keeps its graphs and runs them as they are."""

    def __init__(self, *, comet: bool = True):
        self.graphs: list[torch.fx.GraphModule] = []
        if comet:
            self._comet_backend = True

    def __call__(self, gm, example_inputs, *, mode=None, options=None):
        self.graphs.append(gm)
        return self.compile(gm, example_inputs)

    def compile(self, gm, example_inputs):
        return gm.forward


class RefusesUnbacked(Recorder):
    """Fails on a graph that reads a scalar from a tensor, as Inductor does on some."""

    def compile(self, gm, example_inputs):
        if _reads_scalars(gm):
            raise NotImplementedError("unbacked")
        return gm.forward


class RefusesUnbackedBackward(Recorder):
    """Fails on the backward graph of such a graph."""

    def compile(self, gm, example_inputs):
        def backward_compiler(bw, inputs):
            if _reads_scalars(gm):
                raise NotImplementedError("unbacked backward")
            return make_boxed_func(bw.forward)

        compiler = aot_autograd(
            fw_compiler=lambda fw, inputs: make_boxed_func(fw.forward),
            bw_compiler=backward_compiler,
        )
        with capture.failing_early():
            return compiler(gm, example_inputs)


def _reads_scalars(gm: torch.fx.GraphModule) -> bool:
    return any(node.target in ("item", torch.Tensor.item) for node in gm.graph.nodes)


def split_and_double(x, counts):
    return torch.cat([part * 2 for part in x.split(counts.tolist())])


def index_list(x, counts):
    """A list indexed by a captured integer, as in Megatron's sort_chunks_by_idxs."""
    factors = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    return x * factors[counts.tolist()[0]] + 1


def break_then_split(x, counts):
    x = x + 1
    torch._dynamo.graph_break()
    return torch.cat([part * 2 for part in x.split(counts.tolist())])


def add_and_split(x, counts):
    return torch.cat([part * 2 for part in (x + 1).split(counts.tolist())])


def fails_anyway(x, counts):
    return _raise(x, counts.tolist()[0])


def _raise(x, n):
    raise ValueError("from the model")


@pytest.fixture(autouse=True)
def hook(monkeypatch) -> Iterator[None]:
    monkeypatch.delenv("COMET_CAPTURE_SCALARS", raising=False)
    was_installed = hasattr(convert_frame._compile, "_comet_original")
    torch._dynamo.reset()
    counters.clear()
    capture.install()
    yield
    if not was_installed:
        capture.uninstall()
    torch._dynamo.reset()
    assert not torch._dynamo.config.capture_scalar_outputs


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(10, 4)


@pytest.fixture
def splits() -> torch.Tensor:
    return torch.tensor([3, 7])


def _compiled(fn, backend, **kwargs: Any):
    return torch.compile(fn, backend=backend, **kwargs)


def test_tolist_stays_in_the_graph(x, splits):
    backend = Recorder()
    out = _compiled(split_and_double, backend)(x, splits)
    assert torch.equal(out, split_and_double(x, splits))
    assert len(backend.graphs) == 1
    assert _reads_scalars(backend.graphs[0])
    assert not counters["graph_break"]
    assert not counters["comet"]["capture_retries"]


def test_function_resumed_after_a_break_captures_too(x, splits):
    backend = Recorder()
    out = _compiled(break_then_split, backend)(x, splits)
    assert torch.equal(out, break_then_split(x, splits))
    assert [_reads_scalars(gm) for gm in backend.graphs] == [False, True]


@pytest.mark.parametrize("way", ["options", "partial", "environment"])
def test_capturing_can_be_switched_off(way, x, splits, monkeypatch):
    backend = Recorder()
    compiled = {
        "options": lambda: _compiled(split_and_double, backend, options=OFF),
        "partial": lambda: _compiled(split_and_double, functools.partial(backend, options=OFF)),
        "environment": lambda: _compiled(split_and_double, backend),
    }[way]()
    if way == "environment":
        monkeypatch.setenv("COMET_CAPTURE_SCALARS", "0")
    assert torch.equal(compiled(x, splits), split_and_double(x, splits))
    assert sum(counters["graph_break"].values()) == 1
    assert not any(_reads_scalars(gm) for gm in backend.graphs)


def test_other_backends_are_left_alone(x, splits):
    other, comet = Recorder(comet=False), Recorder()
    _compiled(index_list, comet)(x, splits)
    counters.clear()
    _compiled(split_and_double, other)(x, splits)
    assert sum(counters["graph_break"].values()) == 1
    assert not any(_reads_scalars(gm) for gm in other.graphs)
    _compiled(split_and_double, comet)(x, splits)
    assert _reads_scalars(comet.graphs[-1])


def test_comet_is_recognised_behind_the_wrappers_of_torch():
    backend = Recorder()
    wrapped = torch._TorchCompileWrapper(backend, None, {"comet.strict": True, **OFF}, None)
    debug = torch._dynamo.eval_frame.get_compiler_fn(wrapped)
    ddp = DDPOptimizer(2**25, debug)
    for compiler_fn in (wrapped, debug, ddp.compile_fn):
        assert capture._comet_options(compiler_fn) == {"comet.strict": True, **OFF}
    assert capture._comet_options(backend) == {}
    assert capture._comet_options(Recorder(comet=False)) is None


def test_model_that_compiles_only_with_breaks_compiles(x, splits, caplog):
    backend = Recorder()
    with caplog.at_level(logging.INFO, logger="comet_compile"):
        out = _compiled(index_list, backend)(x, splits)
    assert torch.equal(out, index_list(x, splits))
    assert counters["comet"]["capture_retries"] == 1
    (record,) = caplog.records
    assert "index_list" in record.message
    assert "compiles only with graph breaks" in record.message


def test_retry_leaves_the_counts_of_a_first_attempt(x, splits):
    def counts(**kwargs: Any) -> dict[str, dict[str, int]]:
        torch._dynamo.reset()
        counters.clear()
        _compiled(index_list, Recorder(), **kwargs)(x, splits)
        return {name: dict(counter) for name, counter in counters.items() if counter}

    without = counts(options=OFF)
    retried = counts()
    assert retried.pop("comet") == {"capture_retries": 1}
    assert retried == without


def test_retry_takes_back_the_records_of_the_failed_attempt(x, splits):
    class Publishes(RefusesUnbacked):
        def compile(self, gm, example_inputs):
            records.publish(
                records.GraphRecord(len(self.graphs), "inference", 0, 0, 0.0, (), "", "")
            )
            return super().compile(gm, example_inputs)

    with records.collect() as published:
        _compiled(split_and_double, Publishes())(x, splits)
    assert [record.graph_id for record in published] == [2]


def test_backend_that_fails_on_unbacked_sizes_gets_the_frame_without_them(x, splits):
    backend = RefusesUnbacked()
    out = _compiled(split_and_double, backend)(x, splits)
    assert torch.equal(out, split_and_double(x, splits))
    assert [_reads_scalars(gm) for gm in backend.graphs] == [True, False]
    assert counters["comet"]["capture_retries"] == 1


def test_backward_that_fails_is_noticed_in_time(x, splits):
    backend = RefusesUnbackedBackward()
    weight = torch.randn(10, 4, requires_grad=True)
    _compiled(split_and_double, backend)(x * weight, splits).sum().backward()
    assert torch.equal(weight.grad, 2 * x)
    assert counters["comet"]["capture_retries"] == 1


def test_failure_without_captured_scalars_is_not_retried(x):
    class Fails(Recorder):
        def compile(self, gm, example_inputs):
            raise NotImplementedError("whatever the graph")

    backend = Fails()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="whatever the graph"):
        _compiled(lambda x: x + 1, backend)(x)
    assert len(backend.graphs) == 1


def test_error_of_the_attempt_without_capturing_is_the_one_raised(x, splits):
    class Fails(Recorder):
        def compile(self, gm, example_inputs):
            raise NotImplementedError(f"scalars: {_reads_scalars(gm)}")

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="scalars: False") as error:
        _compiled(add_and_split, Fails())(x, splits)
    assert "scalars: True" not in str(error.value.__context__)
    assert not counters["comet"]["capture_retries"]


def test_error_of_the_model_comes_through(x, splits):
    with pytest.raises(ValueError, match="from the model"):
        _compiled(fails_anyway, Recorder())(x, splits)


def test_setting_of_the_user_is_kept(x, splits):
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        with pytest.raises(GuardOnDataDependentSymNode, match="data-dependent"):
            _compiled(index_list, Recorder())(x, splits)
        assert torch._dynamo.config.capture_scalar_outputs
    assert not counters["comet"]["capture_retries"]


def test_compiled_frames_do_not_meet_the_hook(x, splits, monkeypatch):
    calls = []
    hooked = convert_frame._compile
    monkeypatch.setattr(
        convert_frame, "_compile", lambda *args, **kw: (calls.append(1), hooked(*args, **kw))[1]
    )
    compiled = _compiled(split_and_double, Recorder())
    for first in (3, 5, 0, 10):  # other splits, one of them empty
        counts = torch.tensor([first, 10 - first])
        assert torch.equal(compiled(x, counts), split_and_double(x, counts))
    assert len(calls) == 1


def test_new_sizes_compile_twice_and_retried_frames_no_more(x):
    for fn, backend in ((split_and_double, Recorder()), (index_list, Recorder())):
        counters.clear()
        compiled = _compiled(fn, backend)
        for rows in (10, 14, 18, 22):
            value, counts = torch.randn(rows, 4), torch.tensor([3, rows - 3])
            assert torch.equal(compiled(value, counts), fn(value, counts))
        assert len(backend.graphs) == 2  # static, then dynamic


def test_install_twice_wraps_once():
    hooked = convert_frame._compile
    capture.install()
    assert convert_frame._compile is hooked
    capture.uninstall()
    assert not hasattr(convert_frame._compile, "_comet_original")
    capture.uninstall()
    capture.install()


@pytest.mark.parametrize("allowed", ["1", "0"])
def test_unknown_torch_falls_back_to_the_process_setting(allowed, monkeypatch, caplog):
    monkeypatch.setenv("COMET_CAPTURE_SCALARS", allowed)
    monkeypatch.setattr(convert_frame, "_compile", lambda code, backend: None)
    with torch._dynamo.config.patch(capture_scalar_outputs=False):
        capture.install()
        assert torch._dynamo.config.capture_scalar_outputs == (allowed == "1")
    assert not hasattr(convert_frame._compile, "_comet_original")
    assert ("for the whole process" in caplog.text) == (allowed == "1")


def _dropless_layer(rank: int, world_size: int, layer_class: type) -> dict[str, Any]:
    capture.install()
    layer = layer_class().requires_grad_(False)
    result = {}
    for name, kwargs in (("on", {}), ("full", {"fullgraph": True}), ("off", {"options": OFF})):
        torch._dynamo.reset()
        backend = Recorder()
        compiled = _compiled(layer, backend, **kwargs)
        first = tokens(16, seed=rank)
        same = torch.equal(compiled(first), layer(first))
        num_first = len(backend.graphs)
        for step, num_tokens in enumerate((24, 8) if name == "on" else ()):
            value = tokens(num_tokens + rank, seed=10 * step + rank)
            same &= torch.equal(compiled(value), layer(value))
        result[name] = (same, num_first, len(backend.graphs))
    dist.barrier()
    return result


@pytest.mark.parametrize("layer_class", [TitanMoE, FuncolMoE])
def test_dropless_layer_is_one_graph(layer_class, pair: RankPool):
    for result in pair.run(_dropless_layer, layer_class):
        assert result["on"] == (True, 1, 2)  # static, then dynamic in the number of tokens
        assert result["full"] == (True, 1, 1)
        same, num_first, _ = result["off"]
        assert same
        assert num_first > 1
