"""QEMU without privileges, under UEFI, and with the accelerator that the probe chose: on this host, as it is."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tests.framework.machines import Yard, yard

from mullion.base.errors import InvalidError, MissingToolError, UnavailableError
from mullion.host import prepare_host_folders, prepare_partition_folders
from mullion.hypervisor import Machine
from mullion.hypervisor.accel import accelerator_check, probe_accelerator
from mullion.hypervisor.firmware import prepare_uefi
from mullion.model.definition import Accelerator, Firmware, PartitionDefinition
from mullion.model.states import PartitionState

pytestmark = pytest.mark.vm
__all__ = ["yard"]

USER = 30_123


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def printed(machine: Machine, words: str) -> None:
    """Wait until the console log has the words."""
    while words not in Path(machine.paths.console_log).read_text(errors="replace"):
        assert (await machine.state()).state is PartitionState.RUNNING
        await asyncio.sleep(0.05)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up root")
def test_qemu_runs_as_nobody_we_know_and_can_write_nothing_it_need_not(yard: Yard) -> None:
    os.chmod(yard.folder, 0o711)
    prepare_host_folders(yard.host, isolated=True)
    spec = yard.spec(run_as=(USER, USER))
    paths = spec.paths
    prepare_partition_folders(paths, spec.run_as)

    async def story() -> None:
        machine = await Machine.start(spec)
        await machine.resume()
        async with asyncio.timeout(60):
            await printed(machine, "No bootable device")  # it could write its console log
        status = status_of(machine.identity.pid)
        assert status["Uid"].split() == [str(USER)] * 4
        assert status["Gid"].split() == [str(USER)] * 4
        assert status["Groups"] == ""
        for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[capabilities], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        for path in (paths.run, paths.data, paths.qemu_identity, paths.qemu_log, paths.qmp):
            assert os.stat(path).st_uid == 0
        assert os.stat(paths.console_log).st_uid == USER
        report = await machine.quit()
        assert report.is_clean, "the wrapper, which is root, wrote the status"
        assert os.stat(paths.exit_file).st_uid == 0
        await machine.close()

    asyncio.run(story())


def test_uefi_boots_with_variables_of_its_own_and_keeps_them(yard: Yard) -> None:
    paths = yard.paths()
    files = prepare_uefi(paths)
    spec = replace(
        yard.spec(memory_bytes=256 * 1024 * 1024), definition=PartitionDefinition("p", firmware=Firmware.UEFI)
    )

    async def story() -> None:
        machine = await Machine.start(replace(spec, firmware=files))
        await machine.resume()
        async with asyncio.timeout(120):
            await printed(machine, "BdsDxe: ")
        await machine.kill()
        await machine.close()

    fresh = Path(files.variables).read_bytes()
    asyncio.run(story())
    used = Path(files.variables).read_bytes()
    assert used != fresh, "the firmware has written its variables"
    assert prepare_uefi(paths) == files
    assert Path(files.variables).read_bytes() == used
    Path(files.variables).write_bytes(b"of another build")
    prepare_uefi(paths)
    assert Path(files.variables).read_bytes() == fresh
    assert Path(f"{files.variables}.old").read_bytes() == b"of another build"


def test_uefi_without_its_package_names_it(yard: Yard) -> None:
    with pytest.raises(MissingToolError, match="OVMF") as caught:
        prepare_uefi(yard.paths(), pairs=(("/nowhere/code", "/nowhere/vars"),))
    assert "apt-get install ovmf" in caught.value.remedy


def test_the_probe_s_verdict_is_kept_and_holds(yard: Yard) -> None:
    cache = f"{yard.host.run_dir}/accelerator.json"
    first = probe_accelerator(cache)
    text = Path(cache).read_bytes() if os.path.exists(cache) else b""
    second = probe_accelerator(cache)
    assert (second.accelerator, second.reason, second.kvm_usable) == (first.accelerator, first.reason, first.kvm_usable)
    assert (Path(cache).read_bytes() if text else b"") == text
    assert first.reason.endswith(" is used")
    assert first.accelerator is (Accelerator.KVM if first.kvm_usable else Accelerator.TCG)
    assert accelerator_check(first).verdict == ("ok" if first.kvm_usable else "note")

    async def story() -> None:  # the accelerator that was chosen must run the firmware
        machine = await Machine.start(replace(yard.spec(), accelerator=first.accelerator))
        await machine.resume()
        async with asyncio.timeout(60):
            await printed(machine, "No bootable device")
        await machine.kill()
        await machine.close()

    asyncio.run(story())


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[1]", b'{"key": 7}', b"\xff\xfe", b'{"key": "other", "usable": true}']
)
def test_a_damaged_or_foreign_cache_is_probed_anew(yard: Yard, damage: bytes) -> None:
    fresh = probe_accelerator(f"{yard.host.run_dir}/a.json")
    cache = Path(yard.folder, "b.json")
    cache.write_bytes(damage)
    assert probe_accelerator(str(cache)).accelerator is fresh.accelerator
    assert cache.read_bytes() != damage or fresh.kvm_usable is None


def test_forcing(yard: Yard) -> None:
    cache = f"{yard.host.run_dir}/a.json"
    forced = probe_accelerator(cache, forced=Accelerator.TCG)
    assert (forced.accelerator, forced.kvm_usable) == (Accelerator.TCG, None)
    with pytest.raises(UnavailableError, match="KVM was asked for, but /dev/null-kvm is not there") as caught:
        probe_accelerator(cache, forced=Accelerator.KVM, device="/dev/null-kvm")
    assert "modprobe" in caught.value.remedy


def test_a_device_that_is_no_kvm_is_found_out(yard: Yard) -> None:
    choice = probe_accelerator(f"{yard.host.run_dir}/a.json", device="/dev/null")
    assert choice.accelerator is Accelerator.TCG
    assert "refuses a test guest" in choice.reason


def test_an_unresolved_accelerator_does_not_start(yard: Yard) -> None:
    with pytest.raises(InvalidError, match="accelerator is not chosen"):
        asyncio.run(Machine.start(replace(yard.spec(), accelerator=Accelerator.AUTO)))
