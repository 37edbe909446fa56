"""Disks that cannot go on: no space left, or I/O errors; and when it is time to let the guest try again.

Who holds the request that failed: a vhost-user ring's provider keeps it in the ring and says `no_space`; over NBD, QEMU
keeps it and stops the guest (`werror=stop`). Either way the guest is paused meanwhile, and the request is repeated
when it is let go on: QEMU's `cont` repeats its own, and starts the rings of a provider again.

    something failed ─► stalled: the plan pauses the guest ─► room was made, or 10 s have passed ─► retry is due:
    the plan resumes the guest ─► `resumed` ─► it failed again, or not

Not handled: quotas, of which statvfs(3) knows nothing: their end is found by the retry every 10 s.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mullion.base.errors import MullionError
from mullion.base.units import MIB

log = logging.getLogger(__name__)

_NO_SPACE: Final = "no space left"
_POLL_S: Final = 0.5
_ROOM_BYTES: Final = 16 * MIB
_RETRY_S: Final = 10.0
_VERDICT_S: Final = 1.0
"""So long after a retry a provider is asked whether it still lacks space: it tells only once."""


@dataclass(frozen=True, slots=True)
class Stall:
    """Why a disk cannot go on. `by_provider`: the provider holds the request; otherwise QEMU does."""

    reason: str
    lacks_space: bool = False
    by_provider: bool = False


@dataclass(slots=True)
class Stalls:
    """The disks of one partition that cannot go on, by id; "" stands for one that QEMU does not name.

    `run` starts a task that ends with the partition's runtime; `wake` has the partition planned anew; `is_guest_there`
    says whether there is still a guest to let go on; `tops` are the files that need room.
    """

    name: str
    run: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
    wake: Callable[[], None]
    is_guest_there: Callable[[], bool]
    tops: Callable[[], Sequence[str]]
    found: dict[str, Stall] = field(default_factory=dict)
    is_retry_due: bool = False
    _retry_task: asyncio.Task[None] | None = None
    _pause_s: float = 0.0
    _retried_at_s: float = 0.0

    @property
    def hold_guest(self) -> bool:
        """Whether the guest has to wait."""
        return bool(self.found) and not self.is_retry_due

    def clear(self) -> None:
        """The guest, or the provider that had told, is gone."""
        self.found.clear()
        self.is_retry_due = False

    def note_status(self, status: Mapping[str, Any]) -> None:
        """What a provider's `status` says of its disks."""
        for disk in status.get("disks", ()):
            if disk.get("state") == "no_space":
                self.note_provider(disk["id"], disk)

    def note_provider(self, disk_id: str, said: Mapping[str, Any]) -> None:
        """A provider holds a write until there is room. It says so once, and cannot repeat it in a stopped guest."""
        reason = str(said.get("reason") or "")
        if reason in ("", os.strerror(errno.ENOSPC)):
            reason = _NO_SPACE
        self._note({disk_id: Stall(reason, lacks_space=True, by_provider=True)})
        self.wake()

    def forget(self, disk_id: str) -> None:
        """The provider says that the write has gone through."""
        self.found.pop(disk_id, None)

    async def note_qemu(self, query_block: Callable[[], Awaitable[object]]) -> None:
        """QEMU has stopped the guest because requests of a disk failed.

        The state survives us: a parent that adopts such a guest finds it in `query-block` again.
        """
        if any(not stall.by_provider for stall in self.found.values()):
            return
        blocks = await query_block()
        found = {}
        for block in blocks if isinstance(blocks, list) else ():
            status = block.get("io-status")
            if status in ("nospace", "failed"):
                disk_id = str(block.get("qdev", "")).rpartition("/peripheral/disk-")[2].partition("/")[0]
                lacks_space = status == "nospace"
                found[disk_id] = Stall(_NO_SPACE if lacks_space else "I/O error", lacks_space)
        self._note(found or {"": Stall("I/O error")})

    def resumed(self, ask_provider: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
        """The guest goes on, and with it the requests that waited; `ask_provider` gives its `status` a little later."""
        self.is_retry_due = False
        if not self.found:
            return
        self._retried_at_s = time.monotonic()
        if any(stall.by_provider for stall in self.found.values()):
            self.run(self._ask(ask_provider), "provider's verdict")
        self.found.clear()

    async def _ask(self, ask_provider: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
        await asyncio.sleep(_VERDICT_S)
        try:
            self.note_status(await ask_provider())
        except MullionError as error:  # it has died: the next one is asked when it is connected
            log.info("%s: %s", self.name, error)

    def _note(self, found: Mapping[str, Stall]) -> None:
        self.found |= found
        if self._retry_task is None or self._retry_task.done():
            self.is_retry_due = False
            self._retry_task = self.run(self._retry(), "retry of failed I/O")

    async def _retry(self) -> None:
        """Have the guest go on when there is room again, and every now and then in any case.

        The plan does it, so that a guest that an administrator has paused meanwhile stays paused.
        """
        is_again = time.monotonic() - self._retried_at_s < 2 * _RETRY_S
        self._pause_s = min(2 * self._pause_s, _RETRY_S) if is_again else _POLL_S
        while self.found and self.is_guest_there():
            waited_s = 0.0
            while waited_s < _RETRY_S and not (waited_s >= self._pause_s and self._has_room()):
                await asyncio.sleep(_POLL_S)
                waited_s += _POLL_S
            if self.found:
                self.is_retry_due = True
                self.wake()

    def _has_room(self) -> bool:
        """Whether what is waited for is space, and every writable disk's filesystem has some for a few new blocks."""
        if not all(stall.lacks_space for stall in self.found.values()):
            return False
        try:
            return all(st.f_bavail * st.f_frsize >= _ROOM_BYTES for st in map(os.statvfs, self.tops()))
        except OSError as error:
            log.warning("%s: %s", self.name, error)
            return False
