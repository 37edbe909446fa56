"""Copying disks: raw to dynamic, dynamic to fixed, dynamic into a pipe, against qemu-img and nbdcopy.

Two disks: 4 GiB with 250 MB of data in 480 places, and 2 GiB full of data. Both sides end with an fsync of the new file
(qemu-img syncs nothing by itself), in turns; the sources are in the page cache. Ours is the function behind the
command, in this process; a row without a bar has the whole command, the start of Python included. On a disk the device
sets the pace of both: the row "the disk's floor" is what it takes for nothing but writing as many bytes, out of memory,
around the page cache, into room that is reserved. The same in memory shows the work alone.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.figures import BenchFault, Row
from bench.runner import Scale
from bench.vhd.scratch import MEMORY, disk_folder, in_turns, run_program, scratch_folder, sync_file

from mullion.base.units import GIB, KIB, MIB
from mullion.vhd import open_chain
from mullion.vhd.copying import TargetKind, copy_disk
from mullion.vhd.rawfile import RawFile
from mullion.vhd.streaming import stream_disk

MULLION: Final = str(Path(sys.executable).parent / "mullion")
TO_DYNAMIC_BAR: Final = 1 / 3
TO_FIXED_BAR: Final = 1 / 2
TO_PIPE_BAR: Final = 1.0
_PIECE_BYTES: Final = 512 * KIB
_PIECES: Final = 480
_FLOOR_BYTES: Final = MIB
_FLOOR_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """A disk to copy: raw, and the dynamic VHD of the same content."""

    name: str
    raw: str
    vhd: str


def run(scale: Scale) -> list[Row]:
    rows = []
    with scratch_folder(disk_folder()) as folder:
        for sample in make_samples(folder, scale):
            rows += [*_to_dynamic(sample, folder, scale), _floor(sample, folder, scale)]
            rows += [*_to_fixed(sample, folder, scale), *_to_pipe(sample, scale)]
    with scratch_folder(MEMORY) as folder:
        for sample in make_samples(folder, scale):
            rows += [*_to_dynamic(sample, folder, scale, in_memory=True)]
            rows += [*_to_fixed(sample, folder, scale, in_memory=True)]
    return rows


def make_samples(folder: str, scale: Scale) -> Iterator[Sample]:
    """The sparse and the dense disk, one after the other, in the page cache and on the disk."""
    choose = random.Random(3)
    sparse_bytes, dense_bytes, pieces = (GIB, GIB // 2, _PIECES // 4) if scale.quick else (4 * GIB, 2 * GIB, _PIECES)
    for name, size_bytes in (
        (f"{sparse_bytes // GIB} GiB with {pieces * _PIECE_BYTES // 1_000_000} MB of data", sparse_bytes),
        (f"{dense_bytes // MIB} MiB of data", dense_bytes),
    ):
        sample = Sample(name, f"{folder}/sample.raw", f"{folder}/sample.vhd")
        with open(sample.raw, "wb") as file:
            file.truncate(size_bytes)
            if size_bytes == sparse_bytes:
                for place in choose.sample(range(size_bytes // _PIECE_BYTES), pieces):
                    file.seek(place * _PIECE_BYTES)
                    file.write(choose.randbytes(_PIECE_BYTES))
            else:
                for _ in range(size_bytes // MIB):
                    file.write(choose.randbytes(MIB))
        sync_file(sample.raw)
        with RawFile(sample.raw) as source:
            copy_disk(source, sample.vhd, TargetKind.DYNAMIC)
        run_program("cat", sample.vhd)
        yield sample
        os.unlink(sample.raw)
        os.unlink(sample.vhd)


def _to_dynamic(sample: Sample, folder: str, scale: Scale, *, in_memory: bool = False) -> list[Row]:
    target = f"{folder}/target"

    def ours() -> None:
        with RawFile(sample.raw) as source:
            copy_disk(source, target, TargetKind.DYNAMIC)

    def peer() -> None:
        _qemu_to_dynamic(sample, target)

    what = f"raw to dynamic, {sample.name}"
    rows = [_row(what, ours, peer, target, scale, None if in_memory else TO_DYNAMIC_BAR, in_memory=in_memory)]
    if not in_memory:
        command = ("vhd", "convert", sample.raw, f"{target}.vhd")
        rows.append(_row(f"{what}, the command", lambda: run_program(MULLION, *command), peer, target, scale, None))
    return rows


def _qemu_to_dynamic(sample: Sample, target: str) -> None:
    options = "subformat=dynamic,force_size=on"
    run_program("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", options, sample.raw, target)
    sync_file(target)


def _floor(sample: Sample, folder: str, scale: Scale) -> Row:
    """As many bytes as the sample's data, with nothing to read and nothing to look for."""
    target = f"{folder}/target"
    length = os.stat(sample.raw).st_blocks * 512 // _FLOOR_BYTES * _FLOOR_BYTES
    piece = mmap.mmap(-1, _FLOOR_BYTES)
    piece[:] = random.Random(4).randbytes(_FLOOR_BYTES)

    def floor() -> None:
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, length)
            with ThreadPoolExecutor(_FLOOR_THREADS) as pool:
                written = pool.map(lambda at: os.pwrite(fd, piece, at), range(0, length, _FLOOR_BYTES))
                if sum(written) != length:
                    raise BenchFault("the disk took only a part of a write")
            os.fsync(fd)
        finally:
            os.close(fd)

    what = f"the disk's floor for {sample.name}"
    return _row(what, floor, lambda: _qemu_to_dynamic(sample, target), target, scale, None)


