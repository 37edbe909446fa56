"""Starting QEMU under its wrapper: a few lines of shell that outlive us, know QEMU's own pid and keep its exit status.

    parent ── sh (wrapper) ── [setpriv →] qemu         own session; the parent may die, nothing here notices

In this order, so that a crash of the parent at any point leaves either nothing or a machine that can be adopted:

1. the wrapper's child writes its own identity (pid, start time, boot id) to `qemu.pid`, then becomes QEMU by `exec`:
   the file is there before QEMU is, and names QEMU itself, not the wrapper;
2. the wrapper waits; when QEMU has ended it writes the status to `qemu.exit` (whole or not at all), and ends.

Invariants: the wrapper ignores HUP, INT, QUIT and TERM, its child does not; killed with KILL it takes only the exit
status with it, QEMU runs on. The sockets are bound here, before QEMU starts: a connection succeeds at once, no polling,
and QEMU needs no right to write into the run folder. Under `run_as` the folder stays root's: QEMU cannot forge
its identity.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from mullion.base.files import rotate_log
from mullion.base.process import Spawned, boot_id, find_program, spawn
from mullion.hypervisor.accel import kvm_groups
from mullion.hypervisor.cmdline import LISTENER_NAMES, MachineSpec, cmdline, shell_line
from mullion.model.definition import Accelerator

WRAPPER: Final = """\
identity=$1 status=$2 boot=$3
shift 3
trap '' HUP INT QUIT TERM
(
  trap - HUP INT QUIT TERM
  read -r pid a b c d e f g h i j k l m n o p q r s t start rest </proc/self/stat
  printf '%s %s %s\\n' "$pid" "$start" "$boot" >"$identity" || exit 126
  exec "$@"
) &
wait $!
code=$?
printf '%s\\n' "$code" >"$status.new" && mv -f "$status.new" "$status"
"""
"""Spec of the fields: proc(5), /proc/PID/stat: 1 pid, 2 (sh), 22 start time. POSIX sh; the name `sh` has no blanks.
The identity is one short write: a reader finds nothing or all of it. A rename would cost each start a process more.
"""
_LOG_MARK: Final = "mullion: start "
_EXCERPT_BYTES: Final = 4000
_EXCERPT_LINES: Final = 20
_BACKLOG: Final = 16
"""Clients that may wait for a socket: QEMU serves one at a time on each."""


@dataclass(slots=True)
class Launched:
    """A wrapper that we started, and the command line for people."""

    wrapper: Spawned
    command: str


def launch(spec: MachineSpec) -> Launched:
    """Start QEMU, its processors stopped; returns as soon as the wrapper runs.

    Removes what an earlier machine left in the run folder; the caller knows that none is alive.
    Raises: MissingToolError when QEMU is not installed; InvalidError; OSError.
    """
    paths = spec.paths
    program = find_program(spec.qemu)
    command = shell_line(cmdline(spec))
    for folder in (paths.data, paths.run):
        os.makedirs(folder, mode=0o750, exist_ok=True)
    remove_stale(spec)
    _open_logs(spec, command)
    with _listeners(spec) as sockets:
        listeners = {name: listener.fileno() for name, listener in sockets.items()}
        argv = [*_become(spec), program, *cmdline(spec, listeners)[1:]]
        wrapper = spawn(
            ["sh", "-c", WRAPPER, "mullion-qemu", paths.qemu_identity, paths.exit_file, boot_id(), *argv],
            log_path=paths.qemu_log,
            pass_fds=tuple(listeners.values()),
        )
    return Launched(wrapper, command)


def remove_stale(spec: MachineSpec) -> None:
    """Remove the identity, the exit status and the sockets of a machine that has ended."""
    paths = spec.paths
    for path in (paths.qemu_identity, paths.exit_file, *_socket_paths(spec).values()):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def read_exit_status(path: str) -> int | None:
    """What the wrapper recorded, or None when there is nothing."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            text = file.read(20).strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdigit() else None


def log_excerpt(path: str) -> str:
    """The last lines that QEMU wrote since its latest start."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _EXCERPT_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    # Our own mark and the command below it are not QEMU's words.
    latest = re.split(rf"^{_LOG_MARK}.*\n.*\n", text, flags=re.MULTILINE)[-1]
    return "\n".join(latest.strip().splitlines()[-_EXCERPT_LINES:])


def _socket_paths(spec: MachineSpec) -> dict[str, str]:
    paths = spec.paths
    return dict(zip(LISTENER_NAMES, (paths.qmp, paths.qmp_rescue, paths.agent, paths.console), strict=True))


@contextlib.contextmanager
def _listeners(spec: MachineSpec) -> Iterator[dict[str, socket.socket]]:
    """Bound and listening sockets; ours are closed at the end, QEMU has inherited them by then."""
    with contextlib.ExitStack() as stack:
        sockets = {}
        for name, path in _socket_paths(spec).items():
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(path)
            os.chmod(path, 0o600)  # before listen: nobody can connect earlier
            listener.listen(_BACKLOG)
            sockets[name] = listener
        yield sockets


def _become(spec: MachineSpec) -> list[str]:
    """The command that gives up root before QEMU starts (setpriv(1), util-linux)."""
    return drop_rights(
        spec.run_as, (*spec.extra_groups, *(kvm_groups() if spec.accelerator is Accelerator.KVM else ()))
    )


def drop_rights(run_as: tuple[int, int] | None, members: Collection[int] = ()) -> list[str]:
    """What to put before a command so that it runs under this user and group, and can never be more than that."""
    if run_as is None:
        return []
    uid, gid = run_as
    groups = f"--groups={','.join(map(str, sorted(set(members))))}" if members else "--clear-groups"
    return [
        find_program("setpriv"),
        f"--reuid={uid}",
        f"--regid={gid}",
        groups,
        "--no-new-privs",
        "--inh-caps=-all",
        "--bounding-set=-all",
        "--",
    ]


def _open_logs(spec: MachineSpec, command: str) -> None:
    """Make the logs ready: mark the start in QEMU's own, give the console's to the user who writes it."""
    paths = spec.paths
    for path in (paths.qemu_log, paths.console_log):
        rotate_log(path)
    with open(paths.qemu_log, "a", encoding="utf-8") as log:
        log.write(f"{_LOG_MARK}{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n{command}\n")
    os.chmod(paths.qemu_log, 0o640)
    console = os.open(paths.console_log, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    try:
        if spec.run_as is not None:
            os.fchown(console, *spec.run_as)
    finally:
        os.close(console)
