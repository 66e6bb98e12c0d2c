"""The cases of test_moe_layer_op.py over NCCL: values, and that streams wait for transfers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.gloo import run_ranks
from moe_cases import GRAD_NAMES, make_case, token_loop
from numerics import assert_matches_ref

from comet_compile.kernels import exchange, ops  # noqa: F401, ops registers the ops

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

LOCAL_EXPERTS = 3
TOKENS = [7, 4]
CASES: dict[str, dict[str, Any]] = {
    "f64": {},
    "biases_before": {"biases": True, "weight_place": "before"},
    "separate_up": {"separate_up": True, "biases": True},
    "bf16": {"permuted": True, "dtype": torch.bfloat16},
    "bf16_odd": {"hidden": 6, "inter": 5, "dtype": torch.bfloat16},
    "empty_experts": {"dtype": torch.bfloat16, "ids": torch.full((11, 2), 4)},
    "no_tokens": {"dtype": torch.bfloat16, "ids": torch.full((11, 2), -1)},
}


def rank_main(rank: int, world_size: int) -> dict[Any, Any]:
    outcome = {}
    for name, options in CASES.items():
        case = make_case(**{"num_tokens": sum(TOKENS), "num_experts": 6, **options}).on("cuda")
        first = sum(TOKENS[:rank])
        tokens, experts = slice(first, first + TOKENS[rank]), slice(rank * 3, rank * 3 + 3)
        for field in ("x", "ids", "weights", "grad_y"):
            setattr(case, field, getattr(case, field)[tokens])
        for field in ("w_in", "w_up", "w_out", "b_in", "b_up", "b_out"):
            value = getattr(case, field)
            setattr(case, field, None if value is None else value[experts])
        where = {"form": "all_to_all", "group_name": dist.group.WORLD.group_name}
        for min_bytes in (1, exchange.MIN_CHUNK_BYTES):
            exchange.MIN_CHUNK_BYTES, whole = min_bytes, exchange.MIN_CHUNK_BYTES
            y, saved, token = torch.ops.comet.moe_layer(
                *case.tensors(),
                None,
                **case.options(),
                out_dtype=case.out_dtype,
                save="nothing",
                **where,
            )
            # A late producer on the stream that the exchange has to wait for.
            torch.cuda._sleep(50_000_000 * (rank + 1))
            grad_y = case.grad_y * 1
            *grads, _ = torch.ops.comet.moe_layer_backward(
                grad_y, *case.tensors(), saved, token, **case.options(), needs=[True] * 8, **where
            )
            exchange.MIN_CHUNK_BYTES = whole
            outcome[name, min_bytes == 1] = [t.cpu() for t in (y, *grads)]
    return outcome


@pytest.fixture(scope="module")
def outcomes() -> list[dict[Any, Any]]:
    return run_ranks(rank_main, 2, backend="nccl", timeout=240)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunked", [False, True])
def test_sharded_layer_matches_the_unsharded(
    outcomes: list[dict[Any, Any]], name: str, chunked: bool
) -> None:
    case = make_case(**{"num_tokens": sum(TOKENS), "num_experts": 6, **CASES[name]})
    ref_y, ref_grads = token_loop(case.to(torch.float64))
    eager_y, eager_grads = token_loop(case)
    results = [rank[name, chunked] for rank in outcomes]
    assert_matches_ref(torch.cat([r[0] for r in results]), ref_y, eager_y, what="y")
    for index, grad_name in enumerate(GRAD_NAMES, start=1):
        if grad_name in ref_grads:
            grad = torch.cat([r[index] for r in results])
            ref, eager = ref_grads[grad_name], eager_grads[grad_name]
            assert_matches_ref(grad, ref, eager, what=f"d_{grad_name}")
