"""The processes that read files: one for each request, and after one a spare that waits for the next.

Most of a short answer's time goes into starting two processes. Whoever has listed a folder lists another soon: so the
next worker, and the confined reader beneath it, are started when a request is over, and end when nobody has come for
`SPARE_S`. A spare has seen nothing of anybody: it is used once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from mullion.base.errors import MullionError
from mullion.base.process import Spawned, attach, wait_or_kill
from mullion.media.confined import channel
from mullion.media.files_worker import AHEAD, FilesCommand

log = logging.getLogger(__name__)

SPARE_S: Final = 120.0
_STOP_S: Final = 2.0


class _Worker:
    """A process, and our end of the line to it."""

    def __init__(self, line: socket.socket, process: Spawned) -> None:
        self.line = line
        self.process = process

    @classmethod
    async def start(cls, *arguments: str) -> _Worker:
        """Raises: MissingToolError; OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            argv = (sys.executable, "-I", "-m", "mullion.media.files_worker", str(theirs.fileno()), *arguments)
            starting = asyncio.ensure_future(asyncio.to_thread(attach, argv, pass_fds=(theirs.fileno(),)))
            try:
                return cls(ours, await asyncio.shield(starting))
            except BaseException:
                ours.close()
                with contextlib.suppress(MullionError, OSError):  # it was not started: that is what is raised
                    await asyncio.to_thread(_end, await starting)
                raise

    async def end(self) -> None:
        """Hang up, and wait for it: it ends at its next word, or is killed."""
        self.line.close()
        await asyncio.shield(asyncio.to_thread(_end, self.process))


class FilesWorkers:
    """Starts workers. `close` ends the spare; the others end with their requests."""

    def __init__(self, spare_s: float = SPARE_S) -> None:
        self._spare_s = spare_s
        self._spare: _Worker | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._is_closed = False

    @contextlib.asynccontextmanager
    async def work(self, command: FilesCommand) -> AsyncIterator[asyncio.StreamReader]:
        """Have a process carry out a command: what it says. It ends with this block."""
        worker = await self._take()
        try:
            worker.line.setblocking(False)
            frames, writer = await asyncio.open_connection(sock=worker.line, limit=channel.READ_LIMIT_BYTES)
            try:
                payload = msgspec.json.encode(command)
                writer.write(channel.HEAD.pack(channel.COMMAND, len(payload)) + payload)
                yield frames
            finally:
                writer.transport.abort()
        finally:
            await worker.end()
            self._prepare()

    async def close(self) -> None:
        """End the spare, and start none any more."""
        self._is_closed = True
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])

    async def _take(self) -> _Worker:
        """The spare when there is one that lives, or a new process."""
        spare, self._spare = self._spare, None
        if spare is not None:
            assert self._keeping is not None
            self._keeping.cancel()
            if spare.process.poll() is None:
                return spare
            await spare.end()
        return await _Worker.start()

    def _prepare(self) -> None:
        if not self._is_closed and (self._keeping is None or self._keeping.done()):
            self._keeping = asyncio.create_task(self._keep_spare(), name="spare reader of files")

    async def _keep_spare(self) -> None:
        """Have a spare until it is taken, or not needed for long."""
        try:
            self._spare = await _Worker.start(AHEAD)
        except (MullionError, OSError) as error:
            log.warning("no reader of files can be started ahead: %s", error)
            return
        try:
            await asyncio.sleep(self._spare_s)
        finally:
            spare, self._spare = self._spare, None
            if spare is not None:
                await spare.end()


def _end(process: Spawned) -> None:
    """Nobody listens to it any more: it ends at its next word, or is killed."""
    status = wait_or_kill(process, _STOP_S)
    assert process.stderr is not None
    said = process.stderr.read(2000).decode(errors="replace").strip()
    process.stderr.close()
    if said:
        log.error("the reader of files ended with status %d: %s", status, said)
