"""Providers for tests: started through a zygote as the parent does it, or alone so that they can be killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mullion.provider.control_client import encode
from mullion.provider.spec import DiskSpec, ProviderSpec
from mullion.provider.zygote import spawn_argv
from mullion.vhd import create_differencing, create_dynamic
from mullion.wire.vhost_user.messages import DeviceFeature
from mullion.wire.vhost_user.virtio_blk import BlkFeature

DEADLINE_S = 60.0
WANTED = int(
    DeviceFeature.VERSION_1
    | DeviceFeature.RING_INDIRECT_DESC
    | DeviceFeature.RING_EVENT_IDX
    | BlkFeature.FLUSH
    | BlkFeature.DISCARD
    | BlkFeature.WRITE_ZEROES
)


def make_spec(folder: Path, *chains: list[Path], read_only: bool = False) -> ProviderSpec:
    """A specification of disks d0, d1 … with all their sockets below a short folder."""
    disks = tuple(
        DiskSpec(
            f"d{number}",
            tuple(str(path) for path in chain),
            read_only=read_only,
            vhost_user=str(folder / f"d{number}.vhost"),
            nbd=str(folder / f"d{number}.nbd"),
            serial=f"serial-{number}",
        )
        for number, chain in enumerate(chains)
    )
    return ProviderSpec("test", disks, str(folder / "control"), str(folder / "log"), str(folder / "pending"))


def spec_of_two(folder: Path, disk_bytes: int) -> ProviderSpec:
    """Two new disks: one of two files, and one of one."""
    top, base, other = (folder / f"{name}.vhd" for name in ("top", "base", "other"))
    create_dynamic(str(base), disk_bytes)
    create_differencing(str(top), str(base))
    create_dynamic(str(other), disk_bytes)
    return make_spec(folder, [top, base], [other])


class LoneProvider:
    """A provider in a process of its own, by `python -m mullion.provider.main`; prefix goes before it."""

    def __init__(self, spec: ProviderSpec, prefix: tuple[str, ...] = ()) -> None:
        spec_path = f"{spec.control}.spec"
        with open(spec_path, "w", encoding="utf-8") as file:
            json.dump(spec.to_wire(), file)
        self.log = open(spec.log, "ab")  # noqa: SIM115 - closed in `end`
        argv = [*prefix, sys.executable, "-m", "mullion.provider.main", spec_path]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=self.log)
        assert self.process.stdout is not None
        self.ready: dict[str, Any] = json.loads(self.process.stdout.readline() or b"{}")

    def kill(self) -> None:
        """As `kill -9` does."""
        self.process.kill()
        self.end()

    def terminate(self) -> int:
        """As the parent does; the exit status."""
        self.process.terminate()
        return self.end()

    def end(self) -> int:
        assert self.process.stdout is not None
        status = self.process.wait(DEADLINE_S)  # may be asked again
        self.process.stdout.close()
        self.log.close()
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.end()


class ZygotePeer:
    """The parent's end of a zygote. `home` goes into its environment, and so into that of every provider it forks:
    by it `tests.framework.leftovers` finds those of a session that died."""

    def __init__(self, home: Path | None = None) -> None:
        self.socket, theirs = socket.socketpair()
        environ = os.environ if home is None else {**os.environ, "MULLION_HOME": str(home)}
        with theirs:
            self.process = subprocess.Popen(spawn_argv(theirs.fileno()), pass_fds=[theirs.fileno()], env=environ)
        self.socket.settimeout(DEADLINE_S)
        self.lines = self.socket.makefile("rb")
        self.pids: list[int] = []

    def send(self, message: Mapping[str, object]) -> None:
        self.socket.sendall(encode(message))

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.lines.readline())
        if message.get("ready"):
            self.pids.append(message["pid"])
        elif message.get("exited") in self.pids:
            self.pids.remove(message["exited"])
        return message

    def spawn(self, spec: ProviderSpec | Mapping[str, object]) -> dict[str, Any]:
        fields = spec.to_wire() if isinstance(spec, ProviderSpec) else spec
        self.send({"id": 1, "spawn": fields})
        return self.receive()

    def close(self) -> int:
        """Hang up as a dead parent does; the zygote's exit status."""
        self.pids.clear()
        return self._hang_up()

    def end(self) -> int:
        """End what a failed test has left (the zygote has not reaped it, so the number is still its own), hang up."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        return self._hang_up()

    def _hang_up(self) -> int:
        self.lines.close()
        self.socket.close()
        return self.process.wait(DEADLINE_S)


class Control:
    """A client of a provider's control socket."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(path)
        self.lines = self.socket.makefile("rb")

    def ask(self, command: str, fds: Sequence[int] = (), **fields: object) -> dict[str, Any]:
        line = encode({"command": command, "fds": len(fds), **fields})
        sent = socket.send_fds(self.socket, [line], list(fds)) if fds else 0
        self.socket.sendall(line[sent:])
        return self.receive()

    def receive(self) -> dict[str, Any]:
        line: dict[str, Any] = json.loads(self.lines.readline())
        return line

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


def wait_for_end(pid: int) -> None:
    """Until a process that is not our child has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        import select

        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(DEADLINE_S * 1000), f"process {pid} is still there"
    finally:
        os.close(pidfd)
