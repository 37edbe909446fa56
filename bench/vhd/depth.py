"""What depth costs: 4K random reads and first touch through a chain of 8, opening a chain of 256."""

from __future__ import annotations

import gc
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

from bench.figures import Measure, Row
from bench.runner import Scale
from bench.vhd.scratch import MEMORY, scratch_folder

from mullion.base.units import GIB, MIB, SECTOR_BYTES
from mullion.vhd import create_differencing, create_dynamic, open_chain

SIZE_BYTES: Final = 128 * MIB
LONG_SIZE_BYTES: Final = 127 * GIB
PAGE_BYTES: Final = 4096
READS: Final = 20_000
DEPTH: Final = 8
LONG_DEPTH: Final = 256
LONG_CHANGES: Final = 16
DEPTH_BAR: Final = 1.3
TOUCH_BAR_US: Final = 100.0
OPEN_BAR_MS: Final = 100.0
MEMORY_BAR_MIB: Final = 40.0

_MEASURE_MEMORY: Final = """
import sys
from mullion.vhd import open_chain

def resident_kib():
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))

with open_chain(sys.argv[1], read_only=True):
    before = resident_kib()
with open_chain(sys.argv[2], read_only=True):
    print(resident_kib() - before)
"""


def run(scale: Scale) -> list[Row]:
    rounds = range(7 if scale.quick else 15)
    with scratch_folder(MEMORY) as folder:
        rows = _reads(folder, rounds)
        rows += _opening(folder, rounds)
    return rows


def _reads(folder: str, rounds: range) -> list[Row]:
    one = read_times(mixed_chain(folder, "one", 1, PAGE_BYTES, SIZE_BYTES))
    deep_path = mixed_chain(folder, "deep", DEPTH, PAGE_BYTES, SIZE_BYTES)
    deep = read_times(deep_path)
    flat_us, deep_us = zip(*[(one(), deep()) for _ in rounds], strict=True)
    sectors_path = mixed_chain(folder, "sectors", DEPTH, SECTOR_BYTES, 32 * MIB)
    touch = f"first touch of a fully mixed block of 2 MiB, chain of {DEPTH}"
    return [
        Row(f"4K random read, chain of {DEPTH}", "us", deep_us, DEPTH_BAR, peer=flat_us, peer_name="chain of 1"),
        Row(f"{touch}, 4 KiB a file", "us", [first_touch(deep_path) for _ in rounds], TOUCH_BAR_US, Measure.MEDIAN),
        Row(f"{touch}, 512 B a file", "us", [first_touch(sectors_path) for _ in rounds], TOUCH_BAR_US, Measure.MEDIAN),
    ]


def _opening(folder: str, rounds: range) -> list[Row]:
    first, last = long_chain(folder)
    more_ms = []
    for _ in rounds:
        one_s, long_s = open_time(first), open_time(last)
        more_ms.append((long_s - one_s) * 1e3)
    argv = [sys.executable, "-c", _MEASURE_MEMORY, first, last]
    printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    what = f"a chain of {LONG_DEPTH} disks of {LONG_SIZE_BYTES // GIB} GiB"
    return [
        Row(f"opening {what}, more than opening 1", "ms", more_ms, OPEN_BAR_MS, Measure.MEDIAN),
        Row(f"memory of {what}", "MiB", [int(printed) / 1024], MEMORY_BAR_MIB, Measure.WORST),
    ]


def mixed_chain(folder: str, name: str, depth: int, unit_bytes: int, size_bytes: int) -> str:
    """A chain in whose every block the sectors come from all files, `unit_bytes` at a time."""
    choose = random.Random(depth)
    path = f"{folder}/{name}0.vhd"
    create_dynamic(path, size_bytes, durable=False)
    with open_chain(path) as chain:
        for offset in range(0, size_bytes, MIB):
            chain.pwrite(offset, choose.randbytes(MIB))
    for number in range(1, depth):
        child = f"{folder}/{name}{number}.vhd"
        create_differencing(child, path, durable=False)
        path = child
        with open_chain(path) as chain:
            for offset in range(0, size_bytes, unit_bytes):
                if choose.randrange(depth) == 0:
                    chain.pwrite(offset, choose.randbytes(unit_bytes))
    return path


def long_chain(folder: str) -> tuple[str, str]:
    """The first and the last file of a long chain; each child has changes in several places."""
    choose = random.Random(1)
    first = path = f"{folder}/long0.vhd"
    create_dynamic(path, LONG_SIZE_BYTES, durable=False)
    for number in range(1, LONG_DEPTH):
        child = f"{folder}/long{number}.vhd"
        create_differencing(child, path, durable=False)
        path = child
        with open_chain(path) as chain:
            for _ in range(LONG_CHANGES):
                chain.pwrite(choose.randrange(LONG_SIZE_BYTES // MIB) * MIB, bytes(PAGE_BYTES))
    return first, path


def read_times(path: str) -> Callable[[], float]:
    """A function that reads at the same random places each time and returns microseconds of CPU a read."""
    choose = random.Random(1)
    offsets = [choose.randrange(SIZE_BYTES // PAGE_BYTES) * PAGE_BYTES for _ in range(READS)]
    chain = open_chain(path, read_only=True)
    buffers = [memoryview(bytearray(PAGE_BYTES))]

    def run_once() -> float:
        begun_s = time.process_time()
        for offset in offsets:
            chain.preadv(offset, buffers)
        return (time.process_time() - begun_s) / READS * 1e6

    run_once()
    return run_once


def first_touch(path: str) -> float:
    """Microseconds of CPU for the first read from a block of a chain that was just opened: the median of its blocks."""
    found_us = []
    with open_chain(path, read_only=True) as chain:
        buffers = [memoryview(bytearray(SECTOR_BYTES))]
        for offset in range(0, chain.size_bytes, 1 << chain.block_shift):
            begun_s = time.thread_time()
            chain.preadv(offset, buffers)
            found_us.append((time.thread_time() - begun_s) * 1e6)
    return statistics.median(found_us)


def open_time(path: str) -> float:
    """Seconds of CPU for opening a chain."""
    gc.collect()
    begun_s = time.thread_time()
    chain = open_chain(path, read_only=True)
    took_s = time.thread_time() - begun_s
    chain.close()
    return took_s
