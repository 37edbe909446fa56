"""Leases: who works on a repository, so that nothing is deleted that somebody builds on.

A lease is a sealed object `leases/ID`, put again every minute. Writers and readers hold shared ones, at the same time;
pruning holds an exclusive one. Whoever wants a lease puts it first and looks at the others then: of two that exclude
each other at most one goes on. A lease counts as dead when its process has ended (same boot, same namespace of
processes) or when it was not put again for 15 minutes; dead ones are taken away by whoever meets them.

Who was away for longer (a suspended host) must not publish: `Lease.check` is called before and after.
Not handled: clocks of two hosts that differ by more than 10 minutes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

import msgspec

from mullion.base.errors import MullionError
from mullion.base.process import ProcessIdentity
from mullion.base.units import format_duration
from mullion.repository import sealing
from mullion.repository.backend import Backend, ObjectMissingError, is_name
from mullion.repository.errors import LeaseLostError, RepositoryBusyError, RepositoryDamagedError
from mullion.repository.keys import Keys

log = logging.getLogger(__name__)

FOLDER: Final = "leases"
REFRESH_S: Final = 60.0
EXPIRY_S: Final = 900.0


class Holder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a lease says of who holds it."""

    purpose: str
    exclusive: bool
    host: str
    process: str
    namespace: int
    since_ns: int
    refreshed_ns: int

    @property
    def is_dead(self) -> bool:
        if time.time_ns() - self.refreshed_ns > EXPIRY_S * 1e9:
            return True
        identity = ProcessIdentity.parse(self.process)
        mine = ProcessIdentity.of(os.getpid())
        is_near = identity is not None and mine is not None and identity.boot_id == mine.boot_id
        return is_near and self.namespace == _process_namespace() and identity is not None and not identity.is_alive


class Lease:
    """A lease that is held, and kept fresh by a thread; a context manager."""

    def __init__(self, backend: Backend, keys: Keys, purpose: str, *, exclusive: bool = False) -> None:
        """Take it. Raises: RepositoryBusyError; what the storage raises."""
        self._backend = backend
        self._keys = keys
        self.name = f"{FOLDER}/{uuid.uuid4().hex}"
        now = time.time_ns()
        process = str(ProcessIdentity.of(os.getpid()))
        self._holder = Holder(purpose, exclusive, socket.gethostname(), process, _process_namespace(), now, now)
        self._fresh_s = time.monotonic()
        self._ended = threading.Event()
        self._put()
        try:
            self._look_at_others()
        except BaseException:
            self._backend.delete(self.name)
            raise
        self._keeper = threading.Thread(target=self._keep, name="repository-lease", daemon=True)
        self._keeper.start()

    def check(self) -> None:
        """Raises: LeaseLostError when others may have taken us for dead."""
        if time.monotonic() - self._fresh_s < EXPIRY_S / 2 and self._backend.size(self.name) is not None:
            return
        raise LeaseLostError(
            f"{self._backend.location}: this {self._holder.purpose} did not show itself for too long",
            repository=self._backend.location,
        )

    def release(self) -> None:
        """Give it back; may be called again."""
        if not self._ended.is_set():
            self._ended.set()
            self._keeper.join()
            self._backend.delete(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.release()
            return
        try:
            self.release()
        except MullionError as second:  # the first says what happened; this lease expires by itself
            log.warning("%s: the lease could not be given back: %s", self._backend.location, second)

    def _put(self) -> None:
        self._holder = msgspec.structs.replace(self._holder, refreshed_ns=time.time_ns())
        begun_s = time.monotonic()
        sealed = sealing.seal(sealing.Kind.LEASE, self.name, msgspec.msgpack.encode(self._holder), self._keys)
        self._backend.put(self.name, [sealed], durable=False)
        self._fresh_s = begun_s

    def _keep(self) -> None:
        while not self._ended.wait(REFRESH_S):
            try:
                if self._backend.size(self.name) is None:
                    return  # taken for dead: `check` says so
                self._put()
            except MullionError as error:
                log.warning("%s: the lease could not be renewed: %s", self._backend.location, error)

    def _look_at_others(self) -> None:
        for holder in living_holders(self._backend, self._keys, but=self.name):
            if holder.exclusive or self._holder.exclusive:
                since = format_duration(max(0.0, (time.time_ns() - holder.since_ns) / 1e9))
                raise RepositoryBusyError(
                    f"{self._backend.location}: a {holder.purpose} on {holder.host} has been going on for {since}",
                    repository=self._backend.location,
                    holder=holder.process,
                )


def living_holders(backend: Backend, keys: Keys, *, but: str = "") -> Iterator[Holder]:
    """The leases that count, without one; dead ones are taken away. Raises: what the storage raises."""
    for listed in list(backend.list(FOLDER)):
        if listed.name == but or not is_name(listed.name):
            continue
        try:
            payload = sealing.fetch(sealing.Kind.LEASE, listed.name, backend, keys)
            holder = msgspec.msgpack.decode(payload, type=Holder)
        except ObjectMissingError:
            continue  # given back since
        except (RepositoryDamagedError, msgspec.DecodeError, UnicodeDecodeError):
            # Its holder, if it lives, finds it gone and does not publish: safe, while keeping it would block for ever.
            log.warning("%s: %s is damaged and taken away", backend.location, listed.name)
            backend.delete(listed.name)
            continue
        if holder.is_dead:
            backend.delete(listed.name)
        else:
            yield holder


def _process_namespace() -> int:
    with contextlib.suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0