def _to_fixed(sample: Sample, folder: str, scale: Scale, *, in_memory: bool = False) -> list[Row]:
    target = f"{folder}/target"

    def ours() -> None:
        with open_chain(sample.vhd, read_only=True) as source:
            copy_disk(source, target, TargetKind.FIXED)

    def peer() -> None:
        options = "subformat=fixed,force_size=on"
        run_program("qemu-img", "convert", "-f", "vpc", "-O", "vpc", "-o", options, sample.vhd, target)
        sync_file(target)

    bar = None if in_memory else TO_FIXED_BAR
    return [_row(f"dynamic to fixed, {sample.name}", ours, peer, target, scale, bar, in_memory=in_memory)]


def _row(
    what: str,
    ours: Callable[[], None],
    peer: Callable[[], None],
    target: str,
    scale: Scale,
    bar: float | None,
    *,
    in_memory: bool = False,
) -> Row:
    def clean() -> None:
        for path in (target, f"{target}.vhd"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    mine, theirs = in_turns(ours, peer, scale.burst_rounds, before=clean)
    clean()
    where = ", in memory" if in_memory else ""
    return Row(f"{what}{where}", "s", mine, bar, peer=theirs, peer_name="qemu-img convert")


def _to_pipe(sample: Sample, scale: Scale) -> list[Row]:
    """Into a pipe that `cat` empties."""

    def ours() -> None:
        with _emptied_pipe() as fd, open_chain(sample.vhd, read_only=True) as source:
            stream_disk(source, fd, TargetKind.RAW)

    def peer() -> None:
        server = ("qemu-nbd", "--read-only", "--format=vpc", sample.vhd)
        with _emptied_pipe() as fd:
            run_program("nbdcopy", "--", "[", *server, "]", "-", stdout=fd)

    mine, theirs = in_turns(ours, peer, scale.burst_rounds, before=lambda: None)
    what = f"dynamic to raw into a pipe, {sample.name}"
    return [Row(what, "s", mine, TO_PIPE_BAR, peer=theirs, peer_name="nbdcopy of qemu-nbd")]


@contextlib.contextmanager
def _emptied_pipe() -> Iterator[int]:
    """The end to write into; the block ends when all of it was read."""
    reader = ("sh", "-c", f"exec cat > {shlex.quote(os.devnull)}")
    with subprocess.Popen(reader, stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        try:
            yield child.stdin.fileno()
        finally:
            child.stdin.close()
            if child.wait():
                raise BenchFault("cat failed")
