"""The terminal's end of a partition's serial console.

Keys go to the guest as they are, ^C too; Ctrl-] leaves. A serial line knows no window size, so a change of the window's
size needs no action (SIGWINCH is ignored by default). The terminal is put back whatever ends us: the end of the
console, an error, SIGTERM or SIGHUP.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol

from mullion.base.errors import MullionError
from mullion.cli.face import Face

if TYPE_CHECKING:
    from types import FrameType

ESCAPE: Final = b"\x1d"  # Ctrl-]
LINGER_S: Final = 1.0
_READ_BYTES: Final = 4096
_COMMANDS: Final = re.compile(
    rb"\x1b(?:\[[0-9;?<=>!]*[ -/]*[@-ln-~]"  # CSI sequences (ECMA-48 5.4), all but m
    rb"|[\]P^_X][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC, DCS and other strings with their ends
    rb"|[ -/]*[0-Z\\`-~])"  # other escape sequences (ECMA-35 13.2), such as ESC c
)


class ConsoleLink(Protocol):
    """A console at the client: bytes from the guest by iteration, bytes to the guest by `send`."""

    def __iter__(self) -> Iterator[bytes]: ...

    def send(self, data: bytes) -> None: ...

    def close(self) -> None: ...


def attach(face: Face, name: str, *, linger_s: float = LINGER_S) -> None:
    """Connect standard input and output to a partition's console until the user leaves or the console ends.

    Raises: what the service refuses, such as a partition that does not run.
    """
    stdin_fd, stdout_fd = sys.stdin.fileno(), sys.stdout.fileno()
    is_terminal = os.isatty(stdin_fd)
    link = face.client.console(name)
    try:
        if is_terminal:
            face.note(f"Connected to the console of {name}. Leave with Ctrl-] (the partition goes on).")
        with _signals_as_exit(), _raw(stdin_fd) if is_terminal else contextlib.nullcontext():
            ended = Relay(link, stdin_fd, stdout_fd, is_terminal=is_terminal, linger_s=linger_s).run()
    finally:
        link.close()
    if is_terminal:
        face.note(f"\nThe console of {name} has closed." if ended else f"\nLeft the console of {name}; it goes on.")


class Relay:
    """Carries bytes both ways: a thread from the guest, the caller's thread to the guest."""

    def __init__(self, link: ConsoleLink, stdin_fd: int, stdout_fd: int, *, is_terminal: bool, linger_s: float) -> None:
        self._link = link
        self._stdin_fd = stdin_fd
        self._stdout_fd = stdout_fd
        self._is_terminal = is_terminal
        self._linger_s = linger_s
        self._error: MullionError | OSError | None = None

    def run(self) -> bool:
        """True when the console ended, False when the user left or the input ended."""
        wake_read, wake_write = os.pipe()
        reader = threading.Thread(target=self._from_guest, args=(wake_write,), name="console", daemon=True)
        reader.start()
        try:
            ended = self._to_guest(wake_read)
        finally:
            self._link.close()
            reader.join()
            os.close(wake_read)
        if ended and self._error is not None:
            raise self._error
        return ended

    def _from_guest(self, wake_fd: int) -> None:
        """Write what the guest says; one byte into the pipe for each piece, and its end when there is no more."""
        try:
            for number, data in enumerate(self._link):
                is_scrollback = number == 0 and self._is_terminal
                _write_all(self._stdout_fd, without_commands(data) if is_scrollback else data)
                os.write(wake_fd, b"!")
        except (MullionError, OSError) as error:
            self._error = error
        finally:
            os.close(wake_fd)

    def _to_guest(self, wake_fd: int) -> bool:
        watched = [wake_fd, self._stdin_fd]
        while True:
            input_has_ended = len(watched) == 1
            ready, _, _ = select.select(watched, [], [], self._linger_s if input_has_ended else None)
            if not ready:
                return False
            if wake_fd in ready and not os.read(wake_fd, _READ_BYTES):
                return True
            if self._stdin_fd in ready:
                data = os.read(self._stdin_fd, _READ_BYTES)
                if not data:
                    watched = [wake_fd]
                    continue
                typed, escape, _ = data.partition(ESCAPE) if self._is_terminal else (data, b"", b"")
                if typed:
                    self._link.send(typed)
                if escape:
                    return False


def without_commands(scrollback: bytes) -> bytes:
    """What a guest wrote earlier, without what would act now: clearing the screen, or asking where the cursor is.

    The terminal's answer to such a question would be typed into the guest. Colours (CSI … m) stay.
    """
    return _COMMANDS.sub(b"", scrollback)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    """The terminal without echo, line editing and signals; as it was afterwards."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _signals_as_exit() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind us, so that the terminal is put back."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
