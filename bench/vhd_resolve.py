"""The cost of depth: random 4K reads at depth 8 against depth 1, first touch of a mixed block, opening 256 files.

Same content, same offsets, one run; median of the rounds with the spread. Exit status 1 when a bar is missed: reads of
resolved blocks at most 1.3 times depth 1. Figures in microseconds say what this machine did, ratios are the promise.
"""

from __future__ import annotations

import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

from mullion.base.units import MIB
from mullion.vhd import create_differencing, create_dynamic, open_chain

SIZE_BYTES = 128 * MIB
UNIT_BYTES = 4096
READS = 20_000
ROUNDS = 15
BAR = 1.3


def build(folder: str, name: str, depth: int, unit_bytes: int, size_bytes: int) -> str:
    """A chain in whose every block the sectors come from all layers, `unit_bytes` at a time."""
    choose = random.Random(depth)
    path = f"{folder}/{name}0.vhd"
    create_dynamic(path, size_bytes)
    with open_chain(path) as chain:
        for offset in range(0, size_bytes, MIB):
            chain.pwrite(offset, choose.randbytes(MIB))
    for number in range(1, depth):
        child = f"{folder}/{name}{number}.vhd"
        create_differencing(child, path)
        path = child
        with open_chain(path) as chain:
            for offset in range(0, size_bytes, unit_bytes):
                if choose.randrange(depth) == 0:
                    chain.pwrite(offset, choose.randbytes(unit_bytes))
    return path


def time_reads(path: str) -> Callable[[], float]:
    """A function that reads at the same random places each time and returns microseconds of CPU a read."""
    choose = random.Random(1)
    offsets = [choose.randrange(SIZE_BYTES // 4096) * 4096 for _ in range(READS)]
    chain = open_chain(path, read_only=True)
    buffers = [memoryview(bytearray(4096))]

    def run() -> float:
        begin = time.process_time()
        for offset in offsets:
            chain.preadv(offset, buffers)
        return (time.process_time() - begin) / READS * 1e6

    run()
    return run


def first_touch(path: str, size_bytes: int) -> list[float]:
    """Microseconds for resolving each block of a chain that was just opened."""
    found = []
    with open_chain(path, read_only=True) as chain:
        granule = 1 << chain.block_shift
        buffers = [memoryview(bytearray(512))]
        for offset in range(0, size_bytes, granule):
            begin = time.perf_counter()
            chain.preadv(offset, buffers)
            found.append((time.perf_counter() - begin) * 1e6)
    return found


def spread(figures: list[float]) -> str:
    return f"{statistics.median(figures):.2f} ({min(figures):.2f} to {max(figures):.2f})"


def main() -> int:
    folder = tempfile.mkdtemp(prefix="mullion-bench-", dir="/dev/shm")
    try:
        one = time_reads(build(folder, "one", 1, UNIT_BYTES, SIZE_BYTES))
        eight_path = build(folder, "eight", 8, UNIT_BYTES, SIZE_BYTES)
        eight = time_reads(eight_path)
        pairs = [(one(), eight()) for _ in range(ROUNDS)]
        ratios = [deep / flat for flat, deep in pairs]
        print(f"4K random read, depth 1      {spread([flat for flat, _ in pairs])} us")
        print(f"4K random read, depth 8      {spread([deep for _, deep in pairs])} us")
        print(f"ratio depth 8 / depth 1      {spread(ratios)}, bar {BAR}")
        print(f"first touch, 4 KiB pieces    {spread(first_touch(eight_path, SIZE_BYTES))} us a 2 MiB block")
        small = 16 * MIB
        path = build(folder, "sector", 8, 512, small)
        print(f"first touch, 512 B pieces    {spread(first_touch(path, small))} us a 2 MiB block")
        deep_path = f"{folder}/deep0.vhd"
        create_dynamic(deep_path, SIZE_BYTES)
        for number in range(1, 256):
            create_differencing(f"{folder}/deep{number}.vhd", deep_path)
            deep_path = f"{folder}/deep{number}.vhd"
        opened = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            open_chain(deep_path, read_only=True).close()
            opened.append((time.perf_counter() - begin) * 1e3)
        print(f"open a chain of 256 files    {spread(opened)} ms")
        return int(statistics.median(ratios) > BAR)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
