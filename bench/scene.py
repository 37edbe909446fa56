"""Where benchmarks are measured: a service with a home of its own, its partitions, and bare QEMUs beside it.

The bare peer runs the very command line that the service gave QEMU, read from the partition's `qemu.log`, with its
paths moved to another folder, and with disks of the same kind that a provider serves already.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.figures import BenchFault
from tests.framework.iocheck import SOURCE, build_iocheck
from tests.framework.leftovers import Leftovers, checked_home
from tests.framework.providers import ZygotePeer
from tests.framework.service import Service

from mullion.base.units import MIB
from mullion.client import Client
from mullion.model.definition import DiskAttachment, PartitionDefinition, Transport
from mullion.provider.spec import DiskSpec, ProviderSpec
from mullion.services.image.build import BuiltImage, build_demo_image

MULLION: Final = str(Path(sys.executable).parent / "mullion")
DISK_ID: Final = "disk0"
_CACHE: Final = Path(__file__).resolve().parents[1] / ".cache" / "tests"
_IMAGES: Final = _CACHE / "images"


def demo_image() -> BuiltImage:
    """The demo image, from the cache that the tests use too."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    return build_demo_image(str(_IMAGES), cache_dir=str(_CACHE / "packages"))


def iocheck_image() -> BuiltImage:
    """The demo image with a program that verifies its own I/O."""
    program = _CACHE / "iocheck"
    _CACHE.mkdir(parents=True, exist_ok=True)
    if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        build_iocheck(_CACHE)
    return image_with({"/usr/bin/iocheck": str(program)})


def image_with(extra_files: Mapping[str, str]) -> BuiltImage:
    """The demo image with more files in it: their paths in the guest, and here."""
    return build_demo_image(str(_IMAGES), cache_dir=str(_CACHE / "packages"), extra_files=extra_files)


@contextlib.contextmanager
def service_at_home(*, images: bool = False) -> Iterator[Service]:
    """A service that is not started yet, in a folder that is gone at the end with all that runs there."""
    leftovers = Leftovers()
    leftovers.reap_dead_sessions()
    try:
        with checked_home(leftovers) as home:
            os.chmod(home, 0o711)  # the partitions' users pass through
            service = Service(str(home))
            os.makedirs(service.paths.data_dir)
            if images:
                os.symlink(_IMAGES, service.paths.images)
            try:
                yield service
            finally:
                service.destroy()
    finally:
        leftovers.finish()


@contextlib.contextmanager
def small_partitions(count: int, *, transport: Transport = Transport.AUTO) -> Iterator[tuple[Service, list[str]]]:
    """A running service with partitions p0, p1 …, stopped: 128 MiB of memory, one empty dynamic disk of 64 MiB."""
    names = [f"p{number}" for number in range(count)]
    with service_at_home() as service:
        service.start()
        with service.client() as client:
            for name in names:
                client.create_disk(path=name, size_bytes=64 * MIB)
                disk = DiskAttachment(path=name, id=DISK_ID, transport=transport)
                client.create_partition(PartitionDefinition(name=name, memory_bytes=128 * MIB, disks=(disk,)))
        yield service, names


def start_paused(client: Client, names: Sequence[str]) -> float:
    """Ask for all at once; seconds from the first POST until the last operation has succeeded."""
    begun_s = time.perf_counter()
    operations = [client.partition_action(name, "start", paused=True) for name in names]
    for operation in operations:
        client.wait(operation)
    return time.perf_counter() - begun_s


def turn_off(client: Client, names: Sequence[str]) -> None:
    operations = [client.partition_action(name, "stop", force=True) for name in names]
    for operation in operations:
        client.wait(operation)


class BareHost:
    """QEMUs without Mullion around them, on the disks of providers that run already."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._zygote = ZygotePeer()
        self._folders: dict[str, str] = {}

    def serve(
        self, name: str, make_disk: Callable[[str], object], *, transport: Transport, parents: Sequence[str] = ()
    ) -> None:
        """Make a disk for the twin of a partition and have a provider serve it; `parents` are below it in its chain."""
        folder = f"{self._service.home}/bare/{name}"
        os.makedirs(folder)
        disk_path = f"{folder}/disk.vhd"
        make_disk(disk_path)
        disk = DiskSpec(
            DISK_ID,
            (disk_path, *parents),
            vhost_user=f"{folder}/{DISK_ID}.vhost" if transport is Transport.VHOST_USER else None,
            nbd=f"{folder}/{DISK_ID}.nbd",
        )
        answer = self._zygote.spawn(ProviderSpec(name, (disk,), f"{folder}/c", f"{folder}/log", f"{folder}/pending"))
        if not answer.get("ready"):
            raise BenchFault(f"the provider of the bare QEMU did not start: {answer}")
        self._folders[name] = folder

    def argv(self, name: str, *, of: str | None = None) -> list[str]:
        """The command line of the last start of the partition (of the same name, or `of`), moved to the twin."""
        paths = self._service.paths.partition(of or name)
        with open(paths.qemu_log, encoding="utf-8") as log:
            line = [text for text in log if "qemu-system-x86_64 " in text][-1]
        for ours in (paths.run, paths.data):
            line = line.replace(f"{ours}/", f"{self._folders[name]}/")
        return shlex.split(line)

    def start(self, argvs: Sequence[Sequence[str]]) -> list[subprocess.Popen[bytes]]:
        # A session each, as ours: the scheduler gives shares to sessions (autogroup).
        return [
            subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            for argv in argvs
        ]

    def time_start(self, names: Sequence[str]) -> float:
        """Seconds from starting all at once until every monitor has answered `query-status`."""
        argvs = [self.argv(name) for name in names]
        begun_s = time.perf_counter()
        children = self.start(argvs)
        for name in names:
            ask_monitor(f"{self._folders[name]}/qmp.sock")
        took_s = time.perf_counter() - begun_s
        end(children)
        return took_s

    def agent_socket(self, name: str) -> str:
        return f"{self._folders[name]}/agent.sock"

    def close(self) -> None:
        """End the providers, then their zygote."""
        for pid in self._zygote.pids:
            os.kill(pid, signal.SIGTERM)
        for _ in self._zygote.pids:
            ended = self._zygote.receive()
            if ended.get("status") != 0:
                raise BenchFault(f"a provider of the bare QEMUs ended badly: {ended}")
        self._zygote.close()


def end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        child.kill()
    for child in children:
        child.wait()


def ask_monitor(path: str) -> None:
    """Wait for the socket, a millisecond at a time; agree on capabilities; ask for the state."""
    with connect(path) as client, client.makefile("rwb") as stream:
        stream.readline()
        for command in ("qmp_capabilities", "query-status"):
            stream.write(json.dumps({"execute": command}).encode())
            stream.flush()
            answer = json.loads(stream.readline())
            if "return" not in answer:
                raise BenchFault(f"the bare QEMU refused {command}: {answer}")


def connect(path: str, deadline_s: float = 120.0) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    until_s = time.monotonic() + deadline_s
    while True:
        try:
            client.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > until_s:
                raise
            time.sleep(0.001)
        else:
            return client


def time_command(service: Service, *argv: str) -> float:
    """Seconds of a command line in the service's environment; it must succeed."""
    begun_s = time.perf_counter()
    done = subprocess.run(argv, env=service.environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    took_s = time.perf_counter() - begun_s
    if done.returncode:
        raise BenchFault(f"{shlex.join(argv)} failed: {done.stderr.decode()}")
    return took_s
