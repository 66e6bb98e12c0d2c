"""Run a function in N processes of this machine that form a group, with a deadline."""

from __future__ import annotations

import importlib.util
import io
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    backend: str = "gloo",
) -> list[Any]:
    """Return [fn(rank, world_size, *args) for every rank], each in a process of its own.

    `fn` is a module-level function; the default process group is up when it runs, and for "nccl"
    the rank's GPU is the current one. The first failure of a rank, or the deadline, ends all of
    them and raises.
    """
    context = mp.get_context("spawn")
    # By file: the name that pytest's importlib mode gives a test module cannot be imported.
    address = (fn.__module__, fn.__code__.co_filename, fn.__qualname__)
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store_path = os.path.join(folder, "store")
        processes = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, backend, store_path, timeout, results, address, args),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, results, timeout, getattr(fn, "__name__", str(fn)))
        finally:
            for process in processes:
                process.join(timeout=5.0)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(processes: list[Any], results: Any, timeout: float, name: str) -> list[Any]:
    deadline = time.monotonic() + timeout
    done: dict[int, Any] = {}
    while len(done) < len(processes):
        missing = [rank for rank in range(len(processes)) if rank not in done]
        if time.monotonic() > deadline:
            _kill(processes)
            raise TimeoutError(f"{name}: ranks {missing} did not finish within {timeout} s")
        try:
            rank, ok, value = results.get(timeout=0.2)
        except queue.Empty:
            dead = [r for r in missing if processes[r].exitcode not in (None, 0)]
            if dead:
                _kill(processes)
                raise RuntimeError(
                    f"{name}: rank {dead[0]} died with exit code {processes[dead[0]].exitcode}"
                ) from None
            continue
        if not ok:
            _kill(processes)
            raise RuntimeError(f"{name}: rank {rank} failed\n{value}")
        done[rank] = torch.load(io.BytesIO(value), weights_only=False)
    return [done[rank] for rank in range(len(processes))]


def _kill(processes: list[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


def _load(module_name: str, path: str, name: str) -> Callable[..., Any]:
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(sys.modules[module_name], name)


def _rank_main(
    rank: int,
    world_size: int,
    backend: str,
    store_path: str,
    timeout: float,
    results: Any,
    address: tuple[str, str, str],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        fn = _load(*address)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        store = dist.FileStore(store_path, world_size)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        value = fn(rank, world_size, *args)
        dist.barrier()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise SystemExit(0) from None
    # As bytes: a tensor would travel as a file descriptor that dies with this process.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    results.put((rank, True, buffer.getvalue()))
    results.close()
    results.join_thread()
    dist.destroy_process_group()
