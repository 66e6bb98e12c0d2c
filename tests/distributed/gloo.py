"""Run functions in N processes of this machine that form a group, with a deadline.

Imports take a process four to nine seconds. Processes that live long import for themselves, so that
their strings hash differently, and an order that a set gave would differ between ranks. Those of
one function are forked from a process that has imported already, unless they are given a GPU.
"""

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

import garbage
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What ranks import. Nothing here starts a thread, which a fork would leave behind.
PRELOADED = ("torch._inductor.compile_fx", "comet_compile.backend", "comet_compile.kernels.ops")


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
    forks = backend == "gloo"
    with RankPool(world_size, timeout=timeout, backend=backend, forks=forks) as pool:
        return pool.run(fn, *args)


class RankPool:
    """Processes that run one function after another, each as `run_ranks` does.

    They start with the first function, which takes seconds. After one that failed or took too long
    others take their place: no function meets what another left half done.
    """

    def __init__(
        self,
        world_size: int,
        *,
        timeout: float = 120.0,
        backend: str = "gloo",
        forks: bool = False,
    ) -> None:
        self.world_size, self.timeout, self.backend = world_size, timeout, backend
        # what the server imports may look for GPUs, and a fork of it could not use them any more
        forks = forks and not torch.cuda.is_available()
        self._context: Any = mp.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload(list(PRELOADED))
        self._processes: list[Any] = []
        self._commands: list[Any] = []
        self._results: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Return [fn(rank, world_size, *args) for every rank]."""
        if not self._processes:
            self._start()
        # By file: the name that pytest's importlib mode gives a test module cannot be imported.
        address = (fn.__module__, fn.__code__.co_filename, fn.__qualname__)
        try:
            for commands in self._commands:
                commands.send((address, args))
            name = getattr(fn, "__name__", str(fn))
            return _collect(self._processes, self._results, self.timeout, name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes; the next function starts new ones."""
        for commands in self._commands:
            commands.close()
        for process in self._processes:
            process.join(timeout=5.0)
            if process.is_alive():
                process.kill()
                process.join()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._commands, self._folder = [], [], None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store_path = os.path.join(self._folder.name, "store")
        self._results = self._context.Queue()
        for rank in range(self.world_size):
            # a pipe, which ends with the process that writes: a queue would be waited for forever
            theirs, ours = self._context.Pipe(duplex=False)
            group = (rank, self.world_size, self.backend, store_path, self.timeout)
            process = self._context.Process(
                target=_rank_main,
                args=(*group, dict(os.environ), theirs, self._results),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._commands.append(ours)


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
    environment: dict[str, str],
    commands: Any,
    results: Any,
) -> None:
    os.environ.clear()  # a process that was forked has that of its parent's start
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
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
        while (command := _next(commands)) is not None:
            address, args = command
            fn = _load(*address)
            garbage.freeze_what_stays()
            value = fn(rank, world_size, *args)
            dist.barrier()
            # As bytes: a tensor would travel as a file descriptor that dies with this process.
            buffer = io.BytesIO()
            torch.save(value, buffer)
            results.put((rank, True, buffer.getvalue()))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise SystemExit(0) from None
    results.close()
    results.join_thread()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # it would take Python a second to put away all modules


def _next(commands: Any) -> Any:
    try:
        return commands.recv()
    except EOFError:
        return None
