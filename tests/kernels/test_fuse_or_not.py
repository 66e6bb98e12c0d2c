"""Whether a layer is fused is decided by what both ways are predicted to take."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="triton is not installed")

from comet_compile.kernels import fuse_or_not, fused, machine_file, paths
from comet_compile.kernels.activation import Activation
from comet_compile.kernels.cost_model import H100, Load, predict, total_us
from comet_compile.kernels.experts import ExpertParams, LayerMath
from comet_compile.kernels.portable import Routed
from comet_compile.kernels.unfused_cost import predict_unfused

MATH = LayerMath(Activation.parse("silu_glu"), "after", torch.float32)
# products of Triton at a third of the rate, torch's as they are
SLOW = dataclasses.replace(H100, gemm_tf=1.9, row_gemm_tf=2.0)
SIZES = {
    "qwen3": (2048, 768, 128, 8),
    "olmoe": (2048, 1024, 64, 8),
    "mixtral": (4096, 14336, 8, 2),
    "deepseek": (7168, 2048, 256, 8),
    "phi": (4096, 6400, 16, 2),
    "qwen2": (2048, 1408, 60, 4),
}


def layer(num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Routed, ExpertParams]:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Any:
        return torch.empty(shape, dtype=dtype, device="cuda")

    routed = Routed(
        empty(num_tokens, 2048),
        empty(num_tokens, 8, dtype=torch.int64),
        empty(num_tokens, 8, dtype=torch.float32),
    )
    w_in, w_out = empty(128, 1536, 2048), empty(128, 2048, 768)
    return routed, ExpertParams(w_in.transpose(1, 2), None, w_out.transpose(1, 2))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose measured machine multiplies slowly in Triton."""
    monkeypatch.delenv("COMET_PORTABLE", raising=False)
    monkeypatch.setattr(fused, "read_device", lambda index: H100.device)
    monkeypatch.setattr(machine_file, "measured_machine", lambda device: SLOW)
    monkeypatch.setattr(paths, "_plans", {})


@pytest.mark.parametrize("name", SIZES)
def test_an_h100_fuses_every_size(name: str) -> None:
    for power in range(17):
        load = Load(*SIZES[name], (2**power,))
        us, unfused_us = fuse_or_not.both_us(load, H100)
        assert unfused_us > us, load


def test_between_ranks_fusing_pays_even_with_slow_products() -> None:
    for name in ("qwen3", "olmoe"):
        load = Load(*SIZES[name], (8192, 8192))
        assert total_us(predict_unfused(load, H100)) > 1.5 * total_us(predict(load, H100))


def test_more_of_anything_takes_longer() -> None:
    base = Load(2048, 768, 128, 8, (4096, 4096))
    us = total_us(predict_unfused(base, H100))
    for changes in ({"tokens": (8192, 8192)}, {"inter": 1536}, {"hidden": 4096}, {"hot": 8.0}):
        more = dataclasses.replace(base, **changes)  # type: ignore[arg-type]
        assert total_us(predict_unfused(more, H100)) > us, changes
    slow_link = dataclasses.replace(H100, nccl_gb=H100.nccl_gb / 4)
    assert total_us(predict_unfused(base, slow_link)) > us


@pytest.mark.usefixtures("slow")
def test_what_is_predicted_slower_is_left_to_torch_and_says_why() -> None:
    with FakeTensorMode():
        few, many = layer(1), layer(16384)
        assert paths.choose_path("local", *few, MATH, rows=8).is_fused
        choice = paths.choose_path("local", *many, MATH, rows=8 * 16384)
    assert not choice.is_fused
    assert not choice.reads_host
    reason = choice.plan["why_portable"]
    assert "torch's operators are expected to be faster" in reason
    assert "for 16384 tokens" in reason
    us, unfused_us = fuse_or_not.both_us(Load(2048, 768, 128, 8, (16384,)), SLOW)
    assert f"{unfused_us:.0f} us instead of {us:.0f}" in reason
    assert math.isclose(us, total_us(predict(Load(2048, 768, 128, 8, (16384,)), SLOW)))


@pytest.mark.usefixtures("slow")
def test_a_call_decides_as_its_graph_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "runs_kernels", lambda device: True)
    with FakeTensorMode():
        assert paths.plan_here(*layer(1), MATH, 1, alone=True) is not None
        assert paths.plan_here(*layer(16384), MATH, 2, alone=True) is None
        # what peers wait for is not left out
        assert paths.plan_here(*layer(16384), MATH, 2) is not None


@pytest.mark.usefixtures("slow")
def test_only_what_torch_does_without_the_host_is_left_to_it() -> None:
    with FakeTensorMode():
        half = layer(16384, torch.float16)
        assert paths.choose_path("local", *half, MATH, rows=8 * 16384).is_fused
        many = layer(16384)
        assert paths.choose_path("all_to_all", *many, MATH, rows=8 * 16384).is_fused
