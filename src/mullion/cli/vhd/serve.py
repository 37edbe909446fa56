"""`mullion vhd serve`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from typing import TYPE_CHECKING, Final

import click

from mullion.base.units import format_size
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command
from mullion.cli.vhd.options import DISK, allow_option, allowed_dirs, size_from_option

if TYPE_CHECKING:
    from mullion.media.serve import ServedDisk

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command("serve", cls=Command, short_help="Serve a disk to other programs as NBD, on a unix socket.")
@click.argument("path", type=DISK)
@click.option(
    "--socket", "socket_path", metavar="SOCKET", required=True, type=DISK, help="Where to listen; for your user only."
)
@click.option(
    "--writable/--read-only", default=False, help="Let clients write, or only read (default). A disk has one writer."
)
@click.option("--export", "name", metavar="NAME", default="", help="The export's name; the empty one always works.")
@click.option(
    "--max-clients",
    type=click.IntRange(1, 10_000),
    metavar="N",
    default=256,
    show_default=True,
    help="Connections at once; whoever comes after that is hung up on.",
)
@size_from_option
@allow_option
@pass_face
def serve(
    face: Face,
    *,
    path: str,
    socket_path: str,
    writable: bool,
    name: str,
    max_clients: int,
    size_source: str,
    allow: tuple[str, ...],
) -> None:
    """Serve a disk to other programs as NBD, on a unix socket.

    It stays in the foreground until ^C or SIGTERM: then requests that have come are answered, the disk is flushed and
    the socket removed. Any number of clients may be connected; the socket is there when the address is printed.

    \b
    Examples:
      mullion vhd serve child.vhd --socket child.sock
      mullion vhd serve base.vhd --socket base.sock --writable --export system
    """
    from mullion.base import log
    from mullion.media.serve import serve_disk
    from mullion.vhd.geometry import SizeFrom

    log.set_up("warning")
    # Blocked from before the socket is there: a signal waits until it is asked for, and no thread of ours gets it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        with serve_disk(
            path,
            socket_path,
            writable=writable,
            name=name,
            allowed_dirs=allowed_dirs(path, allow),
            max_clients=max_clients,
            size_from=SizeFrom(size_source),
        ) as served:
            _announce(face, path, served)
            signal.sigwait(_ENDING)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    counters = served.counters()
    face.note(f"ended: {format_size(counters.bytes_read)} read, {format_size(counters.bytes_written)} written")


def _announce(face: Face, path: str, served: ServedDisk) -> None:
    """Say that the disk can be used now, and how."""
    for warning in served.warnings:
        face.note(f"note: {warning}")
    if face.is_json:
        face.emit_json_line(
            {
                "uri": served.uri,
                "socket": served.socket_path,
                "size_bytes": served.size_bytes,
                "read_only": served.read_only,
                "pid": os.getpid(),
            }
        )
    else:
        face.say(served.uri)
        mode = "read-only" if served.read_only else "for reading and writing"
        uri = shlex.quote(served.uri)
        face.note(
            f"{path} is served {mode}, {format_size(served.size_bytes)}. For example:\n"
            f"  nbdinfo {uri}\n  nbdcopy {uri} disk.raw\n  qemu-img convert -f raw -O qcow2 {uri} disk.qcow2\n"
            "^C ends it."
        )
    sys.stdout.flush()
