"""The guest agent's client: qemu-guest-agent over virtio-serial, one JSON value a line.

Spec: QEMU guest agent protocol (docs/interop/qemu-ga-ref, `guest-sync-delimited`).

There is no connection state between host and agent: bytes of an earlier request may still come out of the pipe, and
what we write waits in the pipe while no agent runs. So a session opens with 0xFF (which makes the agent's parser drop
a half line) and `guest-sync-delimited` with a fresh number, again every 0.25 s until the agent sends 0xFF and that
number back. The same after anything that may have left a stray answer: a deadline, a reboot of the guest.

Invariants: one request at a time, one client per socket; every wait has a deadline; nothing the guest sends is trusted
(length, JSON, types). Freezing filesystems is a process of its own (`freeze`). Not handled: reading files.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import DeadlineError
from mullion.hypervisor.errors import AgentError, AgentRefusedError

SYNC_INTERVAL_S: Final = 0.25
COMMAND_S: Final = 10.0
REFUSAL_S: Final = 1.0
"""How long after guest-shutdown an answer may come: there is one only when the agent refuses."""
LINE_LIMIT_BYTES: Final = 16 * 1024 * 1024
"""The agent sends a captured output as one line; more than this is not an agent talking."""
WRITE_CHUNK_BYTES: Final = 32 * 1024
_SENTINEL: Final = b"\xff"


@dataclass(frozen=True, slots=True)
class ExecResult:
    """How a program in the guest ended: exit code or signal, and what it printed (cut by the agent at 16 MiB)."""

    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True, slots=True)
class GuestInterface:
    """A network interface as the guest sees it; addresses with their prefix length, such as `10.0.2.15/24`."""

    name: str
    mac: str | None
    addresses: tuple[str, ...]


class GuestAgent:
    """A client of one guest's agent. Connects at the first request, and again after a loss."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = asyncio.Lock()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._in_sync = False
        self._numbers = itertools.count(secrets.randbits(30))

    async def ping(self, timeout_s: float = 2.0) -> bool:
        """Whether the agent answers within the time; one that comes up in the meantime is noticed at once."""
        try:
            async with self._deadline("guest-sync-delimited", timeout_s):
                self._in_sync = False  # asking for a new number is the ping that may be repeated
                await self._synchronize()
        except AgentError:
            return False
        return True

    async def command(
        self, name: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float = COMMAND_S
    ) -> object:
        """Run one agent command and return its result.

        Raises: AgentError when the agent does not answer in time (the command may have run); AgentRefusedError.
        """
        async with self._deadline(name, timeout_s):
            return await self._request(name, arguments)

    async def shutdown(self, mode: str = "powerdown", *, timeout_s: float = COMMAND_S) -> None:
        """Ask the guest to power off (`powerdown`), `halt` or `reboot`. The agent answers only when it refuses.

        Raises: AgentError when no agent is there; AgentRefusedError.
        """
        async with self._deadline("guest-shutdown", timeout_s):
            await self._synchronize()
            self._in_sync = False  # an answer may still come, after we have gone
            await self._send({"execute": "guest-shutdown", "arguments": {"mode": mode}})
            # No answer, or a hang-up by a QEMU that ends with its guest: it obeys.
            with contextlib.suppress(TimeoutError, AgentError):
                async with asyncio.timeout(REFUSAL_S):
                    _result("guest-shutdown", await self._receive())

    async def execute(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | None = None,
        environment: Sequence[str] = (),
        timeout_s: float = 60.0,
    ) -> ExecResult:
        """Run a program in the guest to its end. `argv[0]` is a path in the guest.

        Raises: DeadlineError when it has not ended in time (it runs on); AgentError; AgentRefusedError.
        """
        arguments: dict[str, object] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
        if stdin is not None:
            arguments["input-data"] = base64.b64encode(stdin).decode()
        if environment:
            arguments["env"] = list(environment)
        started = _object(await self.command("guest-exec", arguments), "guest-exec")
        pause_s = 0.01
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    answer = await self.command("guest-exec-status", {"pid": started.get("pid")})
                    status = _object(answer, "guest-exec-status")
                    if status.get("exited"):
                        return ExecResult(
                            _integer(status.get("exitcode")),
                            _integer(status.get("signal")),
                            _decoded(status.get("out-data")),
                            _decoded(status.get("err-data")),
                        )
                    await asyncio.sleep(pause_s)
                    pause_s = min(0.5, pause_s * 2)
        except TimeoutError as error:
            raise DeadlineError(f"{argv[0]} in the guest did not end within {timeout_s:g} s") from error

    async def write_file(self, path: str, content: bytes, *, append: bool = False) -> None:
        """Write a file in the guest; its folder must be there. Raises: AgentError, AgentRefusedError."""
        opened = await self.command("guest-file-open", {"path": path, "mode": "ab" if append else "wb"})
        handle = _integer(opened)
        try:
            for offset in range(0, len(content), WRITE_CHUNK_BYTES):
                chunk = base64.b64encode(content[offset : offset + WRITE_CHUNK_BYTES]).decode()
                await self.command("guest-file-write", {"handle": handle, "buf-b64": chunk})
            await self.command("guest-file-flush", {"handle": handle})
        finally:
            await self.command("guest-file-close", {"handle": handle})

    async def network_interfaces(self, timeout_s: float = COMMAND_S) -> tuple[GuestInterface, ...]:
        """The guest's interfaces, loopback included. Raises: AgentError, AgentRefusedError."""
        answer = await self.command("guest-network-get-interfaces", timeout_s=timeout_s)
        found = []
        for entry in answer if isinstance(answer, list) else []:
            interface = _object(entry, "guest-network-get-interfaces")
            mac, listed = interface.get("hardware-address"), interface.get("ip-addresses")
            addresses = [
                f"{address['ip-address']}/{address.get('prefix')}"
                for address in (listed if isinstance(listed, list) else [])
                if isinstance(address, dict) and "ip-address" in address
            ]
            name = str(interface.get("name", ""))
            found.append(GuestInterface(name, mac if isinstance(mac, str) else None, tuple(addresses)))
        return tuple(found)

    async def close(self) -> None:
        """Let go of the socket; the next request connects again."""
        async with self._lock:
            await self._drop()

    @contextlib.asynccontextmanager
    async def lend(self) -> AsyncIterator[None]:
        """Let another process have the socket, which serves one client, until the block ends."""
        async with self._lock:
            await self._drop()
            yield

    @contextlib.asynccontextmanager
    async def _deadline(self, name: str, timeout_s: float) -> AsyncIterator[None]:
        """One request: alone, and in time. What an absent agent never read is dropped with the connection."""
        try:
            async with asyncio.timeout(timeout_s), self._lock:
                try:
                    yield
                except asyncio.CancelledError:
                    self._abort()
                    raise
        except TimeoutError as error:
            raise AgentError(f"the guest agent did not answer {name} within {timeout_s:g} s", command=name) from error

    async def _request(self, name: str, arguments: Mapping[str, object] | None) -> object:
        await self._synchronize()
        self._in_sync = False  # until the answer is here: a cancelled wait leaves a stray one
        message: dict[str, object] = {"execute": name}
        if arguments is not None:
            message["arguments"] = arguments
        await self._send(message)
        answer = await self._receive()
        self._in_sync = True
        return _result(name, answer)

    async def _synchronize(self) -> None:
        """Connect if need be, and make sure that the next line we read answers the next line we write."""
        if self._in_sync:
            return
        await self._connect()
        sent: set[int] = set()
        while True:
            number = next(self._numbers)
            sent.add(number)
            await self._send({"execute": "guest-sync-delimited", "arguments": {"id": number}}, prefix=_SENTINEL)
            try:
                async with asyncio.timeout(SYNC_INTERVAL_S):
                    # An agent that was away answers every attempt that waited in the pipe: only the latest counts.
                    while await self._receive_sync() != number:
                        pass
            except TimeoutError:
                continue
            self._in_sync = True
            return

    async def _receive_sync(self) -> int | None:
        assert self._reader is not None
        try:
            await self._reader.readuntil(_SENTINEL)
        except asyncio.LimitOverrunError:
            await self._reader.read(LINE_LIMIT_BYTES)  # noise without an end: away with it
            return None
        except (asyncio.IncompleteReadError, OSError) as error:
            raise await self._lost(error) from error
        answer = await self._receive()
        return _integer(answer.get("return"))

    async def _connect(self) -> None:
        if self._writer is not None and not self._writer.is_closing():
            return
        try:
            self._reader, self._writer = await asyncio.open_unix_connection(self.path, limit=LINE_LIMIT_BYTES)
        except OSError as error:
            raise AgentError(
                f"the agent's socket cannot be reached: {error}",
                remedy="Start the partition: without QEMU there is no agent.",
                path=self.path,
            ) from error

    async def _send(self, message: Mapping[str, object], prefix: bytes = b"") -> None:
        assert self._writer is not None
        try:
            self._writer.write(prefix + json.dumps(message).encode() + b"\n")
            await self._writer.drain()
        except OSError as error:
            raise await self._lost(error) from error

    async def _receive(self) -> dict[str, object]:
        assert self._reader is not None
        try:
            line = await self._reader.readuntil(b"\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError) as error:
            raise await self._lost(error) from error
        try:
            return _object(json.loads(line.rpartition(_SENTINEL)[2]), "the agent")
        except ValueError as error:
            raise await self._lost(error) from error

    async def _lost(self, error: Exception) -> AgentError:
        await self._drop()
        return AgentError(f"the connection to the guest agent was lost: {error!r}", path=self.path)

    def _abort(self) -> None:
        self._in_sync = False
        writer, self._reader, self._writer = self._writer, None, None
        if writer is not None:
            writer.transport.abort()

    async def _drop(self) -> None:
        self._in_sync = False
        writer, self._reader, self._writer = self._writer, None, None
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def _result(name: str, answer: Mapping[str, object]) -> object:
    if "error" in answer:
        detail = answer["error"]
        reason = detail.get("desc") if isinstance(detail, dict) else detail
        raise AgentRefusedError(f"the guest agent refused {name}: {reason}", command=name)
    return answer.get("return")


def _object(value: object, source: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise AgentError(f"{source} answered something that is not an object", remedy="Update the guest's agent.")
    return value


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _decoded(value: object) -> bytes:
    try:
        return base64.b64decode(value) if isinstance(value, str) else b""
    except ValueError:
        return b""
