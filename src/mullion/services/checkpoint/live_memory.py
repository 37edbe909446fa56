"""Memory and devices of a guest that runs on while they are written; its disks are frozen at the same instant.

    ready ─► prepare: QEMU begins, touches all memory, and waits ─► pause ─► disks: new heads ─► begin: QEMU writes its
    devices, protects the memory and lets the guest go on ─► finish: the memory, each page as it was then, is durable

Between pause and `begin` no processor of the guest runs and no request is in flight (QEMU drains its disks when it
stops), so memory, devices and disks are of one instant. The checkpoint is ready after `finish` only; one that is found
before that after a crash is dropped, and its layers are merged again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Final

from mullion.base.errors import DeadlineError, MullionError, OperationFailedError
from mullion.hypervisor import Machine
from mullion.hypervisor.saved_state import Gate, is_held, live_obstacle, wait_touched
from mullion.hypervisor.state_file import StateAbout, StateInfo, remove_state
from mullion.model.definition import PowerState
from mullion.services.partition.partition import Partition
from mullion.services.partition.record import SavedState
from mullion.services.partition.saving import as_saved, new_state_name, ready_to_write

Say = Callable[[str], None]

_POLL_S: Final = 0.002
_RESUME_S: Final = 60.0
"""QEMU writes devices and touches each page of the memory before the guest goes on."""


async def obstacle_to_live(partition: Partition) -> str | None:
    """Why this guest must stand still while its memory is written; None when it can run on.

    Raises: what QEMU's monitor raises.
    """
    machine = partition.runtime.machine
    if machine is None or partition.record.desired is not PowerState.RUNNING:
        return "the guest is paused"
    return await live_obstacle(machine)


class LiveMemory:
    """One writing of memory: `ready` before the pause, `begin` in it, `finish` when the guest runs again."""

    def __init__(self, partition: Partition, about: StateAbout, say: Say) -> None:
        """Use `ready`."""
        self._partition = partition
        self._about = about
        self._say = say
        self._name = new_state_name()
        self._gate = Gate()
        self._writing: asyncio.Task[StateInfo] | None = None

    @classmethod
    async def ready(cls, partition: Partition, say: Say) -> LiveMemory:
        """All that can be done while the guest runs. Raises: as `ready_to_write`."""
        return cls(partition, await ready_to_write(partition), say)

    @property
    def _machine(self) -> Machine:
        machine = self._partition.runtime.machine
        assert machine is not None, "the lock is held since it was made ready"
        return machine

    async def prepare(self) -> None:
        """Begin to write, up to where the guest has to be paused; it runs meanwhile.

        Raises: what `Machine.write_state` raises; no file is left then.
        """
        path = f"{self._partition.runtime.paths.data}/{self._name}"
        self._say("touching the guest's memory")
        self._writing = asyncio.create_task(
            self._machine.write_state(path, self._about, live=True, gate=self._gate, on_progress=self._tell),
            name=f"memory of {path}",
        )
        touching = asyncio.create_task(self._wait_held())
        try:
            await asyncio.wait((touching, self._writing), return_when=asyncio.FIRST_COMPLETED)
            if self._writing.done():
                await self._writing
            await touching
        finally:
            touching.cancel()
            await asyncio.gather(touching, return_exceptions=True)

    async def _wait_held(self) -> None:
        while not await is_held(self._machine):
            await asyncio.sleep(_POLL_S)
        await wait_touched(self._machine, self._about.definition.memory_bytes)

    async def check_held(self) -> None:
        """The guest is paused now: has QEMU done nothing yet that belongs to the instant?

        Raises: OperationFailedError: its devices would be of another instant than the disks.
        """
        if not await is_held(self._machine):
            raise OperationFailedError(
                f"QEMU did not wait with the memory of {self._partition.name}", remedy="Make the checkpoint again."
            )

    async def begin(self) -> None:
        """Write the memory of a guest that is paused; it runs when this returns.

        Raises: what `Machine.write_state` raises; DeadlineError. The guest is as it was then, and no file is left.
        """
        assert self._writing is not None, "prepared before"
        self._gate.open()
        begun_s = time.monotonic()
        while not self._writing.done():
            if (await self._machine.state()).run_state == "running":
                return
            if time.monotonic() - begun_s > _RESUME_S:
                await self.give_up()
                raise DeadlineError(f"QEMU did not let the guest of {self._partition.name} go on")
            await asyncio.sleep(_POLL_S)
        await self._writing

    def _tell(self, part: float) -> None:
        self._say(f"writing memory while the guest runs: {part:.0%}")

    async def finish(self) -> SavedState:
        """The state, durable, in the partition's folder. Raises: what `Machine.write_state` raises; no file is left."""
        assert self._writing is not None, "begun before it is finished"
        try:
            info = await self._writing
        except asyncio.CancelledError:
            await self.give_up()
            raise
        return as_saved(self._partition, self._name, self._about, info)

    async def give_up(self) -> None:
        """End the writing, if it goes on; the guest goes on, and no file is left."""
        if self._writing is None:
            return
        self._writing.cancel()
        with contextlib.suppress(asyncio.CancelledError, MullionError, OSError):
            info = await self._writing
            await asyncio.to_thread(remove_state, info.path)
