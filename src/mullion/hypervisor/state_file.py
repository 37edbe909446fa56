"""The file of a saved state: what QEMU was started with, then its migration stream, compressed and sealed.

Spec: docs/formats/saved-state.md. All numbers little-endian.

    0    8   magic "MULSTATE"
    8    4   version: 1
    12   4   length of the description, at most 1 MiB
    16   32  BLAKE2b-256 of bytes 0-15 and of the description
    48   ..  description: JSON (`StateAbout`)
    ..   ..  frames, any number
    ..   64  trailer

A frame holds at most 1 MiB of the stream:      The trailer stands in the place of a frame:

    0    4   length of the compressed bytes         0    4   0
    4    4   length of the plain bytes              4    4   "END1"
    8    16  BLAKE2b-128 of the frame's number,     8    8   frames
             of bytes 0-7 and of what follows       16   8   plain bytes of all frames
    24   ..  one zstd frame                         24   8   bytes of this file
                                                    32   32  seal: BLAKE2b-256 of bytes 0-47 of the file, of the first
                                                             24 bytes of every frame, of bytes 0-31 of the trailer

Invariants: every byte is under a checksum, and the seal stands for all of them: whoever knows it knows the file.
Nothing is decompressed before its checksum is right, and never to more than 1 MiB. Nothing may follow the trailer.
Durability: written as `PATH.new`, synced, renamed, the folder synced: the file is whole under its name, or not there.
Not handled: secrecy. The memory of a guest is in here as it was; only the file's mode 0600 protects it.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Self

import msgspec
import zstandard

from mullion.base.errors import MullionError, NotFoundError
from mullion.base.files import sync_folder
from mullion.base.units import KIB, MIB
from mullion.model.definition import Accelerator, PartitionDefinition
from mullion.vhd.storage import storage_explained

VERSION: Final = 1
FRAME_LIMIT_BYTES: Final = MIB
"""Plain bytes of a frame; large enough for a good ratio, small enough to be held in memory twice."""
ABOUT_LIMIT_BYTES: Final = MIB

_MAGIC: Final = b"MULSTATE"
_END: Final = b"END1"
_HEAD: Final = struct.Struct("<8sII32s")
_FRAME: Final = struct.Struct("<II16s")
_NUMBER: Final = struct.Struct("<Q")
_TRAILER: Final = struct.Struct("<I4sQQQ32s")
_STORED_LIMIT_BYTES: Final = FRAME_LIMIT_BYTES + 64 * KIB
"""zstd's bound for a frame that does not compress is 0.4 % more than its content."""
_LEVEL: Final = 1
_SYNC_BYTES: Final = 64 * MIB
_LOOK_S: Final = 0.2
"""How often a transfer looks whether it is still wanted."""


class StateDamagedError(MullionError):
    """A saved state is damaged, cut off, or no saved state at all; `offset` says where."""

    code = "state-damaged"
    exit_code = 8
    http_status = 422
    default_remedy = (
        "The disks are as they were when it was saved: throw the state away with `mullion partition discard-state`, "
        "then start the partition, which boots from them."
    )


class TransferStoppedError(MullionError):
    """Nobody wants the transfer of a state any more: its owner knows why."""

    code = "transfer-stopped"
    default_remedy = "Read the error that comes with it."


class StateAbout(msgspec.Struct, frozen=True):
    """What QEMU was started with: all that a start which loads the state must have again."""

    partition: str
    uuid: str
    saved_at: str
    qemu_version: str
    machine_type: str
    """Versioned (`pc-q35-7.2`): the short name means another machine after an upgrade of QEMU."""
    accelerator: Accelerator
    host_cpu: str
    definition: PartitionDefinition
    disks: dict[str, str] = {}
    """By disk id the unique id (hex) of the file that was its top."""


@dataclass(frozen=True, slots=True)
class StateInfo:
    """A saved state that is whole. `seal` (hex) stands for all of its bytes."""

    path: str
    about: StateAbout
    frames: int
    plain_bytes: int
    file_bytes: int
    seal: str


