"""The demo image for tests, built once and shared by all workers and levels, and its disk behind a plain QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from mullion.hypervisor.agent import GuestAgent
from mullion.services.image.build import BuiltImage, Kernel, build_demo_image
from mullion.vhd import open_chain
from mullion.wire.nbd import Export, NbdServer

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "tests"
GUEST_S = 180.0
"""A guest's boot under emulation on a loaded machine; a bound against hanging, never an assertion."""


def shared_image(kernel: Kernel = "cloud") -> BuiltImage:
    CACHE.mkdir(parents=True, exist_ok=True)
    return build_demo_image(str(CACHE / "images"), cache_dir=str(CACHE / "packages"), kernel=kernel)


class PlainGuest:
    """A QEMU without the rest of Mullion: its disk is a VHD chain, served by our NBD server from this process.

    The kernel ends it when the test process dies, however that happens.
    """

    def __init__(self, folder: str, process: subprocess.Popen[bytes]) -> None:
        self.folder = folder
        self.process = process

    @classmethod
    @contextlib.contextmanager
    def start(cls, disk: str | None, *arguments: str, machine: str = "q35", memory: str = "256M") -> Iterator[Self]:
        """`arguments` say how the guest sees the disk: the block node is named `disk`."""
        with contextlib.ExitStack() as stack:
            folder = tempfile.mkdtemp(prefix="mull-", dir="/tmp")
            stack.callback(shutil.rmtree, folder)
            line = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults", "-no-user-config"]
            line += ["-display", "none", "-machine", machine, "-accel", "tcg,thread=multi", "-m", memory]
            line += ["-chardev", f"file,id=console,path={folder}/console.log", "-serial", "chardev:console"]
            line += ["-chardev", f"socket,id=agent,path={folder}/agent,server=on,wait=off", "-device"]
            line += ["virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
            line += ["-qmp", f"unix:{folder}/qmp,server=on,wait=off"]
            if disk is not None:
                chain = stack.enter_context(contextlib.closing(open_chain(disk, allowed_dirs=[str(CACHE), "/tmp"])))
                listener = socket.socket(socket.AF_UNIX)
                listener.bind(f"{folder}/nbd")
                listener.listen()
                server = NbdServer(listener, [Export("disk", chain)])
                server.start()
                stack.callback(server.stop)
                line += ["-blockdev", f"nbd,node-name=disk,server.type=unix,server.path={folder}/nbd,export=disk"]
            with open(f"{folder}/qemu.log", "wb") as log:
                process = subprocess.Popen(
                    [*line, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder
                )
            guest = cls(folder, process)
            stack.callback(guest._end)
            yield guest

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()

    def run(self, script: str) -> str:
        """What a shell script in the guest prints; waits for the agent first. A script that fails is an error."""

        async def story() -> str:
            agent = GuestAgent(f"{self.folder}/agent")
            try:
                await self._wait(agent)
                result = await agent.execute(["/bin/sh", "-c", script], timeout_s=GUEST_S)
            finally:
                await agent.close()
            assert result.exit_code == 0, f"{script}: {result}"
            return result.stdout.decode()

        return asyncio.run(story())

    def shut_down(self) -> None:
        """Power off through the agent; returns when QEMU has ended by itself."""

        async def story() -> None:
            agent = GuestAgent(f"{self.folder}/agent")
            try:
                await self._wait(agent)
                await agent.shutdown()
            finally:
                await agent.close()

        asyncio.run(story())
        self.wait_end()

    async def _wait(self, agent: GuestAgent) -> None:
        async with asyncio.timeout(GUEST_S):
            while not await agent.ping(5.0):
                assert self.process.poll() is None, f"QEMU ended: {self.log('qemu.log')}\n{self.log('console.log')}"

    def monitor(self, command: str) -> None:
        """Give a QMP command without arguments."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(GUEST_S)
            monitor.connect(f"{self.folder}/qmp")
            with monitor.makefile("rw") as stream:
                stream.readline()
                for name in ("qmp_capabilities", command):
                    stream.write(f'{{"execute": "{name}"}}\n')
                    stream.flush()
                    stream.readline()

    def wait_end(self) -> None:
        assert self.process.wait(GUEST_S) == 0, self.log("qemu.log")

    def log(self, name: str) -> str:
        try:
            return Path(self.folder, name).read_text(errors="replace")
        except FileNotFoundError:
            return ""
