"""One exporter: the process that serves a checkpoint's disks, read-only, to whatever program speaks NBD.

It starts with the rights of whoever forked it, opens the frozen files, reads its certificates, binds its sockets, gives
the rights up, and only then parses what guests wrote. It needs nobody: parent and zygote may die, clients go on, and
the next parent finds it by its identity file and its socket.

Each disk is an export of its id, with the contexts `base:allocation` and, when changes are to be told,
`qemu:dirty-bitmap:NAME`: what may differ from the other point, exact to the sector (`vhd.held`).

Ready is one JSON line: `{"ready": true, "pid": n}`, or `{"error": {…}, "pid": n}`, after which it exits with status 1.
Commands (`control_client` has the framing): `status` → partition, pid, uptime_s, unix, host, port, tls, connections,
requests, bytes_read, errors, and of each disk id, size_bytes, bitmap, chain, backing; `quit` → clients are hung up on,
it ends.
Durability: nothing is written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from mullion.base.files import replace_file
from mullion.base.listener import bind_listener, bind_tcp_listener
from mullion.base.process import ProcessIdentity
from mullion.provider.control import Command, ControlServer, close_all
from mullion.provider.export_spec import ExportedDisk, ExportSpec
from mullion.provider.spec import DiskSpec
from mullion.provider.startup import drop_privileges, open_chain_files
from mullion.provider.working import begin_work, fields_by_hand, yield_to_others
from mullion.vhd import Chain
from mullion.vhd.held import ChangedSince
from mullion.wire.nbd import Export, NbdServer, SteadyReader

if TYPE_CHECKING:
    import ssl

log = logging.getLogger(__name__)

PROCESS_NAME: Final = "mullion-export"
MAX_CLIENTS: Final = 64
"""Connections at once, of all disks: a backup program opens several for each."""
_THREAD_STACK_BYTES: Final = 256 * 1024
_PATIENCE_S: Final = 60.0
"""How long a client's read waits for a block that only a backup has."""


class Exporter:
    """The disks of one checkpoint, and what the control socket says about them."""

    def __init__(self, spec: ExportSpec) -> None:
        self._spec = spec
        self._started_s = time.monotonic()
        self._quit_read_fd, self.quit_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._resources = ExitStack()
        self._exports: list[Export] = []
        self._server: NbdServer | None = None
        self._control: ControlServer | None = None
        self._port = spec.port

    def open(self) -> None:
        """Open, bind, drop privileges, load the chains and serve. Raises: MullionError, OSError."""
        spec = self._spec
        with ExitStack() as undo:
            undo.callback(self._unlink)
            files = [(_open(undo, disk.chain), _open(undo, disk.since or ())) for disk in spec.disks]
            tls = _tls_context(spec.tls)
            control = undo.enter_context(bind_listener(spec.control, uid=spec.uid, gid=spec.gid))
            listener = undo.enter_context(self._bind())
            replace_file(spec.identity, str(ProcessIdentity.of(os.getpid())).encode(), durable=False)
            drop_privileges(spec.uid, spec.gid)
            yield_to_others()
            for disk, (chain_fds, since_fds) in zip(spec.disks, files, strict=True):
                self._exports.append(self._load(undo, disk, chain_fds, since_fds))
            self._control = ControlServer(control, {"status": self._status}, self._quit_read_fd)
            self._server = NbdServer(listener, self._exports, max_connections=MAX_CLIENTS, tls=tls)
            self._server.start()
            self._resources = undo.pop_all()

    def _bind(self) -> socket.socket:
        spec = self._spec
        if spec.unix is not None:
            return bind_listener(spec.unix, uid=spec.uid, gid=spec.gid)
        assert spec.host is not None, "checked by the specification"
        listener = bind_tcp_listener(spec.host, spec.port)
        self._port = listener.getsockname()[1]
        return listener

    def _load(self, undo: ExitStack, disk: ExportedDisk, chain_fds: list[int], since_fds: list[int]) -> Export:
        chain = undo.enter_context(_chain(chain_fds, disk.chain))
        if disk.backing is not None:
            chain.backing = SteadyReader(disk.backing, disk.id, patience_s=_PATIENCE_S)
            undo.callback(chain.backing.close)
        bitmaps = {}
        if disk.since is not None and disk.bitmap is not None:
            bitmaps[disk.bitmap] = ChangedSince(chain, undo.enter_context(_chain(since_fds, disk.since)))
        description = f"disk {disk.id} of {self._spec.partition}, read-only"
        return Export(disk.id, chain, read_only=True, bitmaps=bitmaps, description=description)

    def run(self) -> None:
        """Answer the control socket until `quit`, or until a byte is written to `quit_fd`."""
        assert self._control is not None, "opened before it is run"
        self._control.run()

    def close(self) -> None:
        """Hang up, close everything, and remove what leads here. Raises: DeadlineError when the storage hangs."""
        self._unlink()  # first: from now on a client finds nobody, instead of a socket that will not answer
        try:
            if self._server is not None:
                self._server.stop()
        finally:
            if self._control is not None:
                self._control.close()
            self._resources.close()

    def _unlink(self) -> None:
        for path in (self._spec.control, self._spec.unix, self._spec.identity):
            if path is not None:
                with contextlib.suppress(OSError):  # the folder may be the parent's alone
                    os.unlink(path)

    def _status(self, _command: Command) -> Mapping[str, object]:
        assert self._server is not None, "opened before it is asked"
        spec, counters = self._spec, self._server.counters
        return {
            "partition": spec.partition,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started_s, 3),
            "unix": spec.unix,
            "host": spec.host,
            "port": None if spec.host is None else self._port,
            "tls": spec.tls,
            "connections": counters.connections,
            "requests": counters.requests,
            "bytes_read": counters.bytes_read,
            "errors": counters.errors + counters.protocol_errors,
            "disks": [
                {
                    "id": disk.id,
                    "size_bytes": export.device.size_bytes,
                    "bitmap": disk.bitmap,
                    "chain": list(disk.chain),
                    "since": None if disk.since is None else list(disk.since),
                    "backing": disk.backing,
                }
                for disk, export in zip(spec.disks, self._exports, strict=True)
            ],
        }


def _open(undo: ExitStack, paths: tuple[str, ...]) -> list[int]:
    """The files of a chain; who makes a chain of them takes them out of the list."""
    fds = open_chain_files(DiskSpec("export", paths, read_only=True)) if paths else []
    undo.callback(close_all, fds)
    return fds


def _chain(fds: list[int], paths: tuple[str, ...]) -> Chain:
    taken = fds.copy()
    fds.clear()
    return Chain.from_descriptors(taken, paths, read_only=True)


def _tls_context(folder: str | None) -> ssl.SSLContext | None:
    if folder is None:
        return None
    from mullion.wire.nbd.tls import server_context  # here, because every provider would pay for `ssl`

    return server_context(folder)


def run_export(spec: ExportSpec, report_fd: int) -> int:
    """Be an exporter until the end; the exit status. `report_fd` gets the line that says ready or why not."""
    threading.stack_size(_THREAD_STACK_BYTES)
    exporter = Exporter(spec)
    if not begin_work(exporter, spec, what="exporter", process_name=PROCESS_NAME, report_fd=report_fd):
        return 1
    exporter.run()
    log.info("%s: the exporter ends", spec.partition)
    exporter.close()
    return 0


def main() -> int:
    """`python -m mullion.provider.exporter SPEC.json`: an exporter by hand, in the foreground, ready line on stdout."""
    return run_export(ExportSpec.from_fields(fields_by_hand()), os.dup(1))


if __name__ == "__main__":
    sys.exit(main())
