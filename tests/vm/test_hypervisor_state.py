"""A guest's memory written to a file and loaded again: it goes on where it was, and failures leave it as it was."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest
from tests.framework.machines import Yard, yard
from tests.vm.test_hypervisor_guest import BOOT_S, KERNEL_LINE, served

from mullion.base.errors import NoSpaceError
from mullion.base.units import MIB
from mullion.hypervisor import Machine, MachineSpec, ResolvedDisk
from mullion.hypervisor.errors import MachineGoneError, StateRefusedError
from mullion.hypervisor.saved_state import host_cpu, live_obstacle, machine_facts
from mullion.hypervisor.state_file import StateAbout, StateDamagedError, StateInfo, check_state
from mullion.model.definition import Accelerator, Bus, DirectBoot, Transport

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]
__all__ = ["yard"]


async def about(machine: Machine, spec: MachineSpec) -> StateAbout:
    version, kind = await machine_facts(machine)
    return StateAbout(
        partition=spec.definition.name,
        uuid=spec.uuid,
        saved_at="2026-01-02T03:04:05Z",
        qemu_version=version,
        machine_type=kind,
        accelerator=Accelerator.TCG,
        host_cpu=host_cpu(),
        definition=spec.definition,
    )


async def say(machine: Machine, *words: str) -> str:
    ran = await machine.agent.execute(["/bin/sh", "-c", " ".join(words)])
    assert ran.exit_code == 0, ran
    return ran.stdout.decode().strip()


async def loaded(spec: MachineSpec, info: StateInfo) -> Machine:
    machine = await Machine.start(dataclasses.replace(spec, machine_type=info.about.machine_type, loads_state=True))
    try:
        await machine.load_state(info.path, info.seal)
    except BaseException:
        await machine.kill()
        await machine.close()
        raise
    return machine


def test_a_guest_goes_on_where_it_was_saved(yard: Yard, images: Path, tmp_path: Path) -> None:
    """Stopped and live, an I/O error while writing, a damaged file: one guest, since booting it takes longest."""
    image = images / "demo"
    disk = ResolvedDisk("disk0", Bus.VIRTIO, yard.paths().nbd("disk0"), export="disk0", transport=Transport.NBD)
    boot = DirectBoot(str(image / "vmlinuz"), str(image / "initrd.img"), KERNEL_LINE)
    spec = yard.spec(memory_bytes=192 * MIB, direct_boot=boot, disks=(disk,))
    parts: list[float] = []

    async def told() -> None:
        machine = await Machine.start(spec)
        try:
            await machine.resume()
            assert await machine.agent_ping(BOOT_S)
            await say(
                machine,
                "mkdir -p /run/here; echo kept >/run/here/note; (while :; do sleep 600; done) >/dev/null 2>&1 </dev/null & echo $! >/run/here/pid",
            )
            booted_as = await say(machine, "cat /proc/sys/kernel/random/boot_id")
            description = await about(machine, spec)

            # No room: the file is gone, the guest can go on.
            await machine.pause()
            full = tmp_path / "full"
            full.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(full)], check=True)
            try:
                with pytest.raises(NoSpaceError, match=r"web\.state"):
                    await machine.write_state(f"{full}/web.state", description)
                assert os.listdir(full) == []
            finally:
                subprocess.run(["umount", str(full)], check=True)
            await machine.resume()
            assert await say(machine, "cat /run/here/note") == "kept"

            # Live: it runs on before its memory is written.
            assert await live_obstacle(machine) is None, "as root, over NBD"
            await machine.pause()
            live = await machine.write_state(str(tmp_path / "live.state"), description, live=True)
            assert (await machine.state()).run_state == "running"
            await say(machine, "echo after >/run/here/after")

            # Stopped, and then it can go on as well.
            await machine.pause()
            stopped = await machine.write_state(str(tmp_path / "stopped.state"), description, on_progress=parts.append)
            await machine.resume()
            assert await say(machine, "cat /run/here/after") == "after"
        finally:
            await machine.kill()
            await machine.close()
        assert parts
        assert 0 <= min(parts) <= max(parts) <= 1

        for info in (stopped, live):
            assert check_state(info.path) == info
            machine = await loaded(spec, info)
            try:
                assert (await machine.state()).run_state == "paused"
                await machine.resume()
                assert await machine.agent_ping(BOOT_S)
                assert await say(machine, "cat /proc/sys/kernel/random/boot_id") == booted_as
                await say(machine, "kill -0 $(cat /run/here/pid)")
                assert await say(machine, "ls /run/here") == ("after\nnote\npid" if info is stopped else "note\npid")
            finally:
                await machine.kill()
                await machine.close()

        # Damaged after it was checked.
        with open(stopped.path, "r+b") as file:
            file.seek(stopped.file_bytes // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        with pytest.raises(StateDamagedError):
            await loaded(spec, stopped)
        # Another machine than the state is of.
        smaller = msgspec.structs.replace(spec.definition, memory_bytes=128 * MIB)
        with pytest.raises(StateRefusedError, match=r"Size mismatch"):
            await loaded(dataclasses.replace(spec, definition=smaller), live)

    with served(image / "demo.vhd", disk.socket):
        asyncio.run(told())


async def caught_writing(machine: Machine, path: Path, description: StateAbout) -> asyncio.Task[StateInfo]:
    """A state that is being written, its QEMU standing still in the middle; tried again when it was quicker than we."""
    for _ in range(50):
        writing = asyncio.create_task(machine.write_state(str(path), description))
        while not os.listdir(path.parent) and not writing.done():
            await asyncio.sleep(0)
        machine.identity.send_signal(signal.SIGSTOP)
        done, _ = await asyncio.wait({writing}, timeout=0.2)  # what QEMU has sent already is taken
        if not done:
            return writing
        machine.identity.send_signal(signal.SIGCONT)
        await writing
        path.unlink()
    pytest.fail("never caught in the middle")


def test_a_qemu_that_dies_or_hangs_while_it_is_saved_leaves_no_file(yard: Yard, tmp_path: Path) -> None:
    spec = yard.spec(memory_bytes=64 * MIB)

    async def told() -> None:
        machine = await Machine.start(spec)
        try:
            description = await about(machine, spec)
            path = tmp_path / "web.state"
            # Cancelled while QEMU stands still: nothing stays, not even a thread that waits.
            machine.identity.send_signal(signal.SIGSTOP)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await machine.write_state(str(path), description)
            machine.identity.send_signal(signal.SIGCONT)
            assert os.listdir(tmp_path) == []
            assert (await machine.write_state(str(path), description)).file_bytes == path.stat().st_size
            path.unlink()

            writing = await caught_writing(machine, path, description)
            machine.identity.send_signal(signal.SIGKILL)
            with pytest.raises(MachineGoneError):
                await writing
            assert os.listdir(tmp_path) == []
        finally:
            machine.identity.send_signal(signal.SIGCONT)
            await machine.kill()
            await machine.close()

    asyncio.run(told())
