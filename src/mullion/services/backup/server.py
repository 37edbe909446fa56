"""The disks of a backup by NBD, read-only, for the provider of a partition that is being restored while it runs.

One process a partition; nobody's child in the end: the service may die, the guest reads on, and the next service finds
it by its identity. It ends when it is told to, and when its sockets are gone: then so is the partition's run.

A storage that cannot be reached any more, does not let us in any more, or has no repository any more (another one is
mounted there) ends it at once, without a word to whoever waits: the provider asks again until a server answers, and the
service starts another. Only what the repository itself says (a chunk is damaged) is an error to the guest.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, Final

from mullion.base.block import Buffer, Extent, WritableBuffer
from mullion.base.errors import MullionError
from mullion.base.files import replace_file
from mullion.base.listener import bind_listener
from mullion.base.process import ProcessIdentity
from mullion.repository import Repository
from mullion.repository.disk import BackupDisk
from mullion.repository.errors import RepositoryDamagedError, TargetDeniedError, TargetFullError
from mullion.wire.nbd import NbdExport

log = logging.getLogger(__name__)

_WATCH_S: Final = 1.0
_LOST_STATUS: Final = 3


class ServedDisk:
    """A backup's disk whose errors are those of its content; those of the way to it end this process."""

    read_only = True

    def __init__(self, disk: BackupDisk, repository: Repository) -> None:
        self._disk = disk
        self._repository = repository
        self.size_bytes = disk.size_bytes

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        try:
            self._disk.pread(offset, buffer)
        except MullionError as error:
            raise self._judged(error, offset, len(memoryview(buffer))) from error

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        try:
            yield from self._disk.extents(offset, length)
        except MullionError as error:
            raise self._judged(error, offset, length) from error

    def _judged(self, error: MullionError, offset: int, length: int) -> OSError:
        """What whoever asked is told; no return where it is only the way to the backup that is lost."""
        if not isinstance(error, RepositoryDamagedError) or not self._repository.is_there():
            log.error("the backup cannot be read any more: %s", error)
            os._exit(_LOST_STATUS)
        log.error("bytes %d to %d of the backup: %s", offset, offset + length, error)
        return OSError(errno.EIO, str(error))

    def pwrite(self, offset: int, buffer: Buffer) -> None:
        self._disk.pwrite(offset, buffer)

    def discard(self, offset: int, length: int) -> None:
        self._disk.discard(offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        self._disk.write_zeroes(offset, length)

    def flush(self) -> None:
        self._disk.flush()

    def close(self) -> None:
        self._disk.close()


@contextlib.contextmanager
def held(repository: Repository, purpose: str) -> Iterator[None]:
    """A lease for as long as something is read that a prune must not take away; a place that is read-only has none."""
    try:
        lease = repository.lease(purpose)
    except (TargetDeniedError, TargetFullError) as error:
        log.warning("%s: read without a lease: %s", repository.location, error)
        yield
        return
    with lease:
        yield


def serve(repository: Repository, request: Mapping[str, Any], ready: Callable[[], None]) -> None:
    """Serve the disks of a backup until SIGTERM, or until the sockets are gone.

    Raises: NotFoundError; what the repository raises; AlreadyExistsError when somebody listens there.
    """
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: ending.set())
    manifest = repository.backup(request["backup"])
    sockets: dict[str, str] = request["disks"]
    with ExitStack() as stack:
        for disk, path in sockets.items():
            device = ServedDisk(repository.open_disk(manifest, disk), repository)
            stack.callback(device.close)
            listener = bind_listener(path, uid=request["uid"], gid=request["gid"])
            export = NbdExport(path, device, name=disk, read_only=True, listener=listener)
            export.start()
            stack.callback(export.stop)
        replace_file(request["identity"], str(ProcessIdentity.of(os.getpid())).encode(), durable=False)
        ready()
        while not ending.wait(_WATCH_S):
            if not all(map(os.path.exists, sockets.values())):
                log.info("the sockets are gone: so is who used them")
                break
