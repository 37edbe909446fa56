"""A machine's memory and devices into a state file, and back: QEMU's migration to and from a pipe of ours.

    write_state:  QEMU ── pipe ──► thread: compress, checksum, write ──► PATH.new ──► PATH
    load_state:   PATH ──► thread: check, decompress ── pipe ──► QEMU, started with `-incoming defer`

QEMU gets the pipe's end by its monitor (`getfd`): it may not start programs (`-sandbox spawn=deny`) and has no rights
on the file. Two ways to write:

- *stopped*: the guest stands still until the state is written; afterwards it can go on, or QEMU be ended.
- *live* (`background-snapshot`): it stands still while its devices are written, then runs on while its memory is, each
  page as it was (userfaultfd write protection). The kernel allows that to root only, unless `sysctl
  vm.unprivileged_userfaultfd=1`; and never with a vhost-user device, whose provider writes into the guest's memory past
  the protection.

Invariants: when writing fails or is cancelled, no file is left, and the guest can go on (a live one may do so already).
A state that was loaded is believed only when QEMU has taken all of it and every checksum was right.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mullion.base.errors import DeadlineError, MullionError, OperationFailedError
from mullion.base.units import KIB
from mullion.hypervisor.errors import MachineGoneError, MonitorRefusedError, StateRefusedError
from mullion.hypervisor.launch import log_excerpt
from mullion.hypervisor.state_file import (
    StateAbout,
    StateInfo,
    StateReader,
    StateWriter,
    TransferStoppedError,
)

if TYPE_CHECKING:
    from mullion.hypervisor.machine import Machine

log = logging.getLogger(__name__)

Progress = Callable[[float], None]
"""Told now and then which part is done, 0 to 1."""

_STALL_S: Final = 60.0
"""So long without a byte means that QEMU or the storage hangs."""
_CANCEL_S: Final = 10.0
_POLL_S: Final = 0.02
_PIPE_BYTES: Final = 1024 * 1024
_GATE_BYTES: Final = 4 * KIB
_TOUCH_PATIENCE_S: Final = 0.5
_FD_NAME: Final = "state"
_ENDED: Final = frozenset({"none", "completed", "failed", "cancelled"})
"""States of a migration in which nothing goes on."""
_CPU_FIELD: Final = "model name"


@dataclass(frozen=True, slots=True)
class _Work:
    """Our side of a transfer: `copy` runs in a thread until the stream ends or `stop` is called."""

    copy: Callable[[], None]
    stop: Callable[[], None]
    moved: Callable[[], int]
    """Bytes so far."""
    part: Callable[[Mapping[str, Any]], float]
    """What part is done, 0 to 1, given QEMU's `query-migrate`."""
    on_progress: Progress | None


class Gate:
    """Holds a live writing at its beginning: the guest's memory is touched by then, which takes time, and nothing of
    the instant is decided. `shut` asks, `open` lets it go on.

    The pipe is full, so QEMU waits in the first write of its own; it stops the guest, writes its devices and protects
    the memory only after that.
    """

    def __init__(self) -> None:
        self._opened = threading.Event()

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    def open(self) -> None:
        self._opened.set()

    def fill(self, writing: int) -> int:
        """Fill a pipe that is empty; how many bytes that were."""
        count = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _GATE_BYTES)
        os.write(writing, bytes(count))
        return count

    def pass_through(self, reading: int, count: int) -> None:
        """Wait until it is open, then empty the pipe of what `fill` has put there."""
        self._opened.wait()
        while count:
            count -= len(os.read(reading, count))
        with contextlib.suppress(OSError):
            fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


async def is_held(machine: Machine) -> bool:
    """Whether a live writing waits at its gate. Raises: what `Machine.execute` raises."""
    answer = await machine.execute("query-migrate")
    return isinstance(answer, Mapping) and answer.get("status") == "setup"


async def wait_touched(machine: Machine, memory_bytes: int) -> None:
    """Return when QEMU has touched all of the guest's memory, or does not get on with it: then the pause is longer."""
    touched, since_s = -1, time.monotonic()
    while True:
        found = _shared_bytes(machine.identity.pid)
        now_s = time.monotonic()
        if found >= memory_bytes:
            return
        if found != touched:
            touched, since_s = found, now_s
        elif now_s - since_s > _TOUCH_PATIENCE_S:
            return
        await asyncio.sleep(_POLL_S)


