"""Reading a mounted disk from end to end, against `vhdimount` on the same disk, both mounted anew each time."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Final

from bench.figures import BenchFault, Row
from bench.runner import Scale
from bench.vhd.scratch import MEMORY, run_program, scratch_folder

from mullion.base.units import MIB
from mullion.vhd import create_dynamic, open_chain

SIZE_BYTES: Final = 256 * MIB
BAR: Final = 1 / 3
_READ_BYTES: Final = MIB


def run(scale: Scale) -> list[Row]:
    size_bytes = SIZE_BYTES // 4 if scale.quick else SIZE_BYTES
    with scratch_folder(MEMORY) as folder:
        disk, mountpoint = f"{folder}/disk.vhd", f"{folder}/mnt"
        content = os.urandom(MIB)
        create_dynamic(disk, size_bytes, durable=False)
        with open_chain(disk) as chain:
            for offset in range(0, size_bytes, MIB):
                chain.pwrite(offset, content)
        os.mkdir(mountpoint)
        ours: list[float] = []
        peer: list[float] = []
        for number in range(6):
            for mounted, name, figures in ((mount_ours, "disk.raw", ours), (mount_peer, "vhdi1", peer)):
                with mounted(disk, mountpoint):
                    took_s = time_reading(f"{mountpoint}/{name}", size_bytes, content)
                if number:  # the first warms up
                    figures.append(took_s / size_bytes * 1e9)
    return [Row("FUSE sequential read", "ns a byte", ours, BAR, peer=peer, peer_name="vhdimount")]


def time_reading(path: str, size_bytes: int, content: bytes) -> float:
    """Seconds of reading a file in requests of 1 MiB, as dd does; what was read is checked."""
    buffer = bytearray(_READ_BYTES)
    with open(path, "rb", buffering=0) as file:
        wrong = 0
        begun_s = time.perf_counter()
        for _ in range(size_bytes // _READ_BYTES):
            wrong += file.readinto(buffer) != _READ_BYTES or buffer != content
        took_s = time.perf_counter() - begun_s
    if wrong:
        raise BenchFault(f"{path}: {wrong} of its pieces were wrong")
    return took_s


@contextlib.contextmanager
def mount_ours(disk: str, mountpoint: str) -> Iterator[None]:
    command = (sys.executable, "-m", "mullion.cli", "vhd")
    run_program(*command, "mount", disk, mountpoint)
    try:
        yield
    finally:
        run_program(*command, "unmount", mountpoint)


@contextlib.contextmanager
def mount_peer(disk: str, mountpoint: str) -> Iterator[None]:
    run_program("vhdimount", disk, mountpoint)
    try:
        yield
    finally:
        run_program("umount", mountpoint)
