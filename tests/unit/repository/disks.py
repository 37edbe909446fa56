"""Disks in memory and small repositories for the tests of the repository."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from mullion.base.block import BlockDevice, Buffer, Extent, ExtentKind, WritableBuffer
from mullion.base.units import KIB
from mullion.repository import Manifest, Repository, begin_backup
from mullion.repository.backend import Backend
from mullion.repository.errors import WrongKeyError
from mullion.repository.fake import FakeBackend
from mullion.repository.verify import verify

CHUNK = 64 * KIB
PASSPHRASE = "correct horse"
QUICK_SCRYPT = 10


class MemoryDisk:
    """A block device that says which of its pages hold data, and counts what is read."""

    read_only = False

    def __init__(self, content: bytes | bytearray, *, page: int = 4096) -> None:
        self.content = bytearray(content)
        self.page = page
        self.read_bytes = 0

    @property
    def size_bytes(self) -> int:
        return len(self.content)

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        assert offset + len(buffer) <= len(self.content)
        self.read_bytes += len(buffer)
        memoryview(buffer)[:] = memoryview(self.content)[offset : offset + len(buffer)]

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        assert offset + len(buffer) <= len(self.content)
        self.content[offset : offset + len(buffer)] = buffer

    def flush(self) -> None:
        pass

    def discard(self, offset: int, length: int) -> None:
        pass

    def write_zeroes(self, offset: int, length: int) -> None:
        self.content[offset : offset + length] = bytes(length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        end = offset + length
        while offset < end:
            stop = min(end, (offset // self.page + 1) * self.page)
            is_data = self.content[offset:stop] != bytes(stop - offset)
            yield Extent(offset, stop - offset, ExtentKind.DATA if is_data else ExtentKind.HOLE)
            offset = stop

    def close(self) -> None:
        pass


def scattered(size: int, seed: int, *, pieces: int = 6) -> bytearray:
    """A disk's content with some pieces of noise and of text in it."""
    choose = random.Random(seed)
    content = bytearray(size)
    for number in range(pieces):
        length = choose.choice([512, 5000, CHUNK, 3 * CHUNK + 17])
        offset = choose.randrange(max(1, size - length))
        piece = choose.randbytes(length) if number % 2 else b"line of text\n" * (length // 13 + 1)
        content[offset : offset + length] = piece[: min(length, size - offset)]
    return content


def new_repository(*, pack_bytes: int = 256 * KIB) -> tuple[Repository, FakeBackend]:
    backend = FakeBackend(pack_bytes)
    return Repository.create(backend, PASSPHRASE, scrypt_log2_n=QUICK_SCRYPT), backend


class EndedError(BaseException):
    """Nothing is done any more."""


def end_at(backend: FakeBackend, fuse: int) -> None:
    """From this change on nothing works any more."""

    def blow(number: int) -> None:
        if number >= fuse:
            raise EndedError

    backend.changes = 0
    backend.before_change = blow


def check_whole(repository: Repository, expected: dict[str, bytes]) -> None:
    """The repository is whole, and these backups of a disk, by their ids, have this content."""
    report = verify(repository)
    assert report.is_whole, report
    for backup_id, content in expected.items():
        assert content_of(repository.open_disk(repository.backup(backup_id), "disk0")) == content


def opens(backend: Backend, passphrase: str) -> bool:
    """Whether a passphrase is one of the repository's."""
    try:
        Repository.open(backend, passphrase)
    except WrongKeyError:
        return False
    return True


def back_up(
    repository: Repository,
    device: BlockDevice,
    *,
    partition: str = "web",
    base: Manifest | None = None,
    changed: Sequence[tuple[int, int]] | None = None,
) -> Manifest:
    with begin_backup(repository, partition, base=base) as backup:
        backup.add_disk("disk0", device, changed=changed)
        return backup.commit()


def content_of(device: BlockDevice) -> bytes:
    buffer = bytearray(device.size_bytes)
    device.pread(0, buffer)
    return bytes(buffer)
