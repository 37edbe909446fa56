"""A disk file as an NBD export on a unix socket, for any program that speaks NBD.

Invariants: the disk is open and locked, as a reader or as its one writer, for as long as the socket is there; a foreign
format is only read; the socket is for our own user (0600) and gone in the end.
Durability: as NBD says. What a client flushed is on the storage; the end flushes the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from mullion.base.errors import DeniedError, InvalidError, NotFoundError
from mullion.media.source import OpenSource, open_disk
from mullion.vhd.geometry import SizeFrom
from mullion.wire.nbd import Counters, NbdExport

MAX_CLIENTS: Final = 256
"""Connections at once, unless the caller says otherwise: a thread and at most 34 MiB each."""
NAME_LIMIT_BYTES: Final = 255


@dataclass(frozen=True, slots=True)
class ServedDisk:
    """A disk that is being served."""

    uri: str
    """As nbdinfo, nbdcopy, qemu-img and libvirt take it."""
    socket_path: str
    size_bytes: int
    read_only: bool
    warnings: tuple[str, ...]
    """What is odd about the disk file, in words."""
    counters: Callable[[], Counters]


@contextmanager
def serve_disk(
    path: str,
    socket_path: str,
    *,
    writable: bool = False,
    name: str = "",
    allowed_dirs: Sequence[str] | None = None,
    max_clients: int = MAX_CLIENTS,
    size_from: SizeFrom = SizeFrom.FOOTER,
) -> Iterator[ServedDisk]:
    """Serve a disk while the block runs, under `name` and under NBD's default, the empty name.

    Clients may connect from before the block begins. At its end what they asked for is finished, every connection is
    closed, the socket removed and the disk flushed and closed.

    Raises: what `open_disk` raises; AlreadyExistsError when somebody listens on the socket; InvalidError, NotFoundError
    and DeniedError for a socket that cannot be made; DeadlineError when the storage hangs at the end; OSError when the
    last flush fails.
    """
    if len(name.encode()) > NAME_LIMIT_BYTES or not name.isprintable():
        raise InvalidError(
            f"an export cannot be called {name!r}",
            remedy=f"Choose a printable name of at most {NAME_LIMIT_BYTES} bytes.",
        )
    with open_disk(
        path, writable=writable, purpose="vhd serve", allowed_dirs=allowed_dirs, size_from=size_from
    ) as source:
        export = NbdExport(socket_path, source.device, name=name, read_only=not writable, max_connections=max_clients)
        _start(export, socket_path)
        try:
            yield _describe(source, export, name)
        finally:
            export.stop()


def _start(export: NbdExport, socket_path: str) -> None:
    try:
        export.start()
    except FileNotFoundError as error:
        folder = os.path.dirname(socket_path) or "."
        raise NotFoundError(
            f"there is no folder {folder} for the socket", remedy="Make the folder first.", path=socket_path
        ) from error
    except (PermissionError, NotADirectoryError) as error:
        raise DeniedError(
            f"the socket {socket_path} cannot be made: {error.strerror}",
            remedy="Choose a path in a folder that you may write to.",
            path=socket_path,
        ) from error


def _describe(source: OpenSource, export: NbdExport, name: str) -> ServedDisk:
    device = source.device
    absolute = os.path.abspath(export.path)
    uri = f"nbd+unix:///{quote(name, safe='')}?socket={quote(os.fsencode(absolute), safe='/')}"
    warnings = tuple(source.warnings)
    return ServedDisk(uri, absolute, device.size_bytes, device.read_only, warnings, lambda: export.counters)
