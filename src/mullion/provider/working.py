"""What a provider and the processes beside it, merge workers and exporters, have in common: start, end and manners.

A zygote forks them. Each opens what it needs with the rights it was given, says that it is ready in one JSON line
(`{"ready": true, "pid": n}` and more, or `{"error": {…}, "pid": n}`), and ends on SIGTERM or `quit`, which both write
to its `quit_fd`. ^C at the parent's terminal is not for them.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from mullion.base.errors import MullionError, OperationFailedError
from mullion.provider.startup import report, set_process_name

log = logging.getLogger(__name__)

_NICE: Final = 10
_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30}
"""Number of the system call ioprio_set(2), which neither `os` nor the C library has."""
_IOPRIO_LOWEST: Final = 2 << 13 | 7  # class best effort, the lowest of its levels; linux/ioprio.h


class Work(Protocol):
    """What such a process does."""

    quit_fd: int
    """Whoever writes a byte to it ends the work."""

    def open(self) -> None:
        """Open, lock, bind, drop privileges, and begin. Raises: MullionError, OSError."""


class WorkSpec(Protocol):
    """What every specification says."""

    @property
    def partition(self) -> str: ...

    @property
    def log(self) -> str: ...


def begin_work(
    work: Work,
    spec: WorkSpec,
    *,
    what: str,
    process_name: str,
    report_fd: int,
    about: Callable[[], Mapping[str, object]] = dict,
) -> bool:
    """Begin, and say so on `report_fd`, with what `about` adds; False, when that has said why it is impossible."""
    set_process_name(process_name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The interpreter writes the byte itself, at once: a handler in Python may run only when epoll has returned.
    signal.set_wakeup_fd(work.quit_fd, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    try:
        work.open()
    except (MullionError, OSError) as error:
        failure = error
        if not isinstance(failure, MullionError):
            failure = OperationFailedError(f"the {what} cannot start: {error}", remedy=f"See {spec.log}.")
        log.error("%s: %s", spec.partition, failure)
        report(report_fd, {"error": failure.to_wire(), "pid": os.getpid()})
        return False
    report(report_fd, {"ready": True, "pid": os.getpid(), **about()})
    return True


def yield_to_others() -> None:
    """Let this process and its threads have processors and disks only where nobody else wants them much."""
    os.nice(_NICE)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        import ctypes  # here, because the zygote imports this module and every provider would pay for it

        # Best effort: not all schedulers of disks know priorities, and a sandbox may forbid the call.
        ctypes.CDLL(None).syscall(number, 1, 0, _IOPRIO_LOWEST)


def fields_by_hand() -> dict[str, object]:
    """The specification of a process that somebody starts by hand, in the foreground: `python -m … SPEC.json`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with open(sys.argv[1], encoding="utf-8") as file:
        fields: dict[str, object] = json.load(file)
    return fields
