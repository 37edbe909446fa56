"""A QMP session: `qemu.qmp` with deadlines, our errors, and no noise.

Spec: QEMU Machine Protocol (docs/interop/qmp-spec). One monitor serves one client: a second one is accepted by the
kernel, but gets no greeting until the first has left; hence every wait here has a deadline.

Invariants: a session that broke stays broken, its owner opens a new one; `close` may be called at any time, more than
once, and never raises for what the other side did.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Final, Self

from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from mullion.base.errors import DeadlineError
from mullion.hypervisor.errors import MachineGoneError, MonitorError, MonitorRefusedError
from mullion.hypervisor.states import MachineEvent

GREETING_S: Final = 3.0
COMMAND_S: Final = 30.0

# The library reports each lost connection as an error with tracebacks, and as a critical one (a bug of its own) when
# QEMU resets it while it is closed; for us a QEMU that ends is an ordinary event, and what fails is raised as well.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)

EventHandler = Callable[[MachineEvent], None]


class QmpSession:
    """A connection to one monitor of one QEMU. Made by `open`."""

    def __init__(self, client: QMPClient, path: str, on_event: EventHandler) -> None:
        self.path = path
        self._client = client
        self._closed = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._pump = asyncio.create_task(self._pump_events(on_event), name=f"qmp events {path}")
        self._watch = asyncio.create_task(self._watch_connection(), name=f"qmp connection {path}")

    @classmethod
    async def open(cls, path: str, on_event: EventHandler, *, timeout_s: float = GREETING_S) -> Self:
        """Connect to a monitor's socket and agree on capabilities.

        Raises: MachineGoneError when nobody listens or QEMU hangs up; MonitorError when no greeting comes in time.
        """
        client = QMPClient(path)
        try:
            async with asyncio.timeout(timeout_s):
                await client.connect(path)
        except TimeoutError as error:
            raise MonitorError(f"no greeting from {path} within {timeout_s:g} s", path=path) from error
        except ConnectError as error:
            raise MachineGoneError(f"QEMU does not answer on {path}: {error.exc!r}", path=path) from error
        return cls(client, path, on_event)

    @property
    def is_open(self) -> bool:
        return not self._closed.is_set()

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float = COMMAND_S
    ) -> object:
        """Run one command and return its result.

        Raises: MonitorRefusedError with QEMU's reason; MachineGoneError when the connection is lost (the command may
        have run); DeadlineError after `timeout_s` (likewise; the session stays usable).
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise MonitorRefusedError(
                f"QEMU refused {command}: {error}", command=command, reason=error.error_class
            ) from error
        except TimeoutError as error:
            raise DeadlineError(f"QEMU did not answer {command} within {timeout_s:g} s", command=command) from error
        except (ExecInterruptedError, StateError, QMPError, EOFError, OSError) as error:
            raise MachineGoneError(f"the connection to QEMU was lost during {command}", command=command) from error

    async def give_descriptor(self, name: str, fd: int) -> None:
        """Have QEMU take a copy of a descriptor under a name, in place of one that has it (`getfd`).

        Raises: as `execute`.
        """
        try:
            self._client.send_fd_scm(fd)
        except (StateError, QMPError, OSError) as error:
            raise MachineGoneError("the connection to QEMU was lost", command="getfd") from error
        await self.execute("getfd", {"fdname": name})

    async def wait_closed(self) -> None:
        """Return when the connection is lost or was closed."""
        await self._closed.wait()

    async def close(self) -> None:
        await self._end()
        await self._watch

    async def _end(self) -> None:
        """Disconnect, once, and to the end: the library leaves unread exceptions behind when that is interrupted."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._disconnect(), name=f"qmp end {self.path}")
        await asyncio.shield(self._ending)

    async def _disconnect(self) -> None:
        # It raises whatever ended the connection: known by then, and no news to the caller.
        with contextlib.suppress(QMPError, EOFError, OSError):
            await self._client.disconnect()
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        self._closed.set()

    async def _watch_connection(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        await self._end()

    async def _pump_events(self, on_event: EventHandler) -> None:
        async for message in self._client.events:
            on_event(_event(message))


def _event(message: Message) -> MachineEvent:
    data, stamp = message.get("data"), message.get("timestamp")
    at_s = 0.0
    if isinstance(stamp, Mapping):
        at_s = float(stamp.get("seconds", 0)) + float(stamp.get("microseconds", 0)) / 1e6
    return MachineEvent(str(message["event"]), data if isinstance(data, Mapping) else {}, at_s)
