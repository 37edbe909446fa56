"""Where the benchmarks of `mullion vhd` work, and what they have in common: folders, timing, running in turns."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from bench.figures import BenchFault

MEMORY: Final = "/dev/shm"
"""A file system without a disk below it: what remains is the work of the programs."""


def disk_folder() -> str:
    """A folder on a real disk: MULLION_BENCH_DIR, or /var/tmp."""
    return os.environ.get("MULLION_BENCH_DIR", "/var/tmp")


@contextlib.contextmanager
def scratch_folder(parent: str) -> Iterator[str]:
    """A new folder below `parent`, gone at the end with all that is in it."""
    folder = tempfile.mkdtemp(prefix="mullion-bench-", dir=parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def run_program(*argv: str, stdout: int = subprocess.DEVNULL) -> None:
    """Run a program to its end; it must succeed."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise BenchFault(f"{shlex.join(argv)} failed: {done.stderr.decode(errors='replace').strip()}")


def sync_file(path: str) -> None:
    """Make a file's content durable, whoever wrote it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def time_of(work: Callable[[], object]) -> float:
    """Seconds of the clock that the work takes."""
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s


def in_turns(
    ours: Callable[[], object], peer: Callable[[], object], rounds: int, *, before: Callable[[], object]
) -> tuple[list[float], list[float]]:
    """Seconds of both, a figure a round, after one round that only warms up; `before` each, not timed.

    Who begins changes every round, so that neither always follows the other.
    """
    figures: dict[Callable[[], object], list[float]] = {ours: [], peer: []}
    for number in range(rounds + 1):
        pair: Sequence[Callable[[], object]] = (ours, peer) if number % 2 else (peer, ours)
        for side in pair:
            before()
            took_s = time_of(side)
            if number:
                figures[side].append(took_s)
    return figures[ours], figures[peer]
