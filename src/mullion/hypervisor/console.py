"""The serial console for several viewers: one connection to QEMU's socket, fanned out, with the log as scrollback.

QEMU serves one client of its console socket at a time and drops what the guest prints while nobody is connected, but it
writes all of it to the console log as well. So the first viewer connects, later ones share, the last one disconnects;
each is first given the end of the log.

Invariants: a viewer that does not read loses its oldest bytes, never delays the others or the guest; all viewers may
type. When QEMU ends every stream ends (`read` returns b""). Not handled: bytes that the guest prints in the very
instant of attaching may come twice, once from the log and once live.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from mullion.base.errors import UnavailableError

SCROLLBACK_BYTES: Final = 16 * 1024
BACKLOG_BYTES: Final = 1024 * 1024
"""What a viewer may be behind before it loses the oldest."""
_CHUNK_BYTES: Final = 16 * 1024


class ConsoleStream:
    """One viewer. Made by `ConsoleHub.attach`."""

    def __init__(self, hub: ConsoleHub) -> None:
        self._hub = hub
        self._chunks: deque[bytes] = deque()
        self._held_bytes = 0
        self._news = asyncio.Event()
        self._ended = False
        self.lost_bytes = 0

    async def read(self) -> bytes:
        """The next bytes, as many as there are; b"" when the console has ended."""
        while not self._chunks and not self._ended:
            self._news.clear()
            await self._news.wait()
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._held_bytes = 0
        return data

    async def write(self, data: bytes) -> None:
        """Type into the console. Raises: UnavailableError when it has ended."""
        await self._hub.type(data)

    def feed(self, data: bytes) -> None:
        """Bytes for this viewer, from the hub."""
        self._chunks.append(data)
        self._held_bytes += len(data)
        while self._held_bytes > BACKLOG_BYTES and len(self._chunks) > 1:
            oldest = self._chunks.popleft()
            self._held_bytes -= len(oldest)
            self.lost_bytes += len(oldest)
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()


class ConsoleHub:
    """The console of one partition."""

    def __init__(self, socket_path: str, log_path: str) -> None:
        self.socket_path = socket_path
        self.log_path = log_path
        self._streams: set[ConsoleStream] = set()
        self._lock = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._pump: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def attach(self, scrollback_bytes: int = SCROLLBACK_BYTES) -> AsyncIterator[ConsoleStream]:
        """A viewer for as long as the block lasts.

        Raises: UnavailableError when the partition does not run.
        """
        stream = ConsoleStream(self)
        async with self._lock:
            if self._writer is None:
                await self._connect()
            if tail := self._tail(scrollback_bytes):
                stream.feed(tail)
            self._streams.add(stream)
        try:
            yield stream
        finally:
            async with self._lock:
                self._streams.discard(stream)
                if not self._streams:
                    await self._disconnect()

    @property
    def viewers(self) -> int:
        return len(self._streams)

    async def type(self, data: bytes) -> None:
        """Send keystrokes. Raises: UnavailableError when the console has ended."""
        writer = self._writer
        if writer is None:
            raise self._unavailable("the connection has ended")
        try:
            writer.write(data)
            await writer.drain()
        except OSError as error:
            raise self._unavailable(str(error)) from error

    async def close(self) -> None:
        """End all streams and let go of the socket."""
        async with self._lock:
            await self._disconnect()

    async def _connect(self) -> None:
        try:
            reader, self._writer = await asyncio.open_unix_connection(self.socket_path)
        except OSError as error:
            raise self._unavailable(str(error)) from error
        self._pump = asyncio.create_task(self._fan_out(reader), name=f"console {self.socket_path}")

    async def _disconnect(self) -> None:
        pump, self._pump = self._pump, None
        if pump is not None:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
        await self._hang_up()
        self._end_streams()

    async def _hang_up(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _fan_out(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):  # a reset is an end like any other
            while data := await reader.read(_CHUNK_BYTES):
                for stream in self._streams:
                    stream.feed(data)
        await self._hang_up()
        self._end_streams()

    def _end_streams(self) -> None:
        for stream in self._streams:
            stream.end()
        self._streams.clear()

    def _tail(self, limit_bytes: int) -> bytes:
        try:
            with open(self.log_path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - limit_bytes))
                return file.read(limit_bytes)
        except OSError:
            return b""  # no log, no scrollback; the console itself works

    def _unavailable(self, detail: str) -> UnavailableError:
        return UnavailableError(
            f"the console cannot be reached: {detail}", remedy="Start the partition first.", path=self.socket_path
        )