class StateWriter:
    """Makes a state file: `copy_from`, then `commit` or `discard`. Blocking; `stop` may be called by another thread."""

    def __init__(self, path: str, about: StateAbout) -> None:
        """Begin `PATH.new`. Raises: NoSpaceError, DeniedError …"""
        self.path = path
        self.plain_bytes = 0
        self._temporary = f"{path}.new"
        self._about = about
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
        self._frames = 0
        self._file_bytes = 0
        self._unsynced_bytes = 0
        self._is_stopped = False
        self._is_over = False
        description = msgspec.json.encode(about)
        assert len(description) <= ABOUT_LIMIT_BYTES, "a definition's fields have limits"
        start = _HEAD.pack(_MAGIC, VERSION, len(description), bytes(32))[:16]
        head = start + blake2b(start + description, digest_size=32).digest()
        self._seal = blake2b(head, digest_size=32)
        with storage_explained(path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._temporary, flags, 0o600)
        try:
            self._write(head, description)
        except BaseException:
            self.discard()
            raise

    def stop(self) -> None:
        """Have `copy_from` end with TransferStoppedError within a moment."""
        self._is_stopped = True

    def copy_from(self, fd: int) -> None:
        """Take the stream that comes through a pipe, to its end.

        Raises: NoSpaceError and other storage errors; TransferStoppedError.
        """
        buffer = bytearray(FRAME_LIMIT_BYTES)
        view = memoryview(buffer)
        filled, is_open = 0, True
        while is_open:
            self._wait(fd)
            got = os.readv(fd, [view[filled:]])
            filled += got
            is_open = got > 0
            if filled and (filled == len(buffer) or not is_open):
                self._add_frame(view[:filled])
                filled = 0

    def commit(self) -> StateInfo:
        """Seal the file and give it its name, durably. Raises: storage errors, and nothing of it stays then."""
        try:
            file_bytes = self._file_bytes + _TRAILER.size
            start = _TRAILER.pack(0, _END, self._frames, self.plain_bytes, file_bytes, bytes(32))[:32]
            self._seal.update(start)
            seal = self._seal.digest()
            self._write(start, seal)
            with storage_explained(self.path):
                os.fsync(self._fd)
                os.rename(self._temporary, self.path)
                self._temporary = self.path  # what is to be removed, should the folder not be synced
                sync_folder(os.path.dirname(self.path))
        except BaseException:
            self.discard()
            raise
        os.close(self._fd)
        self._is_over = True
        return StateInfo(self.path, self._about, self._frames, self.plain_bytes, file_bytes, seal.hex())

    def discard(self) -> None:
        """Leave nothing behind; after `commit`, do nothing."""
        if self._is_over:
            return
        self._is_over = True
        os.close(self._fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)

    def _wait(self, fd: int) -> None:
        """Until there is something to read, or the other end is closed. Raises: TransferStoppedError."""
        _wait_ready(fd, select.POLLIN, lambda: self._is_stopped)

    def _add_frame(self, plain: memoryview) -> None:
        stored = self._compressor.compress(plain)
        start = _FRAME.pack(len(stored), len(plain), bytes(16))[:8]
        head = start + _frame_digest(self._frames, start, stored)
        self._write(head, stored)
        self._seal.update(head)
        self._frames += 1
        self.plain_bytes += len(plain)

    def _write(self, *pieces: bytes) -> None:
        with storage_explained(self.path):
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[os.write(self._fd, view) :]
                self._file_bytes += len(piece)
                self._unsynced_bytes += len(piece)
            if self._unsynced_bytes >= _SYNC_BYTES:  # so that the last sync, for which the guest waits, is short
                os.fdatasync(self._fd)
                self._unsynced_bytes = 0


