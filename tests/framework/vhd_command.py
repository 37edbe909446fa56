"""`mullion vhd` as a person or a script has it: its commands run as processes, in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMMAND = (sys.executable, "-m", "mullion.cli", "vhd")


def environment(home: Path) -> dict[str, str]:
    """That of a command whose logs stay in the home; every process that it leaves behind names the home."""
    return {**os.environ, "MULLION_HOME": str(home), "LC_ALL": "C.UTF-8"}


def vhd(home: Path, *words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in the home."""
    return subprocess.run(
        [*COMMAND, *words], cwd=home, env=environment(home), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )  # fmt: skip


@dataclass(slots=True)
class Server:
    """A `vhd serve` that listens."""

    process: subprocess.Popen[str]
    uri: str

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Signal it and wait: exit status and what it said to standard error."""
        self.process.send_signal(number)
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, said


@contextlib.contextmanager
def serving(home: Path, *words: str) -> Iterator[Server]:
    """`vhd serve WORDS`, from when it says its address; ended at the end of the block if it was not before."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*COMMAND, "serve", *words], cwd=home, env=environment(home), stdout=pipe, stderr=pipe, text=True
    )
    try:
        assert process.stdout is not None
        uri = process.stdout.readline().rstrip("\n")
        assert uri, process.communicate()[1]
        yield Server(process, uri)
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)
