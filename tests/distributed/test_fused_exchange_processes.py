"""The fused exchange as the op runs it, in two real processes on CPU that wait for each other.

Triton's interpreter runs the kernels; files that both processes map take the place of symmetric
memory, so flags, epochs, the board, the agreement and the workspace's growth are the real ones.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.gloo import run_ranks

pytest.importorskip("triton", reason="needs Triton for its interpreter")

HIDDEN, INTER, LOCAL, TOP_K = 40, 24, 2, 2
BUFFER_BYTES = 1 << 20
# tokens of both ranks, call by call: the same, none, more than the workspace holds, few again
CALLS = ((7, 5), (5, 7), (3, 0), (0, 0), (90, 70), (5, 9))


def use_interpreter(rank: int, folder: str, can_map: bool) -> Any:
    """Put files in the place of symmetric memory and a small plan in the place of the planned."""
    import triton_interpreter

    from comet_compile.kernels import (
        exchange_call,
        exchange_plan,
        fused,
        links,
        paths,
        plan,
        workspace,
    )

    triton_interpreter.interpret_for_good()

    class FileWorkspace(workspace.Workspace):
        def __init__(self, num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> None:
            if not can_map:
                raise RuntimeError("no peer access")
            kept = len(workspace._workspaces[group])
            self.num_bytes, self.group_name = num_bytes, group.group_name
            self.rank, self.num_ranks = group.rank(), group.size()
            self.buffers = [
                torch.from_file(
                    f"{folder}/{kept}-{peer}", shared=True, size=BUFFER_BYTES, dtype=torch.uint8
                )
                for peer in range(self.num_ranks)
            ]
            assert num_bytes <= BUFFER_BYTES
            self.buffer = self.buffers[self.rank]
            self.table = torch.tensor([buffer.data_ptr() for buffer in self.buffers])
            self.peers = self.table.data_ptr()
            self.make_counters(device)
            self.message = torch.zeros(4, dtype=torch.int32)

        def enter(self) -> None:
            self.check()

    tiles = plan.GemmTiles(16, 16, 32, 4, 2, 2, num_programs=2)
    device = plan.Device(num_sms=2, shared_bytes=2**18, capability=(9, 0))
    make_plan, make_call = exchange_plan.plan_exchange, exchange_call.ExchangeCall.__init__

    def one_fetcher(*args: Any, **facts: Any) -> Any:
        # programs run one after another: the second would wait for tokens that the third fetches
        return dataclasses.replace(make_plan(*args, **facts), num_fetchers=1)

    def without_clock(self: Any, *args: Any, **kwargs: Any) -> None:
        make_call(self, *args, **{**kwargs, "clock": False})
        self.waits = (self.workspace.abort, self.workspace.message, 10**9)

    def choose(*args: Any, **kwargs: Any) -> plan.Plan:
        return plan.Plan(tiles, tiles, dataclasses.replace(tiles, block_n=64), tiles, gathers=True)

    here: Any
    for here in (fused, exchange_plan):
        here.choose_plan, here.read_device = choose, lambda index: device
    exchange_plan.plan_exchange = one_fetcher
    here = exchange_call.ExchangeCall
    here.__init__ = without_clock
    here = fused
    here.why_not = lambda *args: None
    here = paths
    here.runs_kernels = lambda device: True
    here = workspace
    here.Workspace = FileWorkspace
    here = links
    here._offer = lambda device: {"machine": "", "gpu": rank, "capability": [9, 0], "sms": 2}
    return workspace


def use_row_bytes(most: int) -> None:
    """Let the rows of a call take no more."""
    from comet_compile.kernels import exchange_paths

    here: Any = exchange_paths
    here.row_bytes = lambda: (most, most)


def backward_main(
    rank: int,
    num_ranks: int,
    folder: str,
    counts: tuple[int, int] = (7, 5),
    max_row_bytes: int = 2**30,
) -> tuple[list[float], list[int]]:
    """Return the errors of d_x, d_weights and d_w_in, and the calls of each workspace."""
    from comet_compile.kernels import (
        exchange_paths,
        ops,  # noqa: F401, registers the ops
        saved_rows,
    )
    from comet_compile.kernels.refs import moe_layer_backward_ref

    workspace = use_interpreter(rank, folder, can_map=True)
    use_row_bytes(max_row_bytes)
    here: Any = exchange_paths
    here._WORTH_READING = 0
    here = saved_rows
    torch.manual_seed(3)
    experts = LOCAL * num_ranks
    w_in = (torch.randn(experts, 2 * INTER, HIDDEN) * HIDDEN**-0.5).half().transpose(1, 2)
    w_out = (torch.randn(experts, HIDDEN, INTER) * INTER**-0.5).half().transpose(1, 2)
    x = torch.randn(sum(counts), HIDDEN).half()
    weights, ids = torch.randn(sum(counts), experts).softmax(-1).topk(TOP_K, -1)
    grad_y = torch.randn(sum(counts), HIDDEN).half()
    refs = moe_layer_backward_ref(
        grad_y, x, ids, weights, w_in, None, w_out, activation="silu_glu", weight_place="after"
    )
    first = sum(counts[:rank])
    tokens = slice(first, first + counts[rank])
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
    errors = []
    tensors = (x[tokens], ids[tokens], weights[tokens], w_in[mine], None, w_out[mine], *[None] * 4)
    options: dict[str, Any] = {
        "activation": "silu_glu",
        "weight_place": "after",
        "product_dtype": torch.float32,
        "form": "all_to_all",
        "group_name": dist.group.WORLD.group_name,
    }
    num_slots, in_rounds = counts[rank] * TOP_K, max_row_bytes < 2**30
    saves = [
        ("nothing", 0, 0),
        ("pre_activation", 0, num_ranks * num_slots),
        ("balanced", 256, num_slots * 9 // 8 + 256),
        ("balanced", -num_slots, num_slots // 8),  # for hardly any
    ]
    for save, more, room in saves[: 2 if in_rounds else 4]:
        here._MORE_ROWS = more
        _, saved, _ = torch.ops.comet.moe_layer(
            *tensors, **options, out_dtype=torch.float16, save=save
        )
        if room:
            rows = saved_rows.unpack(saved, torch.float16)
            assert rows is not None
            assert rows.shape == (room, 2 * INTER)
            # as many as fit, but none where it takes several rounds
            assert bool(rows.isnan().all()) == in_rounds
        grads = torch.ops.comet.moe_layer_backward(
            grad_y[tokens], *tensors[:-1], saved, None, **options, needs=[True] * 8,
            free_saved=save == "balanced",
        )  # fmt: skip
        if room:
            # they are freed if they were used
            used = save == "balanced" and more > 0
            assert (saved.untyped_storage().nbytes() == 0) == used
        wanted = (refs[0][tokens], refs[1][tokens], refs[2][mine])
        errors += [
            float((got.float() - ref).norm() / ref.norm())
            for got, ref in zip(grads, wanted, strict=False)
        ]
    return errors, [int(ws.epoch) for ws in workspace._workspaces[dist.group.WORLD]]


def rank_main(
    rank: int,
    num_ranks: int,
    folder: str,
    unable: int | None = None,
    max_row_bytes: int = 2**30,
) -> tuple[list[float], list[int]]:
    """Return the error of every call, and the calls that each workspace has seen."""
    from comet_compile.kernels import ops  # noqa: F401, registers the ops
    from comet_compile.kernels.refs import moe_layer_ref

    workspace = use_interpreter(rank, folder, can_map=rank != unable)
    use_row_bytes(max_row_bytes)
    generator = torch.Generator().manual_seed(5)
    experts = LOCAL * num_ranks

    def matrix(k: int, n: int) -> torch.Tensor:
        rows = torch.randn(experts, n, k, generator=generator) * k**-0.5
        return rows.half().transpose(1, 2)

    w_in, w_out = matrix(HIDDEN, 2 * INTER), matrix(INTER, HIDDEN)
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
    errors = []
    for call, counts in enumerate(CALLS):
        torch.manual_seed(10 * call + rank)
        x = torch.randn(counts[rank], HIDDEN).half()
        weights, ids = torch.randn(counts[rank], experts).softmax(-1).topk(TOP_K, -1)
        y, _, _ = torch.ops.comet.moe_layer(
            x,
            ids,
            weights,
            w_in[mine],
            None,
            w_out[mine],
            *[None] * 4,
            activation="silu_glu",
            weight_place="after",
            product_dtype=torch.float32,
            out_dtype=torch.float16,
            form="all_to_all",
            group_name=dist.group.WORLD.group_name,
            save="nothing",
        )
        ref = moe_layer_ref(
            x, ids, weights, w_in, None, w_out, activation="silu_glu", weight_place="after"
        )
        errors.append(float((y.float() - ref).norm() / ref.norm()) if ref.numel() else 0.0)
    kept = workspace._workspaces[dist.group.WORLD]
    return errors, [int(ws.epoch) for ws in kept]


def tuned_main(
    rank: int, num_ranks: int, folder: str, all_have_it: bool
) -> tuple[list[float], set[str], set[int], list[str]]:
    """Return errors, the source and fetchers of each plan, and what was warned of."""
    import triton

    shape = {
        "ranks": num_ranks, "top_k": TOP_K, "experts": LOCAL, "hidden": HIDDEN, "inter": INTER,
        "gated": True, "interleaved": False, "itemsize": 2,
    }  # fmt: skip
    document = {
        "format": 1,
        "device": {"name": "", "num_sms": 2, "capability": [9, 0]},
        "versions": {"triton": triton.__version__},
        "entries": [
            {
                "shape": {**shape, "tokens": tokens},
                "direction": "forward",
                "changes": {"layer1.group_m": 1},
                "complete": True,
            }
            for tokens in (64, 128)
        ],
    }
    path = Path(folder) / f"table-{rank}.json"
    path.write_text(json.dumps(document))
    os.environ["COMET_TUNED"] = str(path) if all_have_it or rank == 0 else "0"
    globals()["CALLS"] = CALLS[:1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        errors, _ = rank_main(rank, num_ranks, folder)
    from comet_compile.kernels import exchange_paths

    plans = [known.plan.gemms for known in exchange_paths._exchange_plans.values()]
    said = [str(one.message) for one in caught if "tuned" in str(one.message)]
    return errors, {p.source for p in plans}, {p.layer1.group_m for p in plans}, said


def replicated_main(rank: int, num_ranks: int, folder: str) -> tuple[list[float], list[int], str]:
    """Return the errors of replicated layers, the calls of each workspace, and a refusal."""
    from comet_compile.kernels import fused, fused_replicated, ops  # noqa: F401, ops registers
    from comet_compile.kernels.refs import moe_layer_ref

    workspace = use_interpreter(rank, folder, can_map=True)
    here: Any = fused
    choose = here.choose_plan

    def one_program(*args: Any, **kwargs: Any) -> Any:
        # programs run one after another, and all of them wait for each other between steps
        plan = choose(*args, **kwargs)
        return dataclasses.replace(plan, layer1=dataclasses.replace(plan.layer1, num_programs=1))

    def without_clock(self: Any, *args: Any, **kwargs: Any) -> None:
        make_call(self, *args, **{**kwargs, "clock": False})
        self.deadline = 10**9

    here.choose_plan = one_program
    fused_replicated._MIN_BYTES = 1  # small layers too
    here = fused_replicated.ReplicatedCall
    make_call, here.__init__ = here.__init__, without_clock
    torch.manual_seed(7)  # all ranks have all tokens
    experts = LOCAL * num_ranks
    w_in = (torch.randn(experts, 2 * INTER, HIDDEN) * HIDDEN**-0.5).half().transpose(1, 2)
    w_out = (torch.randn(experts, HIDDEN, INTER) * INTER**-0.5).half().transpose(1, 2)
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)

    def run(num_tokens: int) -> float:
        x = torch.randn(num_tokens, HIDDEN).half()
        weights, ids = torch.randn(num_tokens, experts).softmax(-1).topk(TOP_K, -1)
        y, _, _ = torch.ops.comet.moe_layer(
            x,
            ids - rank * LOCAL,
            weights,
            w_in[mine],
            None,
            w_out[mine],
            *[None] * 4,
            activation="silu_glu",
            weight_place="after",
            product_dtype=torch.float32,
            out_dtype=torch.float16,
            form="replicated",
            group_name=dist.group.WORLD.group_name,
            save="nothing",
        )
        ref = moe_layer_ref(
            x, ids, weights, w_in, None, w_out, activation="silu_glu", weight_place="after"
        )
        return float((y.float() - ref).norm() / ref.norm()) if ref.numel() else 0.0

    errors = [run(num_tokens) for num_tokens in (9, 9, 0, 1, 150, 4)]
    kept = workspace._workspaces[dist.group.WORLD]
    epochs = [int(ws.epoch) for ws in kept]
    with pytest.raises(ValueError, match="tokens; allowed") as caught:
        run(3 + rank)
    return errors, epochs, str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    import triton_interpreter

    reason = triton_interpreter.why_not()
    if reason is not None:
        pytest.skip(reason)
    for name in ("0-0", "0-1", "1-0", "1-1", "2-0", "2-1"):
        (tmp_path / name).write_bytes(bytes(BUFFER_BYTES))
    return str(tmp_path)


def test_ranks_of_two_processes(folder: str) -> None:
    boards = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    for errors, epochs in run_ranks(rank_main, 2, folder, timeout=240):
        assert max(errors) < 2e-3, "float16's own error is 5e-4"
        assert epochs == [0, 4, 2], "one to try, four calls in the next, two in the grown one"
    left = set(os.listdir("/dev/shm")) - boards if boards else set()
    assert not [name for name in left if name.startswith("comet-")]


def test_a_layer_that_would_need_too_much_memory_runs_in_rounds(folder: str) -> None:
    rounds = run_ranks(rank_main, 2, folder, None, 40_000, timeout=240)
    for errors, epochs in rounds:
        assert max(errors) < 2e-3
        # 90 tokens go in two rounds, in the memory that fewer tokens take
        assert epochs == [0, len(CALLS) + 1]


def test_gradients_between_two_processes(folder: str) -> None:
    for errors, epochs in run_ranks(backward_main, 2, folder, timeout=240):
        assert max(errors) < 4e-3
        # the board's, a forward's, and a larger one for all that follows the first backward
        assert epochs == [0, 1, 7]


def test_gradients_that_would_need_too_much_memory_come_in_rounds(folder: str) -> None:
    for errors, epochs in run_ranks(backward_main, 2, folder, (90, 70), 120_000, timeout=240):
        assert max(errors) < 4e-3
        assert epochs == [0, 6]  # a forward and two rounds, twice


def test_one_rank_that_cannot_map_its_peer_makes_all_portable(folder: str) -> None:
    (errors, tried), (peer_errors, nothing) = run_ranks(rank_main, 2, folder, 1, timeout=240)
    assert max(*errors, *peer_errors) < 2e-3
    assert (tried, nothing) == ([0], [])


@pytest.mark.parametrize("all_have_it", [True, False])
def test_ranks_use_tuned_plans_if_all_have_the_same(folder: str, all_have_it: bool) -> None:
    for rank, (errors, sources, groups, said) in enumerate(
        run_ranks(tuned_main, 2, folder, all_have_it, timeout=240)
    ):
        assert max(errors) < 2e-3
        if all_have_it:
            assert (sources, groups) == ({f"planned by {folder}/table-{rank}.json"}, {1})
            assert said == []
        else:
            assert (sources, groups) == ({"planned by rule"}, {2})
            assert [("group ranks [1] have other tuned plans" in text) for text in said] == (
                [True] if rank == 0 else []
            )


def test_replicated_layers_between_two_processes(folder: str) -> None:
    for errors, epochs, refusal in run_ranks(replicated_main, 2, folder, timeout=240):
        assert max(errors) < 2e-3
        # one to try, one for few tokens, one for 150; without tokens nothing is launched
        assert epochs == [0, 3, 2]
        assert "have [3, 4] tokens; allowed: the same tokens on every rank" in refusal
