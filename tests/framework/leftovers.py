"""What a test run leaves behind: found, named, ended; and what an earlier run left that died itself.

A test's home is a folder with a short unique name. Every process of ours names it, in its command line or in its
environment (`MULLION_HOME`), and so does every socket: that, not a list of children, tells what belongs to the test,
because our processes are detached on purpose. A session keeps a file with its own identity and its homes; the next
session reads those of sessions that are no more, ends what names their homes, and removes them.

Only processes that name a home, or were recorded by identity (pid and start time), are ever signalled.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mullion.base.process import ProcessIdentity

REGISTRY = Path(f"/tmp/mullion-tests-{os.getuid()}")
_HOME_PREFIX = "/tmp/mn-"
_ROUNDS = 600
_ROUND_S = 0.1
PATIENCE_S = 10.0
"""What ends by itself, as a zygote does when its parent has gone, may need an instant on a loaded machine."""


@dataclass(frozen=True, slots=True)
class Survivor:
    """A process, or a listening socket, that names a home."""

    identity: ProcessIdentity | None
    what: str

    def __str__(self) -> str:
        return f"process {self.identity.pid}: {self.what}" if self.identity else f"listening socket: {self.what}"


def processes_naming(home: str | Path) -> list[Survivor]:
    """Processes, other than this one, with the folder's path in their command line or environment."""
    needle = os.fsencode(home)
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        identity = ProcessIdentity.of(int(entry))
        try:
            cmdline = Path(f"/proc/{entry}/cmdline").read_bytes()
            environ = Path(f"/proc/{entry}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended, or is not ours
        if identity is not None and (_names(cmdline, needle) or _names(environ, needle)):
            found.append(Survivor(identity, cmdline.replace(b"\0", b" ").decode(errors="replace").strip()))
    return found


def sockets_under(home: str | Path) -> list[Survivor]:
    """Unix sockets on which somebody listens, below the folder."""
    prefix = f"{home}/"
    found = []
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
        for line in table:
            fields = line.split(maxsplit=7)
            is_listening = len(fields) == 8 and fields[3] == "00010000"
            if is_listening and fields[7].rstrip("\n").startswith(prefix):
                found.append(Survivor(None, fields[7].rstrip("\n")))
    return found


def _names(text: bytes, needle: bytes) -> bool:
    """Whether a path occurs, and not merely a longer one that begins like it."""
    start = text.find(needle)
    while start >= 0:
        after = text[start + len(needle) : start + len(needle) + 1]
        if not (after.isalnum() or after in (b"_", b"-", b".")):
            return True
        start = text.find(needle, start + 1)
    return False


class Leftovers:
    """One session's homes and processes, kept in a file so that the next session can clean up after this one."""

    def __init__(self, registry: Path = REGISTRY, patience_s: float = PATIENCE_S) -> None:
        self._registry = registry
        self._patience_s = patience_s
        self._homes: dict[str, None] = {}
        self._processes: list[ProcessIdentity] = []
        own = ProcessIdentity.of(os.getpid())
        assert own is not None
        self._own = own
        self._make_registry()
        self._file = registry / f"{own.pid}-{own.start_ticks}"

    def _make_registry(self) -> None:
        self._registry.mkdir(mode=0o700, exist_ok=True)
        found = self._registry.lstat()
        # Anybody may make a folder of this name under /tmp, and what stands in it is obeyed with signals.
        assert stat.S_ISDIR(found.st_mode), f"{self._registry} is not a folder"
        assert found.st_uid == os.getuid(), f"{self._registry} belongs to another user"

    def _save(self) -> None:
        lines = [f"session {self._own}", *(f"home {home}" for home in self._homes)]
        lines += [f"process {identity}" for identity in self._processes]
        temporary = self._file.with_suffix(".new")
        temporary.write_text("\n".join(lines) + "\n")
        temporary.replace(self._file)

    @property
    def homes(self) -> tuple[str, ...]:
        """The homes that are in use now, oldest first."""
        return tuple(self._homes)

    def add_home(self) -> Path:
        """Make a new home: a short path, so that the sockets in it fit their limit of 107 characters."""
        home = tempfile.mkdtemp(prefix=_HOME_PREFIX)
        os.chmod(home, 0o755)  # a QEMU or provider that runs under a user id of its own passes through here
        self._homes[home] = None
        self._save()
        return Path(home)

    def add_process(self, pid: int) -> None:
        """Record a process that does not name a home, to be ended if this session dies before it."""
        identity = ProcessIdentity.of(pid)
        if identity is not None:
            self._processes.append(identity)
            self._save()

    def remove_home(self, home: str | Path) -> list[Survivor]:
        """Remove a home; what still ran or listened there is returned, after it was ended."""
        deadline_s = time.monotonic() + self._patience_s
        while survivors := [*processes_naming(home), *sockets_under(home)]:
            if time.monotonic() > deadline_s:
                break
            time.sleep(_ROUND_S)
        end_processes(home)
        shutil.rmtree(home)
        self._homes.pop(str(home), None)
        self._save()
        return survivors

    def finish(self) -> list[Survivor]:
        """The end of the session: remove every home and forget this session. Returns what was still there."""
        survivors = [
            Survivor(identity, "recorded, and still running") for identity in self._processes if identity.is_alive
        ]
        for survivor in survivors:
            assert survivor.identity is not None
            survivor.identity.send_signal(signal.SIGKILL)
        for home in self.homes:
            survivors += self.remove_home(home)
        self._file.unlink(missing_ok=True)
        return survivors

    def reap_dead_sessions(self) -> list[str]:
        """End and remove what sessions left that died before they could. Returns what was done, for the log."""
        done = []
        for path in sorted(self._registry.iterdir()):
            lines = _lines_of(path)
            owner = ProcessIdentity.parse(lines.get("session", [""])[0])
            if path.suffix or owner is None or owner.is_alive:
                continue
            for text in lines.get("process", []):
                identity = ProcessIdentity.parse(text)
                if identity is not None and identity.is_alive and identity.send_signal(signal.SIGKILL):
                    done.append(f"ended process {identity.pid}, recorded by a session that died")
            for home in lines.get("home", []):
                if not home.startswith(_HOME_PREFIX):
                    continue
                done += [f"ended {survivor}, left by a session that died" for survivor in end_processes(home)]
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(home)
            path.unlink(missing_ok=True)
        return done


def end_processes(home: str | Path) -> list[Survivor]:
    """End every process that names the home, as often as one of them starts another. Returns those that were there.

    Raises: AssertionError when one does not end.
    """
    ended: list[Survivor] = []
    for _ in range(_ROUNDS):
        survivors = processes_naming(home)
        if not survivors:
            return ended
        for survivor in survivors:
            assert survivor.identity is not None
            if survivor.identity.send_signal(signal.SIGKILL) and survivor not in ended:
                ended.append(survivor)
        time.sleep(_ROUND_S)
    raise AssertionError(f"these do not end: {', '.join(map(str, processes_naming(home)))}")


def _lines_of(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with contextlib.suppress(FileNotFoundError):  # another session that starts now may have cleaned up first
        for line in path.read_text().splitlines():
            kind, _, rest = line.partition(" ")
            found.setdefault(kind, []).append(rest)
    return found


@contextlib.contextmanager
def checked_home(leftovers: Leftovers) -> Iterator[Path]:
    """A home for a `with` block, at whose end nothing of it may be running.

    Raises: AssertionError that names what survived (it was ended).
    """
    home = leftovers.add_home()
    try:
        yield home
    finally:
        survivors = leftovers.remove_home(home)
    assert not survivors, "left behind: " + "; ".join(map(str, survivors))
