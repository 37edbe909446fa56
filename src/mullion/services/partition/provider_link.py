"""The parent's end of the providers: the zygote that forks them and the control socket of each.

Both speak one JSON object a line (`mullion.provider.zygote`, `mullion.provider.control`). A provider outlives the
zygote and the parent; only its control socket and its identity file lead back to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from mullion.base.errors import DeadlineError, MullionError, UnavailableError
from mullion.base.pidfd import wait_process
from mullion.base.process import ProcessIdentity, spawn
from mullion.provider.zygote import spawn_argv

log = logging.getLogger(__name__)

_START_DEADLINE_S: Final = 120.0
"""A provider is up in milliseconds, unless the storage below keeps its first sync waiting: seen for half a minute."""
_ANSWER_DEADLINE_S: Final = 30.0
_SEND_RETRY_S: Final = 0.01
_GIVE_UP_S: Final = 5.0
_LINE_LIMIT_BYTES: Final = 8 * 1024 * 1024


class ProviderError(MullionError):
    """A provider refused to serve a disk, or went away; code and remedy are its own."""

    code = "provider"
    exit_code = 8
    http_status = 409
    default_remedy = "Read the partition's provider.log."


def _error_from(answer: Mapping[str, Any]) -> MullionError:
    """The error that a provider reports, as one of ours."""
    error = answer["error"]
    return MullionError.from_wire(error) if isinstance(error, dict) else ProviderError(str(error))


class ProviderFleet:
    """Starts providers through a zygote, which is started when first needed and again when it has died."""

    def __init__(self, log_path: str) -> None:
        self._log_path = log_path
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._starting = asyncio.Lock()

    async def open(self) -> None:
        """Start the zygote unless it runs."""
        async with self._starting:
            if self._writer is not None:
                return
            ours, theirs = socket.socketpair()
            with theirs:
                argv = spawn_argv(theirs.fileno())
                # The zygote ends with our socket: nobody waits for it, the Popen object is not kept.
                process = spawn(argv, log_path=self._log_path, pass_fds=(theirs.fileno(),))
            ours.setblocking(False)
            reader, self._writer = await asyncio.open_connection(sock=ours, limit=_LINE_LIMIT_BYTES)
            self._reader_task = asyncio.create_task(self._read(reader, process.wait), name="zygote")

    async def _read(self, reader: asyncio.StreamReader, reap: Callable[[], int]) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            if "id" in message:
                waiting = self._waiting.pop(message["id"], None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
                elif message.get("ready"):
                    _end_unwanted(message["pid"])
            elif "exited" in message:
                log.info("provider %s ended with status %s", message["exited"], message.get("status"))
        self._writer = None
        status = await asyncio.to_thread(reap)
        log.warning("the zygote ended with status %s; the next provider starts another", status)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(UnavailableError("the zygote died", remedy="Try again: a new one is started."))
        self._waiting.clear()

    async def renew(self) -> None:
        """Start another zygote, of the code that is installed now; the old one ends when it has answered.

        Providers stay. Raises: DeadlineError when it does not answer.
        """
        waiting = list(self._waiting.values())
        if waiting and (await asyncio.wait(waiting, timeout=_START_DEADLINE_S))[1]:
            raise DeadlineError("providers that are being started keep the zygote busy", remedy="Try again later.")
        writer, reader_task = self._writer, self._reader_task
        if writer is not None and reader_task is not None:
            writer.close()
            await asyncio.wait([reader_task], timeout=_GIVE_UP_S)
        await self.open()

    async def spawn(self, spec: Mapping[str, Any]) -> ProcessIdentity:
        """Fork a provider and return when it serves its disks. One that is not waited for any more is ended.

        Raises: the error that the provider reports (a VhdError, DiskBusyError …); DeadlineError; UnavailableError.
        """
        message = await self._start("spawn", spec)
        identity = ProcessIdentity.of(message["pid"])
        if identity is None:
            raise ProviderError("the provider ended as soon as it was ready")
        return identity

    async def spawn_merge(self, spec: Mapping[str, Any]) -> None:
        """Fork a merge worker and return when it has begun; it may have ended by then.

        Raises: the error that it reports; DeadlineError; UnavailableError.
        """
        await self._start("merge", spec)

    async def spawn_export(self, spec: Mapping[str, Any]) -> None:
        """Fork an exporter and return when it serves.

        Raises: the error that it reports; DeadlineError; UnavailableError.
        """
        await self._start("export", spec)

    async def _start(self, kind: str, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        await self.open()
        assert self._writer is not None
        number = next(self._numbers)
        answer: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._writer.write(json.dumps({"id": number, kind: spec}).encode() + b"\n")
        await self._writer.drain()
        try:
            async with asyncio.timeout(_START_DEADLINE_S):
                message = await asyncio.shield(answer)
        except asyncio.CancelledError:
            await self._give_up(answer)
            raise
        except TimeoutError as error:
            answer.cancel()
            raise DeadlineError(f"the provider did not answer within {_START_DEADLINE_S:g} s of its start") from error
        if "error" in message:
            raise _error_from(message)
        return message

    async def _give_up(self, answer: asyncio.Future[Mapping[str, Any]]) -> None:
        """The start was cancelled: wait for its provider, which takes milliseconds, and end it."""
        try:
            async with asyncio.timeout(_GIVE_UP_S):
                message = await answer
        except (TimeoutError, MullionError):
            return  # it is ended when it does become ready
        identity = _end_unwanted(message["pid"]) if message.get("ready") else None
        if identity is not None:
            await wait_process(identity)

    async def close(self) -> None:
        """Let the zygote go; providers stay."""
        if self._writer is not None:
            self._writer.close()
        if self._reader_task is not None:
            self._reader_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader_task


def _end_unwanted(pid: int) -> ProcessIdentity | None:
    """A start was given up before the provider was ready: it must not keep the disks locked."""
    identity = ProcessIdentity.of(pid)
    if identity is not None:
        log.warning("provider %d became ready when nobody waited for it any more: ended", pid)
        identity.send_signal(signal.SIGTERM)
    return identity


async def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


class ProviderLink:
    """A connection to one provider's control socket. `on_event` gets its events, and None when the socket closes."""

    def __init__(self, path: str, on_event: Callable[[Mapping[str, Any] | None], None]) -> None:
        self._path = path
        self._on_event = on_event
        self._answers: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()
        self._turn = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._socket: socket.socket | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self.is_lost = False
        """Whether it has ended otherwise than by `close`: `on_event` has heard that."""

    async def open(self) -> None:
        """Connect and subscribe.

        Raises: UnavailableError when nobody listens.
        """
        try:
            self._socket = await _connect(self._path)
            try:
                reader, self._writer = await asyncio.open_connection(sock=self._socket, limit=_LINE_LIMIT_BYTES)
            except BaseException:
                self._socket.close()
                raise
        except OSError as error:
            raise UnavailableError(
                f"the provider does not listen at {self._path}: {os.strerror(error.errno or 0)}"
            ) from error
        self._task = asyncio.create_task(self._read(reader), name=f"provider link {self._path}")
        await self.request("subscribe")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionResetError):
            while line := await reader.readline():
                message = json.loads(line)
                if "event" in message:
                    self._on_event(message)
                else:
                    self._answers.put_nowait(message)
        self._answers.put_nowait({"error": "the provider closed its control socket"})
        await self.close()
        self._lose()

    def _lose(self) -> None:
        self.is_lost = True
        self._on_event(None)

    async def request(
        self, command: str, *, fds: Sequence[int] = (), deadline_s: float = _ANSWER_DEADLINE_S, **arguments: object
    ) -> Mapping[str, Any]:
        """Ask one thing; `fds` go along, and stay the caller's.

        Raises: the error that the provider reports; DeadlineError; UnavailableError when it is gone.
        """
        async with self._turn:
            if self._writer is None:
                raise UnavailableError("the provider's control socket is closed")
            try:
                number = next(self._numbers)
                line = json.dumps({"command": command, "id": number, "fds": len(fds), **arguments}).encode() + b"\n"
                async with asyncio.timeout(deadline_s):
                    await self._send(self._writer, line, fds)
                    answer = await self._answer(number)
            except TimeoutError as error:
                await self.close()
                self._lose()
                raise DeadlineError(f"the provider did not answer {command!r} within {deadline_s:g} s") from error
            except OSError as error:  # of a socket that was closed meanwhile, for instance
                raise UnavailableError(f"the provider went away during {command!r}") from error
        if "error" in answer:
            raise _error_from(answer)
        return answer

    async def _send(self, writer: asyncio.StreamWriter, line: bytes, fds: Sequence[int]) -> None:
        if fds:
            assert self._socket is not None, "connected, since there is a writer"
            sent = 0
            while not sent:
                try:
                    sent = socket.send_fds(self._socket, [line], list(fds))
                except BlockingIOError:  # earlier requests have not been read yet
                    await asyncio.sleep(_SEND_RETRY_S)
            line = line[sent:]
        writer.write(line)
        await writer.drain()

    async def _answer(self, number: int) -> Mapping[str, Any]:
        """The answer to our request: one whose request was given up may come before it."""
        while True:
            answer = await self._answers.get()
            if answer.get("id", number) == number:
                return answer

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
