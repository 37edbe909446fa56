"""A checkpoint with memory: for how long the guest stands still, by how its memory is written.

A guest that idles in its firmware, its disk over NBD; two thirds of its memory hold bytes that do not compress, put
there from outside. The peer is the same checkpoint, written while the guest stands still: the host says which it is
(`vm.unprivileged_userfaultfd`, set back at the end).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Final

from bench.figures import BenchFault, Measure, Row
from bench.runner import Scale
from bench.scene import DISK_ID, service_at_home

from mullion.base.process import read_identity
from mullion.base.units import MIB
from mullion.client import Client
from mullion.model.definition import DiskAttachment, PartitionDefinition, Transport

_SYSCTL: Final = Path("/proc/sys/vm/unprivileged_userfaultfd")
_SIZES: Final = (256 * MIB, 1024 * MIB)
_LOW_BYTES: Final = 16 * MIB
"""Where the firmware is: left alone."""


def run(scale: Scale) -> list[Row]:
    rounds = 5 if scale.quick else 9
    rows = []
    for size_bytes in _SIZES:
        live, still = _pauses(size_bytes, rounds)
        rows.append(
            Row(
                f"the guest's pause for a checkpoint with memory, {size_bytes // MIB} MiB",
                "ms",
                live,
                None,
                Measure.RATIO,
                still,
                "standing still",
            )
        )
    return rows


def _pauses(size_bytes: int, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds, live and standing still."""
    live: list[float] = []
    still: list[float] = []
    with service_at_home() as service, _sysctl_kept():
        service.start()
        with service.client() as client:
            client.create_disk(path="p", size_bytes=64 * MIB)
            disk = DiskAttachment(path="p", id=DISK_ID, transport=Transport.NBD)
            client.create_partition(PartitionDefinition(name="p", memory_bytes=size_bytes, disks=(disk,)))
            client.wait(client.partition_action("p", "start"))
            identity = read_identity(service.paths.partition("p").qemu_identity)
            if identity is None:
                raise BenchFault("no QEMU was started")
            _fill_memory(identity.pid, size_bytes)
            for _ in range(rounds):
                for found, is_live in ((live, True), (still, False)):
                    found.append(_pause(client, is_live=is_live))
            client.wait(client.partition_action("p", "stop", force=True))
    return live, still


def _pause(client: Client, *, is_live: bool) -> float:
    _SYSCTL.write_text("1" if is_live else "0")
    made = client.wait(client.create_checkpoint("p", "once", memory=True).id).result or {}
    client.wait(client.delete_checkpoint("p", "once").id)
    if made.get("is_live") is not is_live:
        raise BenchFault(f"the guest stood still: {made.get('stood_still_because')}")
    pause_ms = made["pause_ms"]
    assert isinstance(pause_ms, float)
    return pause_ms


def _fill_memory(pid: int, size_bytes: int) -> None:
    """Write into the guest's memory file, which QEMU has open."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if "memfd:memory-backend-memfd" in os.readlink(link) and link.stat().st_size == size_bytes:
            fd = os.open(link, os.O_RDWR)
            content = Random(1).randbytes(MIB)
            for offset in range(_LOW_BYTES, size_bytes * 2 // 3, MIB):
                os.pwrite(fd, content, offset)
            os.close(fd)
            return
    raise BenchFault("QEMU has no memory file")


@contextlib.contextmanager
def _sysctl_kept() -> Iterator[None]:
    before = _SYSCTL.read_text()
    try:
        yield
    finally:
        _SYSCTL.write_text(before)
