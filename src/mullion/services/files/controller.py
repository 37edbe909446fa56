"""Files out of checkpoints, and out of partitions as they are now: a process for each request, and its limits.

    client ◄── frames, in a queue of a few ── task of the request ◄── media.files_worker ◄── confined reader

The task owns what the request needs: a place among the readers, the chains (with the checkpoint that keeps them as they
are), the process. It ends with the answer, when the client goes away or takes nothing for a minute, and when the
service ends; then the process ends too, and a checkpoint that was made for this request goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Final

import msgspec

from mullion.base.errors import DeadlineError, InvalidError, MullionError, UnavailableError
from mullion.media.confined import channel
from mullion.media.errors import ReaderDiedError
from mullion.media.files_worker import BackupSource, FilesCommand
from mullion.model.views import FileVolumeView
from mullion.parent.faults import error_view
from mullion.services.checkpoint.backings import ReadableDisk
from mullion.services.checkpoint.controller import CheckpointController
from mullion.services.files.workers import FilesWorkers

log = logging.getLogger(__name__)

READERS: Final = 8
"""Requests at once; each is two processes and a few MiB of frames."""
_TURN_S: Final = 10.0
"""How long a request waits for its turn."""
_SILENCE_S: Final = 30.0
"""How long the process may say nothing: more than the confined reader is given."""
_BACKUP_SILENCE_S: Final = 300.0
_CLIENT_S: Final = 60.0
"""How long a client may take nothing."""
_TOTAL_S: Final = 6 * 3600.0
_FRAMES: Final = 4

Frame = tuple[bytes, bytes]


class FilesRequest(msgspec.Struct, frozen=True):
    """What somebody wants to read: of a checkpoint, or of the partition as it is now (`checkpoint` is empty).

    `consistent` freezes the guest's filesystems for the moment of which the answer is.
    """

    partition: str
    checkpoint: str
    operation: str
    path: str = "/"
    disk: str | None = None
    volume: int | None = None
    recursive: bool = False
    consistent: bool = False
    backup: BackupSource | None = None
    """Then it is that backup's disks, and `partition` is what messages call it."""

    @property
    def silence_s(self) -> float:
        """How long the process may say nothing; a repository may be far away, and its index long."""
        return _SILENCE_S if self.backup is None else _BACKUP_SILENCE_S

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.partition}@{self.checkpoint}" if self.checkpoint else self.partition