def _shared_bytes(pid: int) -> int:
    """How much shared memory a process has mapped and touched; the guest's memory is all that QEMU shares."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("RssShmem:"):
                return int(line.split()[1]) * KIB
    return 0


async def live_obstacle(machine: Machine) -> str | None:
    """Why this machine's state cannot be written live; None when it can.

    Raises: what `Machine.execute` raises.
    """
    devices = await machine.execute("qom-list", {"path": "/machine/peripheral"})
    for device in devices if isinstance(devices, list) else ():
        if "vhost-user" in str(device.get("type")):
            return f"{device['name']} is served over shared memory (vhost-user), past the protection of pages"
    try:
        await _set_live(machine, True)
    except MonitorRefusedError as error:
        return f"{error.message} (for QEMU under a user of its own: sysctl vm.unprivileged_userfaultfd=1)"
    await _set_live(machine, False)
    return None


async def check_movable(machine: Machine) -> None:
    """Know before the guest is paused what would keep its state from being written.

    Raises: MonitorRefusedError with QEMU's reasons; what `Machine.execute` raises.
    """
    answer = await machine.execute("query-migrate")
    reasons = answer.get("blocked-reasons") if isinstance(answer, Mapping) else None
    if reasons:
        raise MonitorRefusedError(
            f"the state of this guest cannot be written: {'; '.join(map(str, reasons))}",
            remedy='Give disks that are named so `transport = "nbd"`, and start the partition again.',
        )


async def machine_facts(machine: Machine) -> tuple[str, str]:
    """QEMU's version and the versioned machine type. Raises: what `Machine.execute` raises."""
    version = await machine.execute("query-version")
    numbers = version["qemu"] if isinstance(version, Mapping) else {}
    kind = await machine.execute("qom-get", {"path": "/machine", "property": "type"})
    return (
        ".".join(str(numbers.get(part, 0)) for part in ("major", "minor", "micro")),
        str(kind).removesuffix("-machine"),
    )


def host_cpu() -> str:
    """The model of this host's processor."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == _CPU_FIELD:
                return value.strip()
    return "unknown"


async def write_state(
    machine: Machine,
    path: str,
    about: StateAbout,
    *,
    live: bool = False,
    gate: Gate | None = None,
    on_progress: Progress | None = None,
) -> StateInfo:
    """Write the state of a machine; the guest is paused. Durable when this returns.

    `live`: QEMU lets the guest go on, also one that was paused, as soon as its devices are written; ask
    `live_obstacle` first. With a `gate`, which is opened by somebody else, the guest may run until then; it is to be
    paused before. Otherwise it stays paused, and may be resumed afterwards.
    Raises: NoSpaceError and other storage errors; MonitorRefusedError when a device forbids it; OperationFailedError
    with QEMU's reason; DeadlineError; MachineGoneError. Nothing is left behind then.
    """
    await _set_live(machine, live)
    await machine.execute("migrate-set-parameters", {"max-bandwidth": 0})
    writer = await asyncio.to_thread(StateWriter, path, about)
    try:
        reading, writing = _pipe()
        try:
            held_bytes = 0 if gate is None else gate.fill(writing)
            await machine.give_descriptor(_FD_NAME, writing)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)

        def stop() -> None:
            writer.stop()
            if gate is not None:
                gate.open()

        work = _Work(
            copy=lambda: _consume(writer, reading, gate, held_bytes),
            stop=stop,
            moved=lambda: writer.plain_bytes if gate is None or gate.is_open else int(time.monotonic()),
            part=_part_of_memory,
            on_progress=on_progress,
        )
        await _transfer(machine, work, lambda: machine.execute("migrate", {"uri": f"fd:{_FD_NAME}"}))
        if live:
            await _set_live(machine, False)
        return await asyncio.to_thread(writer.commit)
    except BaseException:
        await _cancel(machine)
        await asyncio.to_thread(writer.discard)
        raise


async def load_state(machine: Machine, path: str, seal: str, *, on_progress: Progress | None = None) -> None:
    """Load a state that was checked (its `seal`) into a machine that was started to load one; it stands still then.

    Raises: StateDamagedError when the file has changed since; StateRefusedError with QEMU's words; DeadlineError.
    The machine is good for nothing then: end it.
    """
    reader = await asyncio.to_thread(StateReader, path)
    with reader:
        reading, writing = _pipe()
        try:
            await machine.give_descriptor(_FD_NAME, reading)
        except BaseException:
            os.close(writing)
            raise
        finally:
            os.close(reading)
        work = _Work(
            copy=lambda: _produce(reader, writing, seal),
            stop=reader.stop,
            moved=lambda: reader.sent_bytes,
            part=lambda _: reader.part,
            on_progress=on_progress,
        )
        try:
            await _transfer(machine, work, lambda: machine.execute("migrate-incoming", {"uri": f"fd:{_FD_NAME}"}))
        except (MachineGoneError, MonitorRefusedError, BrokenPipeError, OperationFailedError) as error:
            words = log_excerpt(machine.paths.qemu_log)
            raise StateRefusedError(
                f"QEMU cannot load {path}: {words or error}", path=path, log_excerpt=words or None
            ) from error


def _consume(writer: StateWriter, fd: int, gate: Gate | None, held_bytes: int) -> None:
    try:
        if gate is not None:
            gate.pass_through(fd, held_bytes)
        writer.copy_from(fd)
    finally:
        os.close(fd)  # QEMU, should it still write, is told by EPIPE


def _produce(reader: StateReader, fd: int, seal: str) -> None:
    try:
        reader.copy_to(fd, seal=seal)
    finally:
        os.close(fd)


async def _transfer(machine: Machine, work: _Work, begin: Callable[[], Awaitable[object]]) -> None:
    """Run QEMU's side and ours to their ends. Ours has ended, whatever is raised."""
    copying = asyncio.create_task(asyncio.to_thread(work.copy), name=f"state of {machine.paths.data}")
    try:
        await begin()
        await _follow(machine, work, copying)
        await copying
    except BaseException as error:
        work.stop()
        await asyncio.wait((copying,))
        ours = copying.exception() if not copying.cancelled() else None
        # Who failed first? A full disk breaks the pipe, and QEMU then tells of a broken pipe.
        is_cause = isinstance(ours, MullionError) and not isinstance(ours, TransferStoppedError)
        if ours is not None and ours is not error and is_cause and isinstance(error, Exception):
            raise ours from error
        raise


