"""A whole service for a test: its own home, its own processes, nothing left when it is over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.framework.leftovers import end_processes, processes_naming, sockets_under

from mullion.base.paths import HostPaths
from mullion.base.process import ProcessIdentity, read_identity
from mullion.client import Client
from mullion.model.views import PartitionView
from mullion.vhd import inspect_chain

READY_S: Final = 60.0
GUEST_S: Final = 180.0
"""A guest's boot under emulation on a loaded machine; a bound against hanging, never an assertion."""


@dataclass
class Command:
    """What a call of the command line printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@dataclass
class Service:
    """`mullion serve` on a folder of its own. `start` and `kill` as often as a test likes."""

    home: str
    environ: dict[str, str] = field(default_factory=dict)
    launcher: tuple[str, ...] = ()
    """What the service is started through, such as another mount namespace."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def paths(self) -> HostPaths:
        return HostPaths(f"{self.home}/data", f"{self.home}/run")

    @property
    def environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MULLION_")}
        return {**clean, "MULLION_HOME": self.home, "MULLION_LISTEN": "127.0.0.1:0", **self.environ}

    def start(self) -> float:
        """Start it and return when the API answers; the seconds from the start to then."""
        os.makedirs(f"{self.home}/data", exist_ok=True)
        begun_s = time.monotonic()
        with open(f"{self.home}/serve.out", "ab") as out:
            self.process = subprocess.Popen(
                [*self.launcher, sys.executable, "-P", "-m", "mullion.daemon", "serve"],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        while True:
            try:
                with self.client() as client:
                    client.status()
                return time.monotonic() - begun_s
            except Exception as error:
                if self.process.poll() is not None:
                    raise AssertionError(f"the service ended at once: {self.tail('serve.out')}") from error
                if time.monotonic() - begun_s > READY_S:
                    raise AssertionError(f"the service does not answer: {error}") from error
                time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """SIGTERM, as `mullion stop`."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(READY_S)

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        client = Client(socket_path=self.paths.api_socket)
        try:
            yield client
        finally:
            client.close()

    def cli(
        self, *words: str, stdin: bytes | None = None, check: bool = True, environ: Mapping[str, str] | None = None
    ) -> Command:
        """Call the command line as a user does."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mullion.cli", *words],
            env={**self.environment, **(environ or {})},
            input=stdin or b"",
            capture_output=True,
            timeout=GUEST_S * 2,
            check=False,
        )
        command = Command(done.returncode, done.stdout.decode(), done.stderr.decode())
        if check:
            assert command.status == 0, (
                f"mullion {' '.join(words)}: exit {command.status}\n{command.stdout}\n{command.stderr}"
            )
        return command

    def partition(self, name: str) -> PartitionView:
        with self.client() as client:
            return client.partition(name)

    def wait_agent(self, name: str, timeout_s: float = GUEST_S) -> PartitionView:
        """The partition once its guest's agent answers."""
        deadline_s = time.monotonic() + timeout_s
        while not (view := self.partition(name)).agent_answers:
            assert time.monotonic() < deadline_s, (
                f"the agent of {name} does not answer; state {view.state}: {view.reason}\n{self.console(name)}"
            )
            assert view.state.value in ("running", "starting"), f"{name} is {view.state}: {view.reason}"
            time.sleep(0.1)
        return view

    def wait_state(self, name: str, state: str, timeout_s: float = GUEST_S) -> PartitionView:
        deadline_s = time.monotonic() + timeout_s
        while (view := self.partition(name)).state.value != state:
            assert time.monotonic() < deadline_s, f"{name} is {view.state}, not {state}: {view.reason}"
            time.sleep(0.05)
        return view

    def provider(self, name: str) -> ProcessIdentity | None:
        return read_identity(self.paths.partition(name).provider_identity)

    def qemu(self, name: str) -> ProcessIdentity | None:
        return read_identity(self.paths.partition(name).qemu_identity)

    def head_of(self, name: str) -> str:
        """The file that a partition with one disk writes to, which is named after it."""
        files = [str(path) for path in Path(self.paths.disks).glob(f"{name}*.*vhd")]
        return max(files, key=lambda path: len(inspect_chain(path).paths))

    def write(self, name: str, offset: int, content: bytes) -> None:
        """What the guest would do: write into the disk's head."""
        self.cli("vhd", "write", self.head_of(name), "--offset", str(offset), stdin=content)

    def console(self, name: str) -> str:
        return self.tail(f"data/partitions/{name}/console.log")

    def tail(self, name: str, size_bytes: int = 6000) -> str:
        try:
            with open(f"{self.home}/{name}", "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - size_bytes))
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return f"(no {name})"

    def assert_nothing_runs(self, name: str) -> None:
        """No process, no socket, no file in the partition's run folder; what was killed may take an instant to end."""
        view = self.partition(name)
        assert (view.qemu_pid, view.provider_pid) == (None, None)
        run = self.paths.partition(name).run
        assert not os.path.exists(run), os.listdir(run)
        deadline_s = time.monotonic() + READY_S
        while left := [
            one for one in processes_naming(self.home) if f"{run}/" in str(one) or f"guest={name}" in str(one)
        ]:
            assert time.monotonic() < deadline_s, left
            time.sleep(0.02)

    def destroy(self) -> None:
        """End the service and every process of its partitions, gracefully or not."""
        self.end()
        end_processes(self.home)
        deadline_s = time.monotonic() + READY_S
        while sockets_under(self.home) and time.monotonic() < deadline_s:  # an ending process closes them last
            time.sleep(0.02)
