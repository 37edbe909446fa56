"""A foreign disk, served by a confined `qemu-nbd` to this process alone.

The image is opened here and handed over by descriptor; the format is always named, never probed; backing files are
switched off; nothing else can be opened, since the process is shut in (`jail`). It reads through NBD on a unix socket
whose name is gone as soon as we are connected, ends when we disconnect, and dies with us.

A VHDX whose log must be replayed is opened over a QCOW2 overlay in a nameless temporary file: what the replay writes
goes there, and the image stays as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from typing import Final

from mullion.base.block import Extent, WritableBuffer
from mullion.base.errors import DeadlineError, MullionError, UnavailableError
from mullion.base.process import Spawned, attach, find_program, run, wait_or_kill
from mullion.base.units import MIB
from mullion.media.confined import jail
from mullion.media.errors import ForeignDiskError
from mullion.media.headers import Source
from mullion.media.vhdx import has_log
from mullion.media.windows import ReadOnlyDevice
from mullion.wire.nbd.client import NbdClient
from mullion.wire.nbd.messages import NbdProtocolError

MEMORY_BYTES: Final = 2048 * MIB
"""Address space, not memory: the libraries and the stacks of the threads take a few hundred MiB of it."""
CPU_S: Final = 3600
REPLAY_LIMIT_BYTES: Final = 1024 * MIB
"""How long the overlay may become that takes what the replay of a log writes."""
_DEADLINE_S: Final = 60.0
_STOP_S: Final = 5.0
_SAID_LIMIT_BYTES: Final = 4000
_HAS_BACKING: Final = ("qcow", "qcow2", "qed", "vmdk")

Node = dict[str, object]


def plan_node(kind: str, offset: int, length: int, *, whole: bool, overlay: bool) -> Node:
    """QEMU's description of the disk: descriptor 10 is the image (a window of it unless `whole`), 11 the overlay."""
    node: Node = {"driver": "file", "filename": f"/proc/self/fd/{jail.FIRST_FILE}", "read-only": True}
    if not whole:
        node = {"driver": "raw", "offset": offset, "size": length, "read-only": True, "file": node}
    if overlay:
        store = {"driver": "file", "filename": f"/proc/self/fd/{jail.FIRST_FILE + 1}"}
        backing = {"driver": "raw", "read-only": True, "file": node}
        node = {"driver": "qcow2", "file": store, "backing": backing}
    node = {"driver": kind, "file": node}
    if kind in _HAS_BACKING:
        node["backing"] = None
    return node


def plan_command(node: Node, *, read_only: bool) -> tuple[str, ...]:
    """The command line of the server; it listens on the descriptor that it was given."""
    mode = ("--read-only",) if read_only else ()
    return ("qemu-nbd", *mode, "--shared=1", f"json:{json.dumps(node)}")


class ServedDisk(ReadOnlyDevice):
    """A disk that a `qemu-nbd` of ours reads; its end is one error with what it said last."""

    def __init__(self, client: NbdClient, server: Spawned, source: Source) -> None:
        super().__init__(source.path, client.size_bytes)
        self._client = client
        self._server = server
        self._source = source

    def pread(self, offset: int, buffer: WritableBuffer) -> None:
        self._check_range(offset, len(memoryview(buffer).cast("B")))
        try:
            self._client.pread(offset, buffer)
        except (UnavailableError, DeadlineError, NbdProtocolError, OSError) as error:
            raise self._fault(f"byte {offset} of its content cannot be read", error) from error

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self._check_range(offset, length)
        try:
            yield from self._client.extents(offset, length)
        except (UnavailableError, DeadlineError, NbdProtocolError, OSError) as error:
            raise self._fault("what it has allocated cannot be read", error) from error

    def _fault(self, what: str, error: Exception) -> MullionError:
        why = said(self._server, self._source) if not isinstance(error, OSError) else str(error.strerror)
        return ForeignDiskError(f"{self._source.path}: {what}: {why or error}", path=self._source.path)

    def close(self) -> None:
        with contextlib.suppress(MullionError, OSError):
            self._client.close()


@contextlib.contextmanager
def served(source: Source, kind: str) -> Iterator[ServedDisk]:
    """Have a confined QEMU read an open image as that format, which was checked before (`headers.check_header`).

    Raises: MissingToolError; ForeignDiskError with QEMU's own words when it cannot be opened.
    """
    find_program("qemu-nbd")
    with contextlib.ExitStack() as stack:
        files = [source.fd]
        overlay = kind == "vhdx" and has_log(source)
        if overlay:
            files.append(stack.enter_context(_overlay(source.length)))
        whole = source.offset == 0 and source.length == os.fstat(source.fd).st_size
        node = plan_node(kind, source.offset, source.length, whole=whole, overlay=overlay)
        limits = jail.Limits(MEMORY_BYTES, CPU_S, REPLAY_LIMIT_BYTES if overlay else 0)
        yield stack.enter_context(_connected(plan_command(node, read_only=not overlay), limits, files, source))


@contextlib.contextmanager
def _connected(argv: Sequence[str], limits: jail.Limits, files: Sequence[int], source: Source) -> Iterator[ServedDisk]:
    """Start the server on a socket that listens already, so that there is nothing to wait for, and connect."""
    folder = tempfile.mkdtemp(prefix="mullion-")
    server: Spawned | None = None
    client: NbdClient | None = None
    try:
        path = os.path.join(folder, "nbd")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen(1)
            line = jail.command(argv, limits=limits, listen_fd=listener.fileno(), files=files)
            server = attach(line, pass_fds=(listener.fileno(), *files))
        try:
            client = NbdClient(path, read_only=True, timeout_s=_DEADLINE_S)
        except (UnavailableError, DeadlineError, NbdProtocolError) as error:
            why = said(server, source) or error.message
            raise ForeignDiskError(f"{source.path}: QEMU cannot open it: {why}", path=source.path) from error
        shutil.rmtree(folder, ignore_errors=True)
        yield ServedDisk(client, server, source)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if client is not None:
            with contextlib.suppress(MullionError, OSError):
                client.close()
        if server is not None:
            wait_or_kill(server, _STOP_S)
            if server.stderr is not None:
                server.stderr.close()


@contextlib.contextmanager
def _overlay(size_bytes: int) -> Iterator[int]:
    """An empty QCOW2 of that size in a file without a name."""
    folder = tempfile.mkdtemp(prefix="mullion-")
    try:
        path = os.path.join(folder, "overlay")
        run(("qemu-img", "create", "-q", "-f", "qcow2", path, str(-(-size_bytes // 512) * 512)))
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        if os.geteuid() == 0:
            os.fchown(fd, jail.NOBODY, jail.NOBODY)
        yield fd
    finally:
        os.close(fd)


def said(server: Spawned, source: Source) -> str:
    """Why the server ended, in its own words or by its signal; paths of descriptors are the image's."""
    status = wait_or_kill(server, _STOP_S)
    if status == -signal.SIGXCPU:
        return f"QEMU used up its {CPU_S} s of processor time"
    if status < 0:
        return f"QEMU did not answer, or was ended by signal {-status}"
    if server.stderr is None or server.stderr.closed:
        return ""
    text = server.stderr.read(_SAID_LIMIT_BYTES).decode(errors="replace").strip()
    text = text.replace(f"/proc/self/fd/{jail.FIRST_FILE}", os.path.basename(source.path))
    # Its message begins with the whole description of the node; the last part says why.
    return text.rpartition("}': ")[2].replace("\n", " ")
