"""Experts that are not bfloat16: the GEMM op that transformers has for them is an expert GEMM.

`transformers::grouped_mm_fallback` differs from `aten._grouped_mm` in one thing: rows behind the
last expert's are zero, where the ATen op leaves them unwritten.
"""

from __future__ import annotations

import joint_graphs
import lockstep
import pytest
import torch
from torch import Tensor, fx
from zoo import hf, near_misses

pytest.importorskip("transformers.integrations.moe")  # registers the op

from comet_compile.passes import probe_ops
from comet_compile.passes.probe import Probe, Support

T = 6
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def gemms(graph: fx.Graph) -> int:
    return sum("grouped_mm_fallback" in target for target in joint_graphs.targets(graph))


def check(graph: fx.Graph, train: bool) -> fx.Node:
    """Require a rewrite that computes the same; return the op."""
    assert gemms(graph) == (4 if train else 2)
    rewritten = joint_graphs.clone(graph)
    counts = joint_graphs.run_pass(rewritten)
    assert counts["regions_portable"] == counts["regions_found"] == 1
    assert gemms(rewritten) == 0
    inputs = lockstep.random_inputs(graph, 1, seed=0, num_tokens=T)
    results = [lockstep.execute(g, inputs, 1) for g in (rewritten, graph)]
    assert not lockstep.differences(*results)
    return joint_graphs.only(rewritten, joint_graphs.MOE)


in_both_modes = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])


@in_both_modes
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_plain(name: str, dtype: torch.dtype, train: bool) -> None:
    block = joint_graphs.small_block(name, "grouped_mm", dtype)
    x = torch.randn(1, T, hf.HIDDEN).to(dtype)
    check(joint_graphs.capture(block, x, train=train), train)


@in_both_modes
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_autocast(name: str, dtype: torch.dtype, train: bool) -> None:
    """Rows in bfloat16 are widened behind the gather: the op takes tokens that were widened."""
    block = joint_graphs.small_block(name, "grouped_mm", F32)

    def call(x: Tensor):
        with torch.autocast("cpu", BF16):
            return block(x)

    x = torch.randn(1, T, hf.HIDDEN).to(dtype)
    op = check(joint_graphs.capture(call, x, train=train), train)
    assert op.args[0].meta["val"].dtype == F32


def test_narrowed_rows_are_no_tokens() -> None:
    """Float32 tokens that go to bfloat16 experts are narrowed before, not inside the region."""
    layer = near_misses.LocalMoE()
    layer.gather = lambda x, order_S: x[order_S // layer.top_k].bfloat16()
    layer.reduce = lambda out, *rest: near_misses.LocalMoE.reduce(layer, out.float(), *rest)
    graph = joint_graphs.capture(layer, torch.randn(T, 32), train=False)
    counts = joint_graphs.run_pass(graph)
    assert not joint_graphs.is_rewritten(counts)


class Fallback(near_misses.LocalMoE):
    """The plain layer in float32, with that op."""

    def __init__(self):
        super().__init__()
        self.float()

    def ffn(self, rows_SH: Tensor, offs_E: Tensor) -> Tensor:
        gemm = torch.ops.transformers.grouped_mm_fallback
        pre_SN = gemm(rows_SH, self.w_in_EHN, offs_E)
        return gemm(self.activate(pre_SN), self.w_out_EIH, offs_E)


@in_both_modes
def test_other_layers_may_call_it(train: bool) -> None:
    check(joint_graphs.capture(Fallback(), torch.randn(T, 32), train=train), train)


def probe(data: Tensor, *dims: int) -> Probe:
    """A probe that tracks all columns of `dims`, in wider dimensions of zeros."""
    supports = [
        Support(size + 5, tuple(range(size)), zero=True) if dim in dims else None
        for dim, size in enumerate(data.shape)
    ]
    return Probe(data, tuple(supports))


@pytest.mark.parametrize(
    "ends",
    [(2, 2, 6), (0, 3, 4)],  # an expert without rows; the first without, and two rows left over
    ids=str,
)
def test_probes_follow_the_real_op(ends: tuple[int, ...]) -> None:
    rows = torch.randn(6, 4, dtype=torch.float64)
    stack = torch.randn(3, 4, 5, dtype=torch.float64)
    offs = torch.tensor(ends, dtype=torch.int32)
    op = torch.ops.transformers.grouped_mm_fallback.default
    expected = op(rows, stack, offs)
    held = probe_ops.apply(op, (probe(rows, 1), probe(stack, 1, 2), offs), {})
    torch.testing.assert_close(held.data, expected)

    rows, stack = rows.requires_grad_(), stack.requires_grad_()
    grad = torch.randn(6, 5, dtype=torch.float64)
    starts = [0, *ends[:-1]]
    pieces = [rows[a:b] @ stack[e] for e, (a, b) in enumerate(zip(starts, ends, strict=True))]
    out = torch.cat([*pieces, torch.zeros(6 - ends[-1], 5, dtype=torch.float64)])
    wanted = torch.autograd.grad(out, (rows, stack), grad)
    handler = probe_ops.NAMED_HANDLERS["transformers::grouped_mm_fallback_backward"]
    given = (probe(rows.detach(), 1), probe(stack.detach(), 1, 2), offs, probe(grad, 1))
    for value, gradient in zip(handler(*given), wanted, strict=True):
        torch.testing.assert_close(value.data, gradient)
