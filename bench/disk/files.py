"""Files out of a partition that runs: how long the first listing takes, and a file of 100 MB, by the command line.

A guest writes without a pause (`iocheck`, on a disk of its own) while two more disks of it are read: an ext4 and an
NTFS of 4 GB, each with 2,000 small files and one of 100 MB. No peer does it: the bars are seconds. Each call is a
command of its own: its start counts, and with the partition as it is now also the instant that is frozen for it.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.figures import BenchFault, Measure, Row
from bench.runner import Scale
from bench.scene import MULLION, iocheck_image, service_at_home
from bench.vhd.scratch import run_program
from tests.framework.guest_console import logged_in
from tests.framework.service import Service

from mullion.base.process import find_program
from mullion.base.units import GIB, MIB
from mullion.model.definition import DiskAttachment, PartitionDefinition

DISK_BYTES: Final = 4 * GIB
FILE_BYTES: Final = 100 * 1000 * 1000
SMALL_FILES: Final = 2000
LISTING_BAR_S: Final = 1.0
FILE_BAR_S: Final = 2.0
_NAME: Final = "bench"
_SYSTEMS: Final = (("ext4", "disk1"), ("NTFS", "disk2"))


def run(scale: Scale) -> list[Row]:
    rounds = 3 if scale.quick else 7
    rows = []
    with _running_partition() as service:
        service.cli("checkpoint", "create", _NAME, "point")
        for what, place in (("a checkpoint", f"{_NAME}@point"), ("now", _NAME)):
            for system, disk in _SYSTEMS:
                listing, copy = _measure(service, place, disk, rounds)
                where = f"{system} of 4 GB, {what}"
                rows.append(Row(f"first listing, {where}", "s", listing, LISTING_BAR_S, Measure.MEDIAN))
                rows.append(Row(f"file of 100 MB, {where}", "s", copy, FILE_BAR_S, Measure.MEDIAN))
    return rows


def _measure(service: Service, place: str, disk: str, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a listing and of a copy, each round."""
    target, source = f"{service.home}/copy", f"{service.home}/tree/big.bin"
    listing, copy = [], []
    for _ in range(rounds):
        listing.append(_timed(service, "ls", f"{place}:/folder", "--disk", disk, lines=SMALL_FILES))
        copy.append(_timed(service, "get", f"{place}:/big.bin", target, "--disk", disk))
        if not filecmp.cmp(target, source, shallow=False):
            raise BenchFault(f"{place}: what came out of {disk} is not what was written")
        os.unlink(target)
    return listing, copy


def _timed(service: Service, *words: str, lines: int | None = None) -> float:
    begun_s = time.perf_counter()
    done = subprocess.run(
        [MULLION, "files", *words], env=service.environment, capture_output=True, check=False, timeout=120
    )
    took_s = time.perf_counter() - begun_s
    if done.returncode or (lines is not None and len(done.stdout.splitlines()) != lines):
        raise BenchFault(f"mullion files {' '.join(words)}: {done.stderr.decode()}")
    return took_s


@contextlib.contextmanager
def _running_partition() -> Iterator[Service]:
    """A partition that writes, with the two disks that are read, and a disk of its own for what it writes."""
    image = iocheck_image()
    with service_at_home(images=True) as service:
        service.start()
        _make_tree(Path(service.home, "tree"))
        for system, disk in _SYSTEMS:
            _make_disk(service, system, f"{service.paths.disks}/{disk}.vhd")
        with service.client() as client:
            client.create_disk(path=_NAME, parent=image.path)
            client.create_disk(path="scratch", size_bytes=64 * MIB)
            paths = (_NAME, "disk1", "disk2", "scratch")
            disks = tuple(DiskAttachment(path=path) for path in paths)
            client.create_partition(PartitionDefinition(name=_NAME, memory_bytes=256 * MIB, disks=disks))
            client.wait(client.partition_action(_NAME, "start"))
        service.wait_agent(_NAME)
        with logged_in(service, _NAME) as console:
            console.type("iocheck --device /dev/vdd --seconds 3600 --depth 4 --range 33554432 --progress\n")
            console.wait_for("alive")
            yield service


def _make_tree(tree: Path) -> None:
    """What both disks hold."""
    chance = random.Random(1)
    (tree / "folder").mkdir(parents=True)
    (tree / "big.bin").write_bytes(chance.randbytes(FILE_BYTES))
    for number in range(SMALL_FILES):
        (tree / f"folder/file{number:04}").write_bytes(chance.randbytes(500 + number))


def _make_disk(service: Service, system: str, target: str) -> None:
    """A dynamic VHD with that filesystem and the tree in it."""
    tree, image = f"{service.home}/tree", f"{service.home}/image"
    with open(image, "wb") as file:
        file.truncate(DISK_BYTES)
    if system == "ext4":
        run_program("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, image)
    else:
        run_program(find_program("mkntfs"), "-q", "-F", "-f", image)
        _fill_ntfs(tree, image)
    service.cli("vhd", "convert", image, target, "--from", "raw")
    os.unlink(image)


def _fill_ntfs(tree: str, image: str) -> None:
    """Mounted for a moment by ntfs-3g, whose ntfscp makes no folders."""
    folder = f"{tree}-ntfs"
    os.mkdir(folder)
    run_program("ntfs-3g", "-o", "big_writes", image, folder)
    try:
        run_program("cp", "-r", f"{tree}/.", folder)
    finally:
        run_program("umount", folder)
    os.rmdir(folder)
