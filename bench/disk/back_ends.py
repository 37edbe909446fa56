"""Back ends that serve a disk to the load generators: a provider of ours, and `qemu-storage-daemon`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from bench.figures import BenchFault
from bench.vhd.scratch import run_program
from tests.framework.providers import Control, LoneProvider

from mullion.provider.spec import DiskSpec, ProviderSpec
from mullion.vhd import create_differencing

LOADGEN: Final = Path(__file__).parents[1] / "vhost_loadgen.c"
_START_S: Final = 30.0


def build_loadgen(folder: str) -> str:
    """The load generator for vhost-user; its path."""
    path = f"{folder}/loadgen"
    run_program("gcc", "-O2", "-o", path, str(LOADGEN))
    return path


class BackEnd:
    """One process that serves disks. `vhost` and `nbd` are sockets by the disks' names."""

    name = ""
    pid: int

    def __init__(self) -> None:
        self.vhost: dict[str, str] = {}
        self.nbd: dict[str, str] = {}
        self._held = ExitStack()

    def set_caps(self, disk: str, *, iops: int = 0, bytes_per_s: int = 0) -> None:
        """Change the caps of a disk; in force when this returns."""
        raise NotImplementedError

    def push(self, disk: str, path: str) -> None:
        """Make an empty layer at `path`, and go on writing there; in force when this returns."""
        raise NotImplementedError

    def pin(self, core: int) -> None:
        """Have all its threads, and those to come, on one core."""
        for task in os.listdir(f"/proc/{self.pid}/task"):
            os.sched_setaffinity(int(task), {core})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()


class OurProvider(BackEnd):
    """A provider, started by itself."""

    name = "ours"

    def __init__(self, folder: str, disks: dict[str, Sequence[str]]) -> None:
        """`disks`: chains, top first, by name."""
        super().__init__()
        self._chains = {name: list(chain) for name, chain in disks.items()}
        self.vhost = {name: f"{folder}/{name}.v" for name in disks}
        self.nbd = {name: f"{folder}/{name}.n" for name in disks}
        specs = tuple(
            DiskSpec(n, tuple(chain), vhost_user=self.vhost[n], nbd=self.nbd[n]) for n, chain in disks.items()
        )
        provider = LoneProvider(ProviderSpec("bench", specs, f"{folder}/ctl", f"{folder}/our.log", f"{folder}/pend"))
        self._held.enter_context(provider)
        if not provider.ready.get("ready"):
            raise BenchFault(f"the provider did not start: {provider.ready}")
        self.pid = provider.process.pid
        self._held.callback(provider.terminate)  # with all that was written made durable
        self._control = self._held.enter_context(closing(Control(f"{folder}/ctl")))

    def set_caps(self, disk: str, *, iops: int = 0, bytes_per_s: int = 0) -> None:
        answer = self._control.ask("throttle", disk=disk, limits={"iops": iops, "bytes_per_s": bytes_per_s})
        if "error" in answer:
            raise BenchFault(f"the provider refused the caps: {answer}")

    def push(self, disk: str, path: str) -> None:
        chain = self._chains[disk]
        create_differencing(path, chain[0], lock_parent=False)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            wanted = {"id": disk, "chain": [path, *chain], "new": [path]}
            answer = self._control.ask("switch", fds=[fd], disks=[wanted])
        finally:
            os.close(fd)
        if "error" in answer:
            raise BenchFault(f"the provider refused the layer: {answer}")
        chain.insert(0, path)


class StorageDaemon(BackEnd):
    """`qemu-storage-daemon` with a throttle group over each disk where caps are wanted."""

    name = "qemu-storage-daemon"

    def __init__(
        self,
        folder: str,
        disks: dict[str, str],
        *,
        driver: str = "qcow2",
        with_caps: bool = False,
        with_nbd: bool = False,
    ) -> None:
        """`disks`: the path of the top, by name. Backing files are opened as the images say, by io_uring too.

        With caps, or over NBD, the NBD server has one nameless export: that is for a single disk.
        """
        super().__init__()
        self._tops = {name: (path, name) for name, path in disks.items()}
        self._driver = driver
        argv = ["qemu-storage-daemon", "--chardev", f"socket,path={folder}/qmp,server=on,wait=off,id=m"]
        argv += ["--monitor", "chardev=m"]
        for name, path in disks.items():
            self.vhost[name], self.nbd[name] = f"{folder}/{name}.qv", f"{folder}/qemu.n"
            argv += _blockdevs(name, path, driver)
            if with_caps:
                argv += ["--object", f"throttle-group,id=g-{name}"]
                argv += ["--blockdev", f"driver=throttle,node-name=t-{name},file={name},throttle-group=g-{name}"]
            node = f"t-{name}" if with_caps else name
            address = f"addr.type=unix,addr.path={self.vhost[name]}"
            argv += ["--export", f"type=vhost-user-blk,id=v-{name},node-name={node},{address},writable=on"]
        if with_caps or with_nbd:
            argv += ["--nbd-server", f"addr.type=unix,addr.path={folder}/qemu.n"]
            for name in disks:
                node = f"t-{name}" if with_caps else name
                argv += ["--export", f"type=nbd,id=n-{name},node-name={node},name=,writable=on"]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        self._held.callback(process.wait)
        self._held.callback(process.terminate)
        self.pid = process.pid
        _wait_for([f"{folder}/qmp", *self.vhost.values()], process)
        self._qmp = self._held.enter_context(closing(Monitor(f"{folder}/qmp")))

    def set_caps(self, disk: str, *, iops: int = 0, bytes_per_s: int = 0) -> None:
        limits = {"iops-total": iops, "bps-total": bytes_per_s}
        self._qmp.ask("qom-set", path=f"/objects/g-{disk}", property="limits", value=limits)

    def push(self, disk: str, path: str) -> None:
        below, node = self._tops[disk]
        run_program("qemu-img", "create", "-q", "-f", self._driver, "-b", below, "-F", self._driver, path)
        overlay = f"o{os.path.basename(path).partition('.')[0]}"
        file = {"driver": "file", "filename": path, "aio": "io_uring"}
        self._qmp.ask("blockdev-add", **{"driver": self._driver, "node-name": overlay, "file": file, "backing": None})
        self._qmp.ask("blockdev-snapshot", node=node, overlay=overlay)
        self._tops[disk] = (path, overlay)


def _blockdevs(name: str, path: str, driver: str) -> list[str]:
    """The chain of an image, every file by io_uring: QEMU would open backing files by threads."""
    info = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", "--backing-chain", path]))
    argv: list[str] = []
    below = ""
    for number, file in reversed(list(enumerate(info))):
        node = name if number == 0 else f"{name}-{number}"
        read_only = "" if number == 0 else ",read-only=on"
        argv += ["--blockdev", f"driver=file,node-name=f-{node},filename={file['filename']},aio=io_uring{read_only}"]
        backing = f",backing={below}" if below else ""
        argv += ["--blockdev", f"driver={driver},node-name={node},file=f-{node}{read_only}{backing}"]
        below = node
    return argv


def _wait_for(paths: Sequence[str], process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _START_S
    while not all(map(os.path.exists, paths)):
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise BenchFault("qemu-storage-daemon did not start")
        time.sleep(0.02)


class Monitor:
    """A QMP connection, one command at a time."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()  # the greeting
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise BenchFault(f"{command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
