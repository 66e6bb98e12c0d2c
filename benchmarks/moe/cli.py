"""The command line: choose cases, and start a process per rank where a suite needs several.

Imports neither torch nor the package, so that `--list` answers at once and the process that only
starts the ranks stays small.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from moe_bench.shapes import BASELINES, DISTRIBUTED, OPTIONAL, SUITES, select


def run(argv: list[str], description: str) -> int:
    """Parse the command line `argv` (with the program's name) and do what it says."""
    args = parse(argv[1:], description)
    cases = select(args.suite, args.only, tiny=args.tiny)
    if args.list:
        print("\n".join(f"{case.name} ({', '.join(case.modes)})" for case in cases))
        return 0
    if not cases:
        print(f"no case of {args.suite} matches {args.only}; --list names them", file=sys.stderr)
        return 2
    distributed = {case.suite in DISTRIBUTED for case in cases}
    if len(distributed) > 1:
        print(f"run {' and '.join(DISTRIBUTED)} apart from the other suites", file=sys.stderr)
        return 2
    if distributed == {True} and "RANK" not in os.environ:
        return launch(argv, num_ranks(args))
    from moe_bench.runner import work

    return work(args, cases, argv, distributed == {True})


def parse(argv: list[str], description: str) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [name for name in BASELINES if name not in OPTIONAL]
    add = parser.add_argument
    add("--suite", nargs="+", choices=SUITES, default=["local"])
    add("--only", nargs="+", default=[], metavar="PART", help="cases whose name has this part")
    modes = ("forward", "train")
    add("--modes", nargs="+", choices=modes, default=["forward"], help="train: with backward")
    add("--baselines", nargs="+", choices=BASELINES, default=default, metavar="NAME")
    add("--repeats", type=int, default=21, help="timed runs of each row (default 21)")
    add("--time-limit", type=float, help="start no case after this many seconds")
    add("--out", type=Path, help="write all rows here as JSON; written anew after every case")
    add("--commit", help="the commit measured, where there is no git to ask")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="tiny sizes, to try the script")
    add("--ranks", type=int, help="processes of ep suites (default: one per GPU; 2 on cpu)")
    add("--no-graphs", action="store_true", help="time no CUDA graphs")
    add("--list", action="store_true", help="print the names of the cases and stop")
    return parser.parse_args(argv)


def num_ranks(args: argparse.Namespace) -> int:
    """Return how many processes an ep suite gets."""
    if args.ranks:
        return int(args.ranks)
    if args.device == "cpu":
        return 2
    import torch

    return torch.cuda.device_count()


def launch(argv: list[str], world_size: int) -> int:
    """Run this command once per rank, as torchrun would, and return the worst exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *argv],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]
    # a rank that dies would leave its peers in a collective until its timeout
    codes: list[int | None] = [None] * world_size
    try:
        while None in codes and not any(codes):
            time.sleep(0.2)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return max(abs(process.returncode) for process in processes)
