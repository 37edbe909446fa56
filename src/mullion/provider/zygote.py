"""The zygote: a process that has imported everything and forks providers from itself.

A fork shares what was imported, so that a provider costs about 2 MB of its own and starts in milliseconds. Spoken over
an inherited socket pair, one JSON object a line:

| direction | message |
|---|---|
| parent → zygote | `{"id": any, "spawn": specification}` (`mullion.provider.spec`): a provider |
| parent → zygote | `{"id": any, "merge": specification}` (`mullion.provider.merge_spec`): a merge worker |
| parent → zygote | `{"id": any, "export": specification}` (`mullion.provider.export_spec`): an exporter |
| zygote → parent | `{"id": any, "pid": n, "ready": true, "disks": […]}` |
| zygote → parent | `{"id": any, "pid": n or null, "error": {…}}` |
| zygote → parent | `{"exited": pid, "status": n}`, n negative for a signal |

Several spawns may be in flight; the answer to each comes before the end of its process. The zygote ends when the
parent's end closes; its children have sessions of their own and stay.
Invariants: single-threaded, so that forking is safe; nobody from here on can gain privileges by running a program
(PR_SET_NO_NEW_PRIVS, set once and inherited).
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Final, NoReturn

from mullion.base.errors import MullionError, OperationFailedError, UnavailableError
from mullion.base.files import raise_descriptor_limit, rotate_log
from mullion.provider.control_client import LineDecoder, encode
from mullion.provider.export_spec import ExportSpec
from mullion.provider.exporter import run_export
from mullion.provider.main import run
from mullion.provider.merge_spec import MergeSpec
from mullion.provider.merger import run_merge
from mullion.provider.rehearsal import rehearse
from mullion.provider.spec import ProviderSpec
from mullion.provider.startup import set_process_name

log = logging.getLogger(__name__)

Spec = ProviderSpec | MergeSpec | ExportSpec

LINE_LIMIT_BYTES: Final = 16 * 1024 * 1024
"""Room for the paths of three of the longest chains; only the parent speaks here."""
_PROCESS_NAME: Final = "mullion-zygote"
_PR_SET_NO_NEW_PRIVS: Final = 38  # linux/prctl.h
_RESTARTED: Final = "MULLION_ZYGOTE_RESTARTED"
_LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(message)s"


def spawn_argv(fd: int) -> tuple[str, ...]:
    """The command line of a zygote that serves an inherited socket."""
    return (sys.executable, "-m", "mullion.provider.zygote", "--socket-fd", str(fd))


class Zygote:
    """Forks providers on request."""

    def __init__(self, parent: socket.socket) -> None:
        self._parent = parent
        self._decoder = LineDecoder(LINE_LIMIT_BYTES)
        self._epoll = select.epoll()
        self._epoll.register(parent.fileno(), select.EPOLLIN)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._wake_read, select.EPOLLIN)
        # Report pipe → (request, pid, what was read) of the providers that are not ready yet.
        self._starting: dict[int, tuple[object, int, bytearray]] = {}

    def run(self) -> None:
        """Serve until the parent's end closes."""
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        while True:
            for fd, _events in self._epoll.poll():
                if fd == self._parent.fileno():
                    data = self._parent.recv(64 * 1024)
                    if not data:
                        return
                    for message in self._decoder.feed(data):
                        self._spawn(message)
                elif fd == self._wake_read:
                    with suppress(BlockingIOError):
                        os.read(fd, 4096)
                    self._reap()
                elif fd in self._starting:
                    self._read_report(fd)

    def _spawn(self, message: Mapping[str, object]) -> None:
        request = message.get("id")
        try:
            spec = _read_spec(message)
            log_fd = _open_log(spec.log)
        except MullionError as error:
            self._tell({"id": request, "pid": None, "error": error.to_wire()})
            return
        report_read, report_write = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
        except OSError as error:
            for fd in (report_read, report_write, log_fd):
                os.close(fd)
            failure = UnavailableError(f"no process can be made: {error.strerror}", remedy="Free memory or processes.")
            self._tell({"id": request, "pid": None, "error": failure.to_wire()})
            return
        if pid == 0:
            self._become_provider(spec, log_fd, report_write, report_read)
        # The zygote writes this line, because the first use of `logging` is 0.3 MB of private memory.
        os.write(
            log_fd,
            f"{time.strftime('%Y-%m-%d %H:%M:%S')} INFO {spec.partition}: {_kind_of(spec)} {pid} starts\n".encode(),
        )
        os.close(report_write)
        os.close(log_fd)
        self._starting[report_read] = (request, pid, bytearray())
        self._epoll.register(report_read, select.EPOLLIN)

    def _become_provider(self, spec: Spec, log_fd: int, report_fd: int, other_end: int) -> NoReturn:
        """In the child: leave everything of the zygote's behind, and never come back into its loop."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            for fd in (other_end, self._wake_read, self._wake_write, *self._starting):
                os.close(fd)
            self._epoll.close()
            self._parent.close()
            os.dup2(log_fd, 1)
            os.dup2(log_fd, 2)
            os.close(log_fd)
            status = _be(spec, report_fd)
        except BaseException:
            log.exception("%s: the %s failed", spec.partition, _kind_of(spec))
        finally:
            logging.shutdown()
            os._exit(status)

    def _read_report(self, fd: int) -> None:
        request, pid, text = self._starting[fd]
        data = os.read(fd, 64 * 1024)
        text += data
        if data and not text.endswith(b"\n"):
            return
        self._epoll.unregister(fd)
        os.close(fd)
        del self._starting[fd]
        if text:
            self._tell({"id": request} | LineDecoder(LINE_LIMIT_BYTES).feed(bytes(text))[0])
        else:
            failure = OperationFailedError("the provider died while it started", remedy="Read the provider's log.")
            self._tell({"id": request, "pid": pid, "error": failure.to_wire()})

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for fd, (_request, starting, _text) in tuple(self._starting.items()):
                while starting == pid and fd in self._starting:  # the answer comes before the end
                    self._read_report(fd)
            self._tell({"exited": pid, "status": os.waitstatus_to_exitcode(status)})

    def _tell(self, message: Mapping[str, object]) -> None:
        with suppress(BrokenPipeError):  # the parent is gone: the next read says so
            self._parent.sendall(encode(message))


def _read_spec(message: Mapping[str, object]) -> Spec:
    """Raises: OperationFailedError; InvalidError that names the field."""
    match message:
        case {"spawn": dict(fields)}:
            return ProviderSpec.from_fields(fields)
        case {"merge": dict(fields)}:
            return MergeSpec.from_fields(fields)
        case {"export": dict(fields)}:
            return ExportSpec.from_fields(fields)
    raise OperationFailedError("a message without `spawn`", remedy="Send {id, spawn: specification}.")


def _be(spec: Spec, report_fd: int) -> int:
    """What the child is from now on; its exit status."""
    match spec:
        case MergeSpec():
            return run_merge(spec, report_fd)
        case ExportSpec():
            return run_export(spec, report_fd)
        case ProviderSpec():
            return run(spec, report_fd)


def _kind_of(spec: Spec) -> str:
    kinds = {MergeSpec: "merge worker", ExportSpec: "exporter", ProviderSpec: "provider"}
    return kinds[type(spec)]


def _open_log(path: str) -> int:
    """The log's descriptor, opened with our rights; the provider, who may have none there, only writes to it."""
    try:
        rotate_log(path)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise OperationFailedError(
            f"the provider's log {path} cannot be opened: {error.strerror}", remedy="Make its folder.", path=path
        ) from error


def _restart_without_privileges_to_gain() -> None:
    """Set PR_SET_NO_NEW_PRIVS, then start over: `ctypes`, needed for it, would cost every provider memory."""
    if os.environ.pop(_RESTARTED, None) is not None:
        return
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    os.environ[_RESTARTED] = "1"
    os.environ["MALLOC_ARENA_MAX"] = "1"  # an arena a thread would be private memory for nothing
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - ourselves, with the same arguments


def main() -> int:
    parser = argparse.ArgumentParser(prog="mullion.provider.zygote")
    parser.add_argument("--socket-fd", type=int, required=True)
    fd = parser.parse_args().socket_fd
    _restart_without_privileges_to_gain()
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, stream=sys.stderr)
    set_process_name(_PROCESS_NAME)
    raise_descriptor_limit()
    rehearse()
    parent = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    gc.collect()
    gc.freeze()
    Zygote(parent).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
