"""Typing into a guest's serial console and reading what it prints, as a person at the keyboard does."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from tests.framework.service import GUEST_S, Service

PROMPT: Final = "\x1b[6n"
"""The shell asks the terminal where its cursor is when it is ready to read a line: the one sign that input is not lost."""
INTERRUPT: Final = "\x03"


class GuestConsole:
    """A console that stays open. `seen` is all that was printed since the last match."""

    def __init__(self, service: Service, name: str) -> None:
        self._stack = contextlib.ExitStack()
        client = self._stack.enter_context(service.client())
        self._console = client.console(name)
        self._chunks: queue.Queue[bytes | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._chunks.get(timeout=GUEST_S)  # the end of the log, with prompts of earlier days
        self.seen = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console.close()
        self._reader.join()
        self._stack.close()

    def _read(self) -> None:
        try:
            for chunk in self._console:
                self._chunks.put(chunk)
        finally:
            self._chunks.put(None)

    def type(self, text: str) -> None:
        self._console.send(text.encode())

    def wait_for(self, *texts: str, timeout_s: float = GUEST_S) -> str:
        """What was printed up to and including the first of the texts that comes."""
        deadline_s = time.monotonic() + timeout_s
        while not (found := [text for text in texts if text in self.seen]):
            try:
                chunk = self._chunks.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                raise AssertionError(
                    f"{texts} were not printed within {timeout_s:g} s, but: {self.seen[-3000:]!r}"
                ) from None
            assert chunk is not None, f"the console ended before {texts}: {self.seen[-3000:]!r}"
            self.seen += chunk.decode(errors="replace")
        text = min(found, key=self.seen.index)
        before, self.seen = self.seen.split(text, 1)
        return before + text

    def log_in(self) -> None:
        """Get to a root shell; the one of an earlier viewer may still be there."""
        self.type("\n")
        if self.wait_for("login: ", "# ").endswith("login: "):
            self.type("root\n")
            self.wait_for(PROMPT)
        self.type("stty -echo\n")
        self.wait_for("# ")

    def command(self, line: str, timeout_s: float = GUEST_S) -> str:
        """Run a command in the guest's shell and return what it prints; its status must be 0."""
        mark = f"done-{time.monotonic_ns()}"
        self.type(f"{line}; echo {mark} $?\n")
        printed = self.wait_for(f"{mark} ", timeout_s=timeout_s).rpartition(mark)[0]
        status = self.wait_for("\n", timeout_s=timeout_s).strip()
        assert status == "0", f"{line!r} ended with {status}: {printed}"
        return printed


@contextlib.contextmanager
def logged_in(service: Service, name: str) -> Iterator[GuestConsole]:
    """A root shell at the guest's console."""
    with GuestConsole(service, name) as console:
        console.log_in()
        yield console