class FilesAnswer:
    """An answer that has begun: its notes, then its frames, the last of which is an end (`channel.END`)."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._frames: asyncio.Queue[Frame] = asyncio.Queue(_FRAMES)
        self.task: asyncio.Task[None] | None = None

    async def put(self, frame: Frame) -> None:
        """Give a frame to the client. Raises: DeadlineError when it takes none."""
        try:
            async with asyncio.timeout(_CLIENT_S):
                await self._frames.put(frame)
        except TimeoutError as error:
            raise DeadlineError(f"the client took nothing for {_CLIENT_S:g} s") from error

    async def frames(self) -> AsyncIterator[Frame]:
        """All frames; whoever stops before the end ends the reading."""
        is_whole = False
        try:
            while not is_whole:
                frame = await self._frames.get()
                is_whole = frame[0] == channel.END
                yield frame
        finally:
            if not is_whole and self.task is not None:
                self.task.cancel()


class FilesController:
    """Reads files for clients. `close` ends what is being read."""

    def __init__(self, checkpoints: CheckpointController, *, readers: int = READERS) -> None:
        self._checkpoints = checkpoints
        self._readers = readers
        self._turns = asyncio.Semaphore(readers)
        self._workers = FilesWorkers()
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End all readers."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._workers.close()

    async def begin(self, request: FilesRequest) -> FilesAnswer:
        """Begin to read; returns when there is something to give, or nothing more.

        Raises: NotFoundError; StateError; FilesystemError, VolumeChoiceError, InvalidError of what is read; VhdError;
        UnavailableError when too many read already; and for `consistent` what freezing raises.
        """
        if request.consistent and request.checkpoint:
            raise InvalidError(
                f"the files of checkpoint {request.checkpoint} are of its time: nothing can be frozen for them now",
                remedy="Leave out --consistent, or the checkpoint.",
                field="consistent",
            )
        answer = FilesAnswer()
        answer.task = asyncio.create_task(self._read(request, answer), name=f"files of {request.label}")
        self._tasks.add(answer.task)
        answer.task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.shield(answer.begun)
        except BaseException:
            answer.task.cancel()
            raise
        return answer

    async def volumes(self, request: FilesRequest) -> tuple[FileVolumeView, ...]:
        """The volumes of all disks and what they hold. Raises: as `begin`."""
        answer = await self.begin(request)
        found = []
        async for kind, payload in answer.frames():
            if kind == channel.ENTRY:
                found.append(msgspec.json.decode(payload, type=FileVolumeView))
            elif kind == channel.END and payload:
                raise MullionError.from_wire(msgspec.json.decode(payload, type=dict[str, object]))
        return tuple(found)

    # -- the task of a request -----------------------------------------------------------------------------------------

    async def _read(self, request: FilesRequest, answer: FilesAnswer) -> None:
        """The whole of a request; every error becomes the answer's."""
        try:
            try:
                async with asyncio.timeout(_TOTAL_S), self._turn(), self._disks(request) as disks:
                    await self._serve(request, disks, answer)
            except TimeoutError as error:
                raise DeadlineError(
                    f"reading {request.label}:{request.path} took more than {_TOTAL_S / 3600:g} hours",
                    remedy="Fetch less at once: a folder below.",
                ) from error
        except asyncio.CancelledError:
            if not answer.begun.done():
                answer.begun.set_exception(UnavailableError("the service is ending"))
                answer.begun.exception()  # nobody may be there any more to take it
            raise
        except Exception as error:
            await self._fail(request, answer, error)

    async def _fail(self, request: FilesRequest, answer: FilesAnswer, error: Exception) -> None:
        if not answer.begun.done():
            answer.begun.set_exception(error)
            return
        log.warning("reading %s:%s ended before its end: %s", request.label, request.path, error)
        with contextlib.suppress(DeadlineError):
            await answer.put((channel.END, msgspec.json.encode(error_view(error))))

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """A place among the readers. Raises: UnavailableError when none becomes free."""
        try:
            async with asyncio.timeout(_TURN_S):
                await self._turns.acquire()
        except TimeoutError as error:
            raise UnavailableError(
                f"{self._readers} readers of files are at work, and none has ended for {_TURN_S:g} s",
                remedy="Wait until one has ended, then try again.",
            ) from error
        try:
            yield
        finally:
            self._turns.release()

    @contextlib.asynccontextmanager
    async def _disks(self, request: FilesRequest) -> AsyncIterator[Mapping[str, ReadableDisk]]:
        """The disks, which stay as they are inside this block."""
        if request.backup is not None:
            yield {}
        elif request.checkpoint:
            async with self._checkpoints.reading(request.partition, request.checkpoint) as disks:
                yield disks
        else:
            async with self._checkpoints.reading_present(request.partition, consistent=request.consistent) as disks:
                yield disks

    async def _serve(self, request: FilesRequest, disks: Mapping[str, ReadableDisk], answer: FilesAnswer) -> None:
        """Pass on what the process says, until its end."""
        command = FilesCommand(
            label=request.label,
            chains={disk: one.files for disk, one in disks.items()},
            backings={disk: one.backing for disk, one in disks.items() if one.backing is not None},
            operation=request.operation,
            path=request.path,
            disk=request.disk,
            volume=request.volume,
            recursive=request.recursive,
            backup=request.backup,
        )
        async with self._workers.work(command) as frames:
            while True:
                kind, payload = await _next_frame(frames, request)
                if kind == channel.NOTE and not answer.begun.done():
                    answer.notes.append(payload.decode(errors="replace"))
                    continue
                if kind == channel.END:
                    payload = b"" if payload == b"{}" else payload
                if not answer.begun.done():
                    if kind == channel.END and payload:
                        raise MullionError.from_wire(msgspec.json.decode(payload, type=dict[str, object]))
                    answer.begun.set_result(None)
                await answer.put((kind, payload))
                if kind == channel.END:
                    return


async def _next_frame(frames: asyncio.StreamReader, request: FilesRequest) -> Frame:
    """Raises: ReaderDiedError when there is none."""
    try:
        async with asyncio.timeout(request.silence_s):
            kind, length = channel.HEAD.unpack(await frames.readexactly(channel.HEAD.size))
            if length > channel.FRAME_LIMIT_BYTES:
                raise ReaderDiedError(f"{request.label}: the reader announced {length} bytes")
            return kind, await frames.readexactly(length)
    except TimeoutError as error:
        raise ReaderDiedError(f"{request.label}: the reader said nothing for {request.silence_s:g} s") from error
    except asyncio.IncompleteReadError as error:
        raise ReaderDiedError(f"{request.label}: the reader ended before its answer did") from error
