"""The other side of the confined reader: it has the disk, starts the process, and believes nothing that it says.

Every request for bytes is checked against the volume; what comes back is bounded and checked to be what it must be; a
process that is silent for `DEADLINE_S` is killed. Crash, hang and nonsense are one error, `ReaderDiedError`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Generator, Iterator
from typing import Final

from mullion.base.block import BlockDevice
from mullion.base.errors import InvalidError, MullionError, NotFoundError
from mullion.base.process import attach, wait_or_kill
from mullion.media.confined import channel
from mullion.media.errors import FilesystemError, ReaderDiedError
from mullion.media.filesystems.entries import FileEntry, Hole, Piece, shown, unpack_entry
from mullion.media.filesystems.volumes import Volume

LISTER: Final = "mullion vhd ls"
DEADLINE_S: Final = 10.0
"""How long the process may compute, time for reading the disk not counted, before it gives something."""
_STOP_S: Final = 2.0
_NOTES_LIMIT: Final = 8
_SAID_LIMIT_BYTES: Final = 4000


class ReaderProcess:
    """A confined process that knows of no volume yet, and the line to it; started ahead, nobody waits for that."""

    def __init__(self) -> None:
        """Start it; it confines itself meanwhile. Raises: MissingToolError; OSError."""
        self.socket, theirs = socket.socketpair()
        with theirs:
            arguments = (str(theirs.fileno()), str(os.getpid()))
            line = (sys.executable, "-I", "-m", "mullion.media.confined.file_reader", *arguments)
            try:
                self.process = attach(line, pass_fds=(theirs.fileno(),))
            except BaseException:
                self.socket.close()
                raise
        self._is_ended = False

    @property
    def is_alive(self) -> bool:
        return not self._is_ended and self.process.poll() is None

    def end(self, patience_s: float = _STOP_S) -> tuple[int, str]:
        """Hang up and wait for it: how it ended, and the last line of what it said; nothing the second time."""
        if self._is_ended:
            return 0, ""
        self._is_ended = True
        self.socket.close()
        status, last = wait_or_kill(self.process, patience_s), ""
        if self.process.stderr is not None:
            last = self.process.stderr.read(_SAID_LIMIT_BYTES).decode(errors="replace").strip().rpartition("\n")[2]
            self.process.stderr.close()
        return status, shown(last)


class VolumeReader:
    """The files of one volume, read by a confined process. The device stays the caller's, who closes it last."""

    def __init__(
        self,
        device: BlockDevice,
        volume: Volume,
        path: str,
        lister: str = LISTER,
        *,
        ahead: ReaderProcess | None = None,
    ) -> None:
        """A process that was started `ahead` is used, and ended, when it lives."""
        if volume.holds.kind is None:
            raise FilesystemError(f"{path} holds {volume.holds.title}", remedy=volume.holds.remedy)
        self._device = device
        self._volume = volume
        self._path = path
        self._lister = lister
        self._is_busy = False
        self.notes: list[str] = []
        """What people should know of what they see; known when the first answer has begun."""
        self._reader: ReaderProcess | None = None
        self._start(ahead)

    def _start(self, ahead: ReaderProcess | None = None) -> None:
        """Have a process, and wait until it is confined."""
        self._reader = ahead if ahead is not None and ahead.is_alive else ReaderProcess()
        try:
            kind, _ = self._receive()
            if kind != channel.READY:
                raise self._death("it did not begin as it must")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The confined process."""
        assert self._reader is not None
        return self._reader.process.pid

    def __enter__(self) -> VolumeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def list(self, path: str, *, recursive: bool = False) -> Iterator[FileEntry]:
        """What is at a path, then what is in it when it is a folder, in the order of the disk.

        Raises: NotFoundError, InvalidError, FilesystemError.
        """
        for found in self._ask("list", path, recursive=recursive):
            if isinstance(found, FileEntry):
                yield found

    def read(self, path: str) -> Generator[Piece, None, None]:
        """A file, or a stream of it (`file:stream`): its entry, then its bytes in pieces."""
        yield from self._ask("read", path)

    def tree(self, path: str) -> Generator[Piece, None, None]:
        """Everything from a path on: each entry, followed by its bytes when it is a file that can be read."""
        yield from self._ask("tree", path)

    def close(self) -> None:
        """End the process."""
        self._end(_STOP_S)

    def _end(self, patience_s: float) -> tuple[int, str]:
        """Hang up and wait for the process: how it ended, and the last line of what it said."""
        reader, self._reader = self._reader, None
        return (0, "") if reader is None else reader.end(patience_s)

    def _ask(self, operation: str, path: str, **options: object) -> Iterator[Piece]:
        if "\0" in path:
            raise InvalidError("a path cannot hold a zero byte", remedy="Leave it out.")
        volume = {"size_bytes": self._volume.length, "kind": self._volume.holds.kind}
        request = json.dumps({"operation": operation, "path": path, "volume": volume, **options}).encode()
        assert not self._is_busy, "one answer is taken to its end before the next question"
        if self._reader is None:  # an earlier answer was not taken to its end
            self._start()
        self._is_busy = True
        is_done = False
        try:
            self._send(channel.COMMAND, request)
            while True:
                kind, payload = self._receive()
                if kind == channel.CONTENT:
                    yield payload
                elif kind == channel.HOLE and len(payload) == channel.HOLE_BYTES.size:
                    yield Hole(channel.HOLE_BYTES.unpack(payload)[0])
                elif kind == channel.EXTENT:
                    yield from self._extent(payload)
                elif kind == channel.ENTRY:
                    yield self._entry(payload)
                elif kind == channel.NOTE and len(self.notes) < _NOTES_LIMIT:
                    self.notes.append(f"{self._volume.holds.title}: {shown(payload.decode(errors='replace'))}")
                elif kind == channel.END:
                    is_done = True
                    self._raise_error(payload)
                    return
                else:
                    raise self._death(f"it sent {kind!r}")
        finally:
            self._is_busy = False
            if not is_done:  # the rest of the answer would be taken for the next one's
                self.close()

    def _raise_error(self, payload: bytes) -> None:
        fields = self._parse(payload)
        if not fields:
            return
        code, message = str(fields.get("code")), shown(str(fields.get("message")))
        where = f"{self._path}{f':{self._volume.number}' if self._volume.number else ''}"
        if code == "not-found":
            raise NotFoundError(
                f"{where}: {message}", remedy=f"List what there is with `{self._lister}`.", path=self._path
            )
        if code == "invalid":
            remedy = f"Name a file, by its path from the root of the volume; `{self._lister}` shows what there is."
            raise InvalidError(f"{where}: {message}", path=self._path, remedy=remedy)
        raise FilesystemError(f"{where}: {self._volume.holds.title}: {message}", path=self._path)

    def _extent(self, payload: bytes) -> Iterator[bytes]:
        """Content that lies on the volume as it is: read here, so that it need not go there and come back."""
        if len(payload) != channel.EXTENT_PLACE.size:
            raise self._death("it named an extent in a way that is none")
        offset, length = channel.EXTENT_PLACE.unpack(payload)
        if offset + length > self._volume.length:
            raise self._death(f"it named {length} bytes at {offset} of a volume of {self._volume.length}")
        for begin in range(offset, offset + length, channel.READ_LIMIT_BYTES):
            buffer = bytearray(min(channel.READ_LIMIT_BYTES, offset + length - begin))
            self._device.pread(self._volume.offset + begin, buffer)
            yield bytes(buffer)

    def _entry(self, payload: bytes) -> FileEntry:
        try:
            return unpack_entry(payload)
        except ValueError as error:
            raise self._death(f"it sent {error}") from error

    def _parse(self, payload: bytes) -> dict[str, object]:
        try:
            fields = json.loads(payload)
        except (ValueError, RecursionError) as error:
            raise self._death("it sent what is not JSON") from error
        if not isinstance(fields, dict):
            raise self._death("it sent what is no object")
        return fields

    # ------------------------------------------------------------------------------------------------ the channel

    def _receive(self) -> tuple[bytes, bytes]:
        """The next frame that is not a request for bytes of the disk; those are answered on the way."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            kind, length = channel.HEAD.unpack(self._take(channel.HEAD.size, deadline))
            if length > channel.FRAME_LIMIT_BYTES:
                raise self._death(f"it announced {length} bytes")
            payload = self._take(length, deadline)
            if kind != channel.WANT:
                return kind, payload
            begun = time.monotonic()
            self._give(payload, deadline)
            deadline += time.monotonic() - begun

    def _give(self, payload: bytes, deadline: float) -> None:
        """Answer a request for bytes: of the volume, never beyond it; none where it asks for more than there is."""
        if len(payload) != channel.READ.size:
            raise self._death("it asked for bytes in a way that is none")
        offset, length = channel.READ.unpack(payload)
        if length > channel.READ_LIMIT_BYTES:
            raise self._death(f"it asked for {length} bytes at once")
        buffer = bytearray(max(0, min(length, self._volume.length - offset)))
        if buffer:
            self._device.pread(self._volume.offset + offset, buffer)
        self._send(channel.DATA, buffer)

    def _take(self, count: int, deadline: float) -> bytes:
        assert self._reader is not None
        line, parts, left = self._reader.socket, [], count
        while left:
            line.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                part = line.recv(left)
            except TimeoutError as error:
                raise self._death(f"it computed for {DEADLINE_S:g} s without a result") from error
            except ConnectionError:
                part = b""
            if not part:
                raise self._death(None)
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _send(self, kind: bytes, payload: bytes | bytearray) -> None:
        assert self._reader is not None
        line = self._reader.socket
        line.settimeout(DEADLINE_S)
        try:
            line.sendall(channel.HEAD.pack(kind, len(payload)))
            line.sendall(payload)
        except TimeoutError as error:
            raise self._death(f"it took nothing for {DEADLINE_S:g} s") from error
        except ConnectionError as error:
            raise self._death(None) from error

    def _death(self, why: str | None) -> MullionError:
        """End the process; the error that says what happened to it, which is for us to find out without `why`."""
        status, last = self._end(_STOP_S if why is None else 0)
        if why is None:
            why = f"signal {-status} ended it" if status < 0 else f"it ended with status {status}"
        return ReaderDiedError(
            f"{self._path}: the reader of its {self._volume.holds.title} failed: {why}{f' ({last})' if last else ''}",
            path=self._path,
        )


@contextlib.contextmanager
def open_volume(device: BlockDevice, volume: Volume, path: str, lister: str = LISTER) -> Iterator[VolumeReader]:
    """The files of a volume of an open disk; `path` is what messages call the disk, `lister` lists what is in it."""
    with VolumeReader(device, volume, path, lister) as reader:
        yield reader
