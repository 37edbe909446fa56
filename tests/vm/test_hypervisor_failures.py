"""What goes wrong with a QEMU, each with the words a person gets. No guest is needed: the firmware is one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.framework.machines import Yard, yard

from mullion.base.errors import MissingToolError
from mullion.base.paths import PartitionPaths
from mullion.base.pidfd import wait_process
from mullion.base.process import ProcessIdentity, boot_id, read_identity, write_identity
from mullion.hypervisor.cmdline import MachineSpec
from mullion.hypervisor.errors import MachineGoneError, MonitorError, MonitorRefusedError, StartFailedError
from mullion.hypervisor.machine import Machine
from mullion.hypervisor.states import ExitReport
from mullion.model.definition import DirectBoot
from mullion.model.states import PartitionState

pytestmark = pytest.mark.vm
__all__ = ["yard"]


def driven(story: Awaitable[None]) -> None:
    async def told() -> None:
        async with asyncio.timeout(120):
            await story

    asyncio.run(told())


async def ended(machine: Machine) -> ExitReport:
    report = await machine.kill()
    await machine.close()
    return report


def processes_of(paths: PartitionPaths) -> list[str]:
    """Command lines of all processes that name the partition's run folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if paths.run in line:
                found.append(line)
    return found


def test_qemu_is_missing(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", yard.folder)
    with pytest.raises(MissingToolError, match="qemu-system-x86_64 is not installed") as caught:
        asyncio.run(Machine.start(yard.spec()))
    assert caught.value.remedy == "Install it: apt-get install qemu-system-x86"


def test_qemu_dies_at_start_and_its_words_are_told(yard: Yard) -> None:
    spec = yard.spec(direct_boot=DirectBoot("/nowhere/vmlinuz"))
    with pytest.raises(StartFailedError, match="could not open kernel file '/nowhere/vmlinuz'") as caught:
        asyncio.run(Machine.start(spec))
    assert caught.value.context["exit_status"] == 1
    assert "mullion: start" not in str(caught.value.context["log_excerpt"])
    assert "path=" in str(caught.value.context["command"]), "the line for a shell has paths, not our descriptors"
    assert processes_of(spec.paths) == []


def test_a_start_that_is_cancelled_leaves_nothing(yard: Yard) -> None:
    spec = yard.spec()

    async def story() -> None:
        starting = asyncio.create_task(Machine.start(spec))
        while read_identity(spec.paths.qemu_identity) is None:
            await asyncio.sleep(0.001)
        starting.cancel()
        (outcome,) = await asyncio.gather(starting, return_exceptions=True)
        if isinstance(outcome, Machine):  # it was faster than we; the same must hold then
            await ended(outcome)
        else:
            assert isinstance(outcome, asyncio.CancelledError)
        while processes_of(spec.paths):  # killed, and ending
            await asyncio.sleep(0.01)

    driven(story())


def test_qemu_killed_is_reported_with_status_and_log(yard: Yard) -> None:
    async def story() -> None:
        machine = await Machine.start(yard.spec())
        await machine.resume()
        os.kill(machine.identity.pid, signal.SIGTERM)  # QEMU logs who sent it, then ends
        report = await machine.wait_exit()
        assert report.status == 0
        assert "terminating on signal 15" in report.log_excerpt
        await machine.close()

        machine = await Machine.start(yard.spec())
        os.kill(machine.identity.pid, signal.SIGKILL)
        report = await machine.wait_exit()
        assert str(report) == "QEMU was killed by SIGKILL (exit status 137)"
        assert "terminating on signal 15" not in report.log_excerpt, "that was the start before"
        with pytest.raises(MachineGoneError, match="SIGKILL"):
            await machine.state()
        await machine.close()
        assert processes_of(machine.paths) == []

    driven(story())


def test_the_wrapper_outlives_signals_and_dies_with_qemu(yard: Yard) -> None:
    async def story() -> None:
        machine = await Machine.start(yard.spec())
        wrapper = parent_of(machine.identity.pid)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
            os.kill(wrapper, number)
        await machine.resume()
        assert (await machine.state()).state is PartitionState.RUNNING
        assert (await ended(machine)).status == 137
        assert ProcessIdentity.of(wrapper) is None

    driven(story())


def test_a_wrapper_that_was_killed_takes_only_the_status_with_it(yard: Yard) -> None:
    async def story() -> None:
        machine = await Machine.start(yard.spec())
        os.kill(parent_of(machine.identity.pid), signal.SIGKILL)
        await machine.resume()
        assert (await machine.state()).state is PartitionState.RUNNING
        report = await ended(machine)
        assert report.status is None
        assert "unknown" in str(report)

    driven(story())


_STARTER = """
import asyncio, sys
from mullion.hypervisor import Machine
from tests.framework.machines import Yard
async def main():
    yard = Yard.__new__(Yard)
    from mullion.base.paths import HostPaths
    yard.host = HostPaths(*sys.argv[1:3])
    spec = yard.spec()
    machine = await Machine.start(spec)
    await machine.resume()
    print(spec.uuid, flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


def test_a_machine_survives_its_parent_and_is_adopted(yard: Yard) -> None:
    paths = yard.paths()
    parent = subprocess.Popen(
        [sys.executable, "-c", _STARTER, yard.host.data_dir, yard.host.run_dir], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent:
        uuid = parent.stdout.readline().strip()
        parent.kill()
        parent.wait()

    async def story() -> None:
        identity = read_identity(paths.qemu_identity)
        assert identity is not None
        assert identity.is_alive
        begun = time.monotonic()
        machine = await Machine.adopt(paths, identity, uuid)
        print(f"adopted in {(time.monotonic() - begun) * 1000:.1f} ms")
        assert (await machine.state()).state is PartitionState.RUNNING
        assert machine.identity == identity
        report = await ended(machine)
        assert report.status == 137, "the wrapper was nobody's child by then, and still kept the status"

    driven(story())


def test_stale_files_of_a_crashed_host_do_not_hinder_a_start(yard: Yard) -> None:
    spec = yard.spec()
    paths = spec.paths
    os.makedirs(paths.run)
    for path in (paths.qmp, paths.qmp_rescue, paths.agent, paths.console):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
    write_identity(paths.qemu_identity, ProcessIdentity(os.getpid(), 1, "another-boot"))
    Path(paths.exit_file).write_text("137\n")

    async def story() -> None:
        identity = read_identity(paths.qemu_identity)
        assert identity is not None
        with pytest.raises(MachineGoneError, match="has ended"):
            await Machine.adopt(paths, identity, spec.uuid)
        machine = await Machine.start(spec)
        assert machine.exit_report is None
        report = await machine.quit()
        assert report.status == 0
        await machine.close()

    driven(story())


def test_a_pid_that_is_another_process_now_is_never_touched(yard: Yard) -> None:
    spec = yard.spec()
    with subprocess.Popen(["sleep", "3600"]) as stranger:
        real = ProcessIdentity.of(stranger.pid)
        assert real is not None
        old = ProcessIdentity(stranger.pid, real.start_ticks - 1, boot_id())

        async def story() -> None:
            with pytest.raises(MachineGoneError):
                await Machine.adopt(spec.paths, old, spec.uuid)
            assert not old.send_signal(signal.SIGKILL)
            assert real.is_alive

        driven(story())
        stranger.kill()


def test_waiting_for_a_pid_that_is_another_process_now_ends_at_once() -> None:
    async def story() -> None:
        real = ProcessIdentity.of(os.getpid())
        assert real is not None
        await wait_process(ProcessIdentity(real.pid, real.start_ticks - 1, boot_id()))
        with subprocess.Popen(["sleep", "3600"]) as child:
            identity = ProcessIdentity.of(child.pid)
            assert identity is not None
            waiting = asyncio.create_task(wait_process(identity))
            await asyncio.sleep(0)
            assert not waiting.done()
            child.kill()
            await waiting

    driven(story())


def test_a_machine_of_another_uuid_is_not_adopted_and_runs_on(yard: Yard) -> None:
    async def story() -> None:
        machine = await Machine.start(yard.spec())
        await machine.close()
        with pytest.raises(MachineGoneError, match="a machine with UUID"):
            await Machine.adopt(machine.paths, machine.identity, "00000000-0000-4000-8000-000000000000")
        assert machine.identity.is_alive
        machine.identity.send_signal(signal.SIGKILL)

    driven(story())


def test_a_held_monitor_is_left_to_its_holder(yard: Yard) -> None:
    async def story() -> None:
        first = await Machine.start(yard.spec())
        spec_uuid = (await first.execute("query-uuid"))["UUID"]  # type: ignore[index]
        await first.close()
        with socket.socket(socket.AF_UNIX) as holder:
            holder.connect(first.paths.qmp)
            assert b"QMP" in holder.recv(4096)
            machine = await Machine.adopt(first.paths, first.identity, spec_uuid)  # through the rescue monitor
            assert (await machine.state()).run_state == "prelaunch"
            with pytest.raises(MonitorError, match="no greeting"):
                await Machine.adopt(first.paths, first.identity, spec_uuid)
        assert (await ended(machine)).status == 137

    driven(story())


def test_a_lost_monitor_session_is_opened_again(yard: Yard) -> None:
    async def story() -> None:
        machine = await Machine.start(yard.spec())
        told: asyncio.Queue[str] = asyncio.Queue()
        machine.subscribe(lambda event: told.put_nowait(event.name))
        session = machine._session
        assert session is not None
        await session.close()
        await machine.resume()
        assert await told.get() == "RESUME", "events arrive over the new session as well"
        assert machine._session is not session
        assert (await ended(machine)).status == 137

    driven(story())


def test_what_qemu_refuses_is_told_and_harmless(yard: Yard) -> None:
    async def story() -> None:
        machine = await Machine.start(yard.spec())
        with pytest.raises(MonitorRefusedError, match="QEMU refused device_del: Device 'nobody' not found") as caught:
            await machine.execute("device_del", {"id": "nobody"})
        assert caught.value.context == {"command": "device_del", "reason": "DeviceNotFound"}
        assert (await machine.state()).run_state == "prelaunch"
        await ended(machine)

    driven(story())


@pytest.mark.parametrize("count", [10])
def test_many_start_at_once(yard: Yard, count: int) -> None:
    async def story() -> None:
        specs: list[MachineSpec] = [replace(yard.spec(f"p{number}")) for number in range(count)]
        machines = await asyncio.gather(*(Machine.start(spec) for spec in specs))
        assert len({machine.identity for machine in machines}) == count
        reports = await asyncio.gather(*(machine.quit() for machine in machines))
        assert all(report.is_clean for report in reports)
        for machine in machines:
            await machine.close()

    driven(story())


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
