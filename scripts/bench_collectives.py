"""All-reduce between processes of this host: shared memory against gloo.

    python scripts/bench_collectives.py [--ranks 2 4] [--calls 200] [--json]
    python scripts/bench_collectives.py --switch     one turn against parts, to place the switch

Each size is timed call by call, some calls of the one and then some of the other, so that a noisy
machine slows both. Times are those of rank 0 in microseconds: median (10th to 90th percentile).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from parallel.collectives.network import TorchGroup
from parallel.collectives.segment import Segment
from parallel.collectives.shared_memory import SegmentLayout, SharedMemoryGroup

SIZES = [1 << power for power in range(10, 25)]
SWITCH_SIZES = [1 << power for power in range(13, 20)]
ROUNDS = 5
TIMEOUT_S = 60.0
Call = Callable[[torch.Tensor], Any]


def be_rank(
    rank: int, size: int, path: str, port: int, options: argparse.Namespace, pipe: Connection
) -> None:
    """One process: take part in everything; rank 0 sends each row as it is known."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    is_crowded = size > len(os.sched_getaffinity(0))
    segment = Segment.attach(path, SegmentLayout(size).num_bytes)
    memory = SharedMemoryGroup(rank, size, segment, TIMEOUT_S, Unwatched(), is_crowded=is_crowded)
    if options.switch:
        calls: dict[str, Call] = {
            "parts": lambda x: memory._reduce_in_parts(x, "sum"),
            "one turn": lambda x: memory._reduce_at_once(x, "sum"),
        }
    else:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        timeout = timedelta(seconds=TIMEOUT_S)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        calls = {"gloo": TorchGroup().all_reduce, "shared memory": memory.all_reduce}
    for num_bytes in SWITCH_SIZES if options.switch else SIZES:
        seconds = time_calls(memory, calls, num_bytes, options.calls)
        if rank == 0:
            pipe.send(row(size, num_bytes, seconds))


class Unwatched:
    """The ranks' processes are children of this script, which looks after them."""

    def is_running(self, _rank: int) -> bool:
        return True

    def is_stopped(self, _rank: int) -> bool:
        return False


def time_calls(
    group: SharedMemoryGroup, calls: dict[str, Call], num_bytes: int, num_calls: int
) -> dict[str, list[float]]:
    """Seconds of each call, by kind; the kinds take turns, and all ranks start together."""
    x = torch.zeros(num_bytes // 4)
    seconds: dict[str, list[float]] = {kind: [] for kind in calls}
    per_round = max(4, min(num_calls, num_calls * (1 << 20) // num_bytes) // ROUNDS)
    for _ in range(ROUNDS):
        for kind, call in calls.items():
            group.barrier()
            call(x)
            for _ in range(per_round):
                started_at = time.perf_counter()
                call(x)
                seconds[kind].append(time.perf_counter() - started_at)
    return seconds


def row(size: int, num_bytes: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Median and spread of each kind, and how many times faster the second is."""
    found: dict[str, Any] = {"ranks": size, "bytes": num_bytes}
    for kind, times in seconds.items():
        tenths = statistics.quantiles(times, n=10)
        figures = (statistics.median(times), tenths[0], tenths[-1])
        found[kind] = dict(
            zip(("median_us", "p10_us", "p90_us"), (1e6 * s for s in figures), strict=True)
        )
    first, second = seconds
    found["ratio"] = found[first]["median_us"] / found[second]["median_us"]
    return found


def run(size: int, options: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "parallel.collectives.shared_memory"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    segment = Segment.create(SegmentLayout(size).num_bytes)
    ours, theirs = context.Pipe()
    processes = [
        context.Process(
            target=be_rank, args=(rank, size, segment.path, store.port, options, theirs)
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for _ in SWITCH_SIZES if options.switch else SIZES:
        while not ours.poll(1):
            assert all(process.exitcode in (None, 0) for process in processes), "a rank failed"
        say(ours.recv())
    for process in processes:
        process.join()


def show(found: dict[str, Any]) -> None:
    *_, first, second, _ = found
    cells = []
    for kind in (first, second):
        figures = found[kind]
        spread = f"({figures['p10_us']:.0f} to {figures['p90_us']:.0f})"
        cells.append(f"{kind:>14} {figures['median_us']:8.0f} {spread:18}")
    label = f"{found['ranks']:5} ranks {found['bytes'] // 1024:7} KB"
    print(f"{label} {''.join(cells)} {found['ratio']:7.1f} times", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--calls", type=int, default=200, help="timed calls of a small size")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--switch", action="store_true", help="compare the two ways of summing")
    options = parser.parse_args()
    for size in options.ranks:
        run(size, options, (lambda found: print(json.dumps(found))) if options.json else show)


if __name__ == "__main__":
    main()
