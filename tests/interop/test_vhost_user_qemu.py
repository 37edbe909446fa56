"""QEMU as the front-end and SeaBIOS as the driver: a boot sector of ours writes and reads for ever, providers die."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Self, TextIO

import pytest
from tests.framework.boot_sector import READ_FROM_BYTES, READ_PAGES, READING_SECTOR, assemble
from tests.framework.providers import Control, LoneProvider, make_spec

from mullion.provider.spec import ProviderSpec
from mullion.vhd import create_differencing, create_dynamic, open_chain

pytestmark = pytest.mark.interop

DEADLINE_S = 120.0
KILLS = 4


@pytest.fixture
def folder(short_tmp: Path) -> Path:
    return short_tmp


def wait_for_dots(serial: Path, qemu: subprocess.Popen[bytes], more: int) -> str:
    """What the guest has said, once it has said that many dots more."""
    before = serial.read_text() if serial.exists() else ""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        said = serial.read_text() if serial.exists() else ""
        if said.count(".") >= before.count(".") + more or set(said) - {"."}:
            return said
        assert qemu.poll() is None, "QEMU ended"
        assert time.monotonic() < deadline, f"the guest stands still after {said!r}"
        time.sleep(0.05)


class Guest:
    """A QEMU whose guest writes and reads the disk of a provider for ever."""

    def __init__(self, spec: ProviderSpec, folder: Path, name: str, *more: str) -> None:
        self.serial, self._qmp_path = folder / f"{name}.serial", folder / f"{name}.qmp"
        command = [
            "qemu-system-x86_64",
            *("-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,memory-backend=memory"),
            *("-accel", "tcg", "-m", "64M", "-object", "memory-backend-memfd,id=memory,size=64M,share=on"),
            *("-chardev", f"socket,id=disk,path={spec.disks[0].vhost_user},reconnect=1"),
            *("-device", "vhost-user-blk-pci,chardev=disk,bootindex=1,num-queues=1,id=disk0"),
            *("-serial", f"file:{self.serial}", "-qmp", f"unix:{self._qmp_path},server=on,wait=off"),
            *more,
        ]
        with (folder / "qemu.log").open("ab") as log:
            self.qemu = subprocess.Popen(command, stderr=log)
        self._monitor: TextIO | None = None

    def works(self, more: int = 3) -> None:
        """Until the guest has verified some more rounds."""
        said = wait_for_dots(self.serial, self.qemu, more)
        assert set(said) == {"."}, said

    def ask(self, command: str, **arguments: object) -> Any:
        """One QMP command; its answer, whatever events come before."""
        if self._monitor is None:
            connection = socket.socket(socket.AF_UNIX)
            deadline = time.monotonic() + DEADLINE_S
            while connection.connect_ex(str(self._qmp_path)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            connection.settimeout(DEADLINE_S)
            self._monitor = connection.makefile("rw")
            connection.close()
            self._monitor.readline()
            self.ask("qmp_capabilities")
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._monitor.flush()
        while True:
            message = json.loads(self._monitor.readline())
            if "event" not in message:
                assert "return" in message, message
                return message["return"]

    def wait_until(self, command: str, wanted: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while (status := self.ask(command).get("status")) != wanted:
            assert status != "failed", self.ask(command)
            assert time.monotonic() < deadline, status
            time.sleep(0.02)

    def wait_until_sent(self, size_bytes: int) -> None:
        """Until so much of the memory has been copied, for the first time."""
        deadline = time.monotonic() + DEADLINE_S
        while (answer := self.ask("query-migrate")).get("ram", {}).get("transferred", 0) < size_bytes:
            assert answer.get("status") in ("setup", "active"), answer
            assert time.monotonic() < deadline, answer
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._monitor is not None:
            self._monitor.close()
        self.qemu.kill()
        self.qemu.wait(DEADLINE_S)


@pytest.fixture
def spec(folder: Path) -> ProviderSpec:
    """A disk with the guest on it, and a child over it."""
    base, top = folder / "base.vhd", folder / "top.vhd"
    create_dynamic(str(base), 32 * 1024 * 1024)
    with open_chain(str(base)) as disk:
        disk.pwrite(0, assemble(folder))
    create_differencing(str(top), str(base))
    return make_spec(folder, [top, base])


def test_guest_goes_on_while_providers_are_killed(folder: Path, spec: ProviderSpec) -> None:
    provider = LoneProvider(spec)
    try:
        with Guest(spec, folder, "guest") as guest:
            for _kill in range(KILLS):
                guest.works()
                provider.kill()
                provider = LoneProvider(spec)
                assert provider.ready.get("ready") is True, provider.ready
            guest.works()
    finally:
        status = provider.terminate()
    assert status == 0
    with open_chain(spec.disks[0].chain[0], read_only=True) as disk:
        buffer = bytearray(512)
        disk.pread(2048 * 512, buffer)
        assert buffer == buffer[:4] * 128
        assert ~int.from_bytes(buffer[:4], "little", signed=True) % 4096 == 0  # a round that wrote this sector


def test_what_is_read_into_memory_while_that_is_copied_is_in_the_copy(folder: Path, spec: ProviderSpec) -> None:
    """Nobody but the provider writes to the pages that the guest reads into, and only its marks have them sent again.

    They are copied so slowly that the guest is around them many times before the last is, and then all at once.
    """
    with open_chain(spec.disks[0].chain[0]) as disk:
        disk.pwrite(0, assemble(folder, READING_SECTOR))
        for page in range(READ_PAGES):
            disk.pwrite(READ_FROM_BYTES + page * 4096, page.to_bytes(4, "little") * 1024)
    with LoneProvider(spec) as provider, Guest(spec, folder, "saved") as guest:
        guest.works()
        guest.ask("migrate-set-parameters", **{"max-bandwidth": 512 << 10, "downtime-limit": 1})
        guest.ask("migrate", uri=f"exec:cat > {folder}/state")
        guest.wait_until_sent(READ_PAGES * 4096)
        guest.works(4)
        guest.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 30, "downtime-limit": 10_000})
        guest.wait_until("query-migrate", "completed")
        guest.ask("quit")
        guest.qemu.wait(DEADLINE_S)
        assert provider.terminate() == 0
    with (
        LoneProvider(spec) as provider,
        Guest(spec, folder, "loaded", "-incoming", f"exec:cat {folder}/state") as guest,
    ):
        guest.works()


def test_guest_goes_on_while_its_disk_is_switched(folder: Path, spec: ProviderSpec) -> None:
    """Children are put on top again and again; every round of the guest compares what it reads."""
    chain = [Path(path) for path in spec.disks[0].chain]
    stalls = []
    with LoneProvider(spec), Guest(spec, folder, "guest") as guest:
        control = Control(spec.control)
        for number in range(5):
            guest.works(1)
            child = folder / f"child{number}.avhd"
            create_differencing(str(child), str(chain[0]), lock_parent=False)
            chain = [child, *chain]
            fd = os.open(child, os.O_RDWR)
            fields = {"id": "d0", "chain": [str(path) for path in chain], "new": [str(child)]}
            answer = control.ask("switch", [fd], disks=[fields])
            os.close(fd)
            assert "error" not in answer, answer
            stalls.append(answer["stall_ms"])
        guest.works()
        control.close()
    print(f"stalls in ms: {stalls}")