async def _follow(machine: Machine, work: _Work, copying: asyncio.Task[None]) -> None:
    """Until both sides have ended.

    Raises: OperationFailedError with QEMU's reason; what our side raised; DeadlineError when nothing moves.
    """
    moved, moved_s = -1, time.monotonic()
    while True:
        answer = await machine.execute("query-migrate")
        info = answer if isinstance(answer, Mapping) else {}
        status = info.get("status")
        if status in ("failed", "cancelled"):
            reason = info.get("error-desc") or f"its migration has {status}"
            raise OperationFailedError(
                f"QEMU could not move the state: {reason}", remedy="QEMU's reason is in the message; its log has more."
            )
        if copying.done():
            copying.result()  # our side failed: its reason is the one to tell
            if status == "completed":
                return
        if work.on_progress is not None:
            work.on_progress(work.part(info))
        if work.moved() != moved:
            moved, moved_s = work.moved(), time.monotonic()
        elif time.monotonic() - moved_s > _STALL_S:
            raise DeadlineError(f"the state has not moved for {_STALL_S:g} s")
        await asyncio.sleep(_POLL_S)


def _part_of_memory(info: Mapping[str, Any]) -> float:
    """How much of the guest's memory QEMU has sent, 0 to 1."""
    ram = info.get("ram") or {}
    return 1.0 - ram.get("remaining", 0) / ram["total"] if ram.get("total") else 0.0


async def _cancel(machine: Machine) -> None:
    """Have QEMU give up a migration, if one goes on; return when it has. A machine that is gone has."""
    try:
        async with asyncio.timeout(_CANCEL_S):
            await machine.execute("migrate_cancel")
            while True:
                answer = await machine.execute("query-migrate")
                if not isinstance(answer, Mapping) or answer.get("status", "none") in _ENDED:
                    break
                await asyncio.sleep(_POLL_S)
            await _set_live(machine, False)
    except (MullionError, TimeoutError) as error:  # the caller tells what led here
        log.warning("QEMU %d: its migration was not cancelled: %s", machine.identity.pid, error or "it does not end")


async def _set_live(machine: Machine, is_live: bool) -> None:
    capability = {"capability": "background-snapshot", "state": is_live}
    await machine.execute("migrate-set-capabilities", {"capabilities": [capability]})


def _pipe() -> tuple[int, int]:
    """A pipe, as large as we may have it."""
    reading, writing = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return reading, writing
