"""4K random reads at depth 32 from `mullion vhd serve`, against `qemu-nbd` on the same disk, every byte checked."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.figures import BenchFault, Row
from bench.runner import Scale
from bench.vhd.scratch import MEMORY, scratch_folder

from mullion.base.units import MIB
from mullion.vhd import create_dynamic, open_chain

SIZE_BYTES: Final = 256 * MIB
BLOCKS: Final = 60_000
"""What QEMU 7.2, which rounds down to cylinders, has of it too."""
BLOCK_BYTES: Final = 4096
DEPTH: Final = 32
BAR: Final = 1 / 1.5
_START_DEADLINE_S: Final = 30.0
_LOADGEN_SOURCE: Final = Path(__file__).parents[1] / "nbd_loadgen.c"


def run(scale: Scale) -> list[Row]:
    count = 100_000 if scale.quick else 400_000
    with scratch_folder(MEMORY) as folder:
        loadgen, disk = f"{folder}/loadgen", f"{folder}/disk.vhd"
        subprocess.run(["gcc", "-O2", "-o", loadgen, str(_LOADGEN_SOURCE)], check=True)
        make_disk(disk)
        qemu = ("qemu-nbd", "--read-only", "--format=vpc", "--persistent", "--shared=0")
        ours_argv = (sys.executable, "-m", "mullion.cli", "vhd", "serve", disk, "--socket", f"{folder}/ours")
        with (
            server(f"{folder}/ours", *ours_argv),
            server(f"{folder}/threads", *qemu, f"--socket={folder}/threads", disk),
            server(f"{folder}/uring", *qemu, "--aio=io_uring", f"--socket={folder}/uring", disk),
        ):
            figures: dict[str, list[float]] = {"ours": [], "threads": [], "uring": []}
            names = list(figures)
            for number in range(scale.rounds + 1):
                names.append(names.pop(0))  # who begins changes every round
                for name in names:
                    took_s = read_randomly(loadgen, f"{folder}/{name}", count, seed=number)
                    if number:  # the first warms up
                        figures[name].append(took_s / count * 1e6)
    what = "NBD 4K random read, depth 32"
    return [
        Row(what, "us a request", figures["ours"], BAR, peer=figures["uring"], peer_name="qemu-nbd --aio=io_uring"),
        Row(what, "us a request", figures["ours"], BAR, peer=figures["threads"], peer_name="qemu-nbd --aio=threads"),
    ]


def make_disk(path: str) -> None:
    """A dynamic disk that is full of what the load generator expects."""
    create_dynamic(path, SIZE_BYTES)
    with open_chain(path) as chain:
        at_once = 256
        for first in range(0, SIZE_BYTES // BLOCK_BYTES, at_once):
            chain.pwrite(first * BLOCK_BYTES, b"".join(map(pattern, range(first, first + at_once))))


def pattern(block: int) -> bytes:
    """What the load generator expects in a block."""
    first = block * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    words = ((first ^ (number << 48) ^ block) & 0xFFFFFFFFFFFFFFFF for number in range(BLOCK_BYTES // 8))
    return b"".join(word.to_bytes(8, "little") for word in words)


def read_randomly(loadgen: str, socket_path: str, count: int, *, seed: int) -> float:
    """Seconds of `count` reads; the load generator has seen that each was right."""
    argv = [loadgen, socket_path, str(BLOCKS), str(count), str(DEPTH), str(seed)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchFault(f"reading from {socket_path} failed: {done.stderr}")
    return float(done.stdout)


@contextlib.contextmanager
def server(socket_path: str, *argv: str) -> Iterator[None]:
    """A server process that listens on the socket while the block runs."""
    # A session each: the scheduler gives shares to sessions (autogroup).
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        until_s = time.monotonic() + _START_DEADLINE_S
        while not os.path.exists(socket_path):
            if process.poll() is not None or time.monotonic() > until_s:
                process.kill()
                raise BenchFault(f"{argv[0]} does not serve: {process.communicate()[1].decode(errors='replace')}")
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.communicate()