class StateReader:
    """An open state file. `check` reads all of it; `copy_to` sends the stream. Blocking."""

    def __init__(self, path: str) -> None:
        """Open it and judge its head. Raises: NotFoundError; StateDamagedError; storage errors."""
        self.path = path
        self.sent_bytes = 0
        self._is_stopped = False
        with storage_explained(path):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError as error:
                raise NotFoundError(
                    f"there is no saved state {path}",
                    remedy="The disks are whole: mullion partition discard-state, then start, boots from them.",
                    path=path,
                ) from error
        self._file = os.fdopen(fd, "rb", buffering=256 * KIB)
        try:
            status = os.fstat(fd)
            self.file_bytes = status.st_size
            if not stat.S_ISREG(status.st_mode):
                raise self._damaged("is no file", 0)
            self._head, self.about = self._read_about()
        except BaseException:
            self._file.close()
            raise
        self._frames_offset = self._read_bytes = self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def stop(self) -> None:
        """Have `copy_to` end with TransferStoppedError within a moment."""
        self._is_stopped = True

    @property
    def part(self) -> float:
        """What part of the file was read, 0 to 1."""
        return self._read_bytes / self.file_bytes if self.file_bytes else 0.0

    def check(self) -> StateInfo:
        """Read every byte. Raises: StateDamagedError, with the offset."""
        for _ in self._frames():
            pass
        return self._info

    def copy_to(self, fd: int, *, seal: str) -> None:
        """Send the stream into a pipe; every byte is checked again, since it may be another file by now.

        Until this returns nothing of what was sent may be believed.
        Raises: StateDamagedError; TransferStoppedError; BrokenPipeError when nobody reads any more.
        """
        os.set_blocking(fd, False)
        decompressor = zstandard.ZstdDecompressor()
        for offset, plain_bytes, stored in self._frames():
            view = memoryview(self._decompress(decompressor, offset, plain_bytes, stored))
            while view:
                _wait_ready(fd, select.POLLOUT, lambda: self._is_stopped)
                with contextlib.suppress(BlockingIOError):
                    sent = os.write(fd, view)
                    view = view[sent:]
                    self.sent_bytes += sent
        if self._info.seal != seal:
            raise self._damaged("is whole, but another state has taken its place", 0)

    def _decompress(
        self, decompressor: zstandard.ZstdDecompressor, offset: int, plain_bytes: int, stored: bytes
    ) -> bytes:
        try:
            # The size is asked first: the decompressor makes room for whatever a frame claims.
            if zstandard.frame_content_size(stored) == plain_bytes:
                return decompressor.decompress(stored, max_output_size=plain_bytes, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self._damaged(f"has a frame that cannot be decompressed ({error})", offset) from error
        raise self._damaged("has a frame that does not hold what it says", offset)

    def _read_about(self) -> tuple[bytes, StateAbout]:
        head = self._read(_HEAD.size, "the header")
        magic, version, about_bytes, digest = _HEAD.unpack(head)
        if magic != _MAGIC:
            raise self._damaged("is no saved state: it does not begin with the magic of one", 0)
        if version != VERSION:
            raise StateDamagedError(
                f"{self.path} is a saved state of version {version}, which this Mullion does not know",
                remedy="Restore it with the Mullion that saved it, or throw it away and boot from the disks.",
                path=self.path,
                offset=8,
            )
        if about_bytes > ABOUT_LIMIT_BYTES:
            raise self._damaged(f"says that its description has {about_bytes} bytes, more than 1 MiB", 12)
        description = self._read(about_bytes, "the description")
        if blake2b(head[:16] + description, digest_size=32).digest() != digest:
            raise self._damaged("has a header or description that does not fit its checksum", 16)
        try:
            return head, msgspec.json.decode(description, type=StateAbout)
        except msgspec.MsgspecError as error:
            raise self._damaged(f"has a description that cannot be understood ({error})", _HEAD.size) from error

    def _frames(self) -> Iterator[tuple[int, int, bytes]]:
        """Each frame: offset, plain bytes, compressed bytes. When it ends, `_info` is set."""
        self._file.seek(self._frames_offset)
        seal = blake2b(self._head, digest_size=32)
        number = total_bytes = 0
        while True:
            offset = self._file.tell()
            start = self._read(8, "a frame's head")
            if start[:4] == bytes(4):
                break
            head = start + self._read(_FRAME.size - 8, "a frame's head")
            stored_bytes, plain_bytes, digest = _FRAME.unpack(head)
            if stored_bytes > _STORED_LIMIT_BYTES or not 0 < plain_bytes <= FRAME_LIMIT_BYTES:
                raise self._damaged("has a frame of an impossible length", offset)
            stored = self._read(stored_bytes, "a frame")
            if _frame_digest(number, start, stored) != digest:
                raise self._damaged("has a frame that does not fit its checksum", offset)
            seal.update(head)
            self._read_bytes = offset
            yield offset, plain_bytes, stored
            number += 1
            total_bytes += plain_bytes
        self._info = self._read_trailer(offset, start, seal, number, total_bytes)

    def _read_trailer(self, offset: int, start: bytes, seal: blake2b, frames: int, plain_bytes: int) -> StateInfo:
        trailer = start + self._read(_TRAILER.size - len(start), "the trailer")
        _zero, mark, said_frames, said_plain_bytes, said_bytes, digest = _TRAILER.unpack(trailer)
        seal.update(trailer[:32])
        if mark != _END or seal.digest() != digest:
            raise self._damaged("has a trailer that does not fit its checksum", offset)
        end = self._file.tell()
        if (said_frames, said_plain_bytes, said_bytes) != (frames, plain_bytes, end):
            raise self._damaged("has a trailer that counts other frames or bytes than there are", offset)
        if self._file.read(1):
            raise self._damaged("goes on behind its trailer", end)
        return StateInfo(self.path, self.about, frames, plain_bytes, end, digest.hex())

    def _read(self, length: int, what: str) -> bytes:
        offset = self._file.tell()
        with storage_explained(self.path):
            found = self._file.read(length)
        if len(found) < length:
            raise self._damaged(f"is cut off within {what}", offset + len(found))
        return found

    def _damaged(self, what: str, offset: int) -> StateDamagedError:
        return StateDamagedError(f"{self.path} {what} (byte {offset})", path=self.path, offset=offset)


def check_state(path: str) -> StateInfo:
    """Read all of a state file. Raises: NotFoundError; StateDamagedError, with the offset of what is wrong."""
    with StateReader(path) as reader:
        return reader.check()


def remove_state(path: str) -> None:
    """Remove a state file, and one that was begun, durably; none may be there."""
    with storage_explained(path):
        for name in (f"{path}.new", path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        sync_folder(os.path.dirname(path))


def _frame_digest(number: int, start: bytes, stored: bytes) -> bytes:
    digest = blake2b(_NUMBER.pack(number) + start, digest_size=16)
    digest.update(stored)
    return digest.digest()


def _wait_ready(fd: int, event: int, is_stopped: Callable[[], bool]) -> None:
    """Until a pipe can be read or written, or its other end is gone. Raises: TransferStoppedError."""
    poll = select.poll()
    poll.register(fd, event)
    while not poll.poll(_LOOK_S * 1000):
        if is_stopped():
            raise TransferStoppedError("the transfer of the state was stopped")
    if is_stopped():
        raise TransferStoppedError("the transfer of the state was stopped")
