"""Backups of a disk of 4 GiB, full and after 50 MB of changes, against restic and borg on the raw image.

The disk has 1 GiB of data in pieces of 512 KiB, half of it noise and half text; the changes are 50 MB in 200 places.
All repositories are on the same disk, encrypted, compressed with zstd, and new each round; making them is not measured.
The sources are in the page cache. Ours is what `mullion backup create` does with a frozen chain: opening the
repository, asking the differencing child what has changed, and all up to the durable manifest. The peers are whole
commands with their defaults; they read the image from end to end, which is what they can do. Every round's last backup
is restored and compared.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from bench.figures import BenchFault, Row
from bench.runner import Scale
from bench.vhd.scratch import disk_folder, scratch_folder, sync_file, time_of

from mullion.base.units import GIB, KIB, MIB
from mullion.repository import Manifest, Repository, begin_backup
from mullion.repository.local import FolderBackend
from mullion.vhd import create_differencing, create_dynamic, open_chain
from mullion.vhd.diff import changed

FULL_BAR: Final = 1 / 3
INCREMENTAL_BAR: Final = 1 / 10
_PIECE_BYTES: Final = 512 * KIB
_CHANGE_BYTES: Final = 250_000
_CHANGES: Final = 200
_SECRET: Final = "bench"
_WORDS: Final = [b"partition ", b"provider ", b"checkpoint ", b"disk ", b"block ", b"2026-11-26 ", b"error ", b"\n"]


@dataclass
class Times:
    """Seconds of one program, a figure a round."""

    full: list[float] = field(default_factory=list)
    incremental: list[float] = field(default_factory=list)


def run(scale: Scale) -> list[Row]:
    size_bytes = GIB if scale.quick else 4 * GIB
    times = {name: Times() for name in ("ours", "restic", "borg")}
    with scratch_folder(disk_folder()) as folder:
        for number in range(scale.burst_rounds):
            _round(f"{folder}/{number}", number, size_bytes, times)
            shutil.rmtree(f"{folder}/{number}")
    disk = f"{size_bytes // GIB} GiB disk with {size_bytes // 4 // MIB} MiB of data"
    rows = []
    for peer in ("restic", "borg"):
        rows.append(
            Row(f"full backup, {disk}", "s", times["ours"].full, FULL_BAR, peer=times[peer].full, peer_name=peer)
        )
        rows.append(
            Row(
                f"backup of {_CHANGES * _CHANGE_BYTES // 1_000_000} MB of changes, {disk}",
                "s",
                times["ours"].incremental,
                INCREMENTAL_BAR,
                peer=times[peer].incremental,
                peer_name=peer,
            )
        )
    return rows


def _round(folder: str, seed: int, size_bytes: int, times: dict[str, Times]) -> None:
    os.mkdir(folder)
    scene = _Scene(folder, seed, size_bytes)
    programs: list[_Program] = [_Ours(scene), _Restic(scene), _Borg(scene)]
    turn = seed % len(programs)
    programs = programs[turn:] + programs[:turn]
    for program in programs:
        program.prepare()
    for program in programs:
        times[program.name].full.append(time_of(program.back_up))
    scene.change()
    for program in programs:
        times[program.name].incremental.append(time_of(program.back_up))
    expected = _digest_of(lambda offset, length: _pread(scene.raw, offset, length), size_bytes)
    for program in programs:
        if program.digest() != expected:
            raise BenchFault(f"{program.name} gave back something else than was stored")


class _Scene:
    """The disk, as a raw image and as a VHD of the same content."""

    def __init__(self, folder: str, seed: int, size_bytes: int) -> None:
        self.folder = folder
        self.size_bytes = size_bytes
        self.raw, self.base, self.child = f"{folder}/disk.raw", f"{folder}/base.vhd", f"{folder}/child.vhd"
        self.top = self.base
        self._choose = random.Random(seed)
        create_dynamic(self.base, size_bytes)
        with open(self.raw, "wb") as file, open_chain(self.base) as chain:
            file.truncate(size_bytes)
            for place in self._choose.sample(range(size_bytes // _PIECE_BYTES), size_bytes // 4 // _PIECE_BYTES):
                piece = self._piece(_PIECE_BYTES)
                file.seek(place * _PIECE_BYTES)
                file.write(piece)
                chain.pwrite(place * _PIECE_BYTES, piece)
        sync_file(self.raw)

    def change(self) -> None:
        """Write 50 MB to the image and to a differencing child."""
        create_differencing(self.child, self.base)
        with open(self.raw, "r+b") as file, open_chain(self.child) as chain:
            for place in self._choose.sample(range(self.size_bytes // _PIECE_BYTES), _CHANGES):
                piece = self._piece(_CHANGE_BYTES)
                file.seek(place * _PIECE_BYTES)
                file.write(piece)
                chain.pwrite(place * _PIECE_BYTES, piece)
        sync_file(self.raw)
        self.top = self.child

    def _piece(self, length: int) -> bytes:
        if self._choose.random() < 0.5:
            return self._choose.randbytes(length)
        return b"".join(self._choose.choices(_WORDS, k=length // 5)).ljust(length, b".")[:length]


class _Program:
    """Somebody who backs up."""

    name = ""

    def __init__(self, scene: _Scene) -> None:
        self.scene = scene
        self.repository = f"{scene.folder}/{self.name}"

    def prepare(self) -> None:
        raise NotImplementedError

    def back_up(self) -> None:
        raise NotImplementedError

    def digest(self) -> str:
        raise NotImplementedError


class _Ours(_Program):
    name = "ours"
    last: Manifest | None = None

    def prepare(self) -> None:
        Repository.create(FolderBackend.create(self.repository), _SECRET).close()

    def back_up(self) -> None:
        scene = self.scene
        ranges = None
        if self.last is not None:
            ranges = [(change.offset, change.length) for change in changed(scene.child, since=scene.base)]
        with (
            Repository.open(FolderBackend(self.repository), _SECRET) as repository,
            open_chain(scene.top, read_only=True) as chain,
            begin_backup(repository, "bench", base=self.last) as backup,
        ):
            backup.add_disk("disk0", chain, changed=ranges)
            self.last = backup.commit()

    def digest(self) -> str:
        assert self.last is not None
        with Repository.open(FolderBackend(self.repository), _SECRET) as repository:
            disk = repository.open_disk(self.last, "disk0")

            def read(offset: int, length: int) -> bytes:
                buffer = bytearray(length)
                disk.pread(offset, buffer)
                return bytes(buffer)

            return _digest_of(read, disk.size_bytes)


class _Restic(_Program):
    name = "restic"

    def prepare(self) -> None:
        self._run("init", "--repository-version", "2")

    def back_up(self) -> None:
        self._run("backup", self.scene.raw)

    def digest(self) -> str:
        return _digest_of_output(self._argv("dump", "latest", self.scene.raw), self._environment())

    def _run(self, *arguments: str) -> None:
        _run(self._argv(*arguments), self._environment())

    def _argv(self, *arguments: str) -> list[str]:
        cache = f"{self.scene.folder}/restic-cache"
        return ["restic", "--quiet", "--repo", self.repository, "--cache-dir", cache, *arguments]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "RESTIC_PASSWORD": _SECRET}


class _Borg(_Program):
    name = "borg"
    count = 0

    def prepare(self) -> None:
        _run(["borg", "init", "--encryption=repokey-blake2", self.repository], self._environment())

    def back_up(self) -> None:
        self.count += 1
        archive = f"{self.repository}::{self.count}"
        _run(["borg", "create", "--compression=zstd,3", archive, self.scene.raw], self._environment())

    def digest(self) -> str:
        archive = f"{self.repository}::{self.count}"
        return _digest_of_output(["borg", "extract", "--stdout", archive], self._environment())

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "BORG_PASSPHRASE": _SECRET, "BORG_BASE_DIR": f"{self.scene.folder}/borg-home"}


def _run(argv: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        raise BenchFault(f"{argv[0]} failed: {done.stderr.decode(errors='replace').strip()}")


def _pread(path: str, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), length, offset)


def _digest_of(read: Callable[[int, int], bytes], size_bytes: int) -> str:
    digest = hashlib.sha256()
    for offset in range(0, size_bytes, 4 * MIB):
        digest.update(read(offset, min(4 * MIB, size_bytes - offset)))
    return digest.hexdigest()


def _digest_of_output(argv: list[str], environment: dict[str, str]) -> str:
    digest = hashlib.sha256()
    with subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        while piece := child.stdout.read(4 * MIB):
            digest.update(piece)
    if child.returncode:
        raise BenchFault(f"{argv[0]} failed with exit status {child.returncode}")
    return digest.hexdigest()
