"""The command line is pure data: golden lines, and what it refuses."""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import replace

import pytest

from mullion.base.errors import InvalidError
from mullion.base.paths import PartitionPaths
from mullion.base.units import GIB, MIB
from mullion.hypervisor.cmdline import (
    LISTENER_NAMES,
    VHOST_QUEUE_SIZE,
    FirmwareFiles,
    MachineSpec,
    ResolvedDisk,
    cmdline,
    shell_line,
)
from mullion.model.definition import Accelerator, Bus, DirectBoot, Firmware, Machine, PartitionDefinition, Transport
from mullion.wire.vhost_user.virtio_blk import SEG_MAX

pytestmark = pytest.mark.unit

PATHS = PartitionPaths("/d/web", "/r/web")
UUID = "5a6e3d6c-9b0e-4b39-8d7e-0c6f1f0e2a11"
GOLDEN = os.path.join(os.path.dirname(__file__), "golden")


def spec_of(definition: PartitionDefinition, *disks: ResolvedDisk) -> MachineSpec:
    return MachineSpec(definition, UUID, PATHS, Accelerator.TCG, disks=disks)


def virtio(disk_id: str) -> ResolvedDisk:
    return ResolvedDisk(disk_id, Bus.VIRTIO, PATHS.vhost_user(disk_id))


def emulated(disk_id: str, bus: Bus) -> ResolvedDisk:
    return ResolvedDisk(disk_id, bus, PATHS.nbd(disk_id))


Q35 = PartitionDefinition("web", vcpus=2, memory_bytes=512 * MIB)
PC = PartitionDefinition("old", memory_bytes=128 * MIB, machine=Machine.PC)

CASES = {
    "q35-two-synthetic-disks": spec_of(Q35, virtio("d0"), virtio("d1")),
    "q35-sata": spec_of(Q35, emulated("d0", Bus.SATA), virtio("d1")),
    "q35-synthetic-over-nbd": spec_of(
        Q35, ResolvedDisk("d0", Bus.VIRTIO, PATHS.nbd("d0"), export="d0", transport=Transport.NBD, read_only=True)
    ),
    "pc-ide": spec_of(PC, emulated("d0", Bus.IDE), emulated("d1", Bus.IDE), emulated("d2", Bus.IDE)),
    "q35-kvm-uefi": replace(
        spec_of(PartitionDefinition("win", firmware=Firmware.UEFI)),
        accelerator=Accelerator.KVM,
        firmware=FirmwareFiles("/usr/share/OVMF/OVMF_CODE_4M.fd", "/d/web/firmware-vars.fd"),
    ),
    "q35-tpm": spec_of(PartitionDefinition("keys", tpm=True)),
    "q35-uefi-tpm-saved": replace(
        spec_of(PartitionDefinition("win", firmware=Firmware.UEFI, tpm=True)),
        firmware=FirmwareFiles("/usr/share/OVMF/OVMF_CODE_4M.fd", "/d/web/firmware-vars.fd"),
        machine_type="pc-q35-7.2",
        loads_state=True,
    ),
    "q35-direct-boot": spec_of(
        PartitionDefinition("kern", direct_boot=DirectBoot("/k/vmlinuz", "/k/initrd", "console=ttyS0 quiet")),
        virtio("d0"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    """One option a line. To accept a change: MULLION_GOLDEN=write pytest tests/unit/hypervisor/test_cmdline.py"""
    text = re.sub(r" (?=-[a-z-]+ |-S |-nodefaults|-no-)", "\n", shell_line(cmdline(CASES[name]))) + "\n"
    path = f"{GOLDEN}/{name}.txt"
    if os.environ.get("MULLION_GOLDEN") == "write":
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    with open(path, encoding="utf-8") as file:
        assert text == file.read()


def pairs(argv: tuple[str, ...], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(argv) if name == option]


def test_descriptors_take_the_place_of_paths_and_change_nothing_else() -> None:
    spec = CASES["q35-two-synthetic-disks"]
    listeners = {name: number for number, name in enumerate(LISTENER_NAMES, start=10)}
    by_path, by_descriptor = cmdline(spec), cmdline(spec, listeners)
    assert len(by_path) == len(by_descriptor)
    changed = [(a, b) for a, b in zip(by_path, by_descriptor, strict=True) if a != b]
    assert len(changed) == len(LISTENER_NAMES)
    for before, after in changed:
        assert re.sub(r"path=[^,]*", "", before) == re.sub(r"fd=\d+", "", after)


def test_equal_input_gives_equal_output() -> None:
    for spec in CASES.values():
        assert cmdline(spec) == cmdline(replace(spec))


def test_every_disk_has_its_own_boot_index_in_order() -> None:
    argv = cmdline(spec_of(Q35, virtio("a"), emulated("b", Bus.SATA), virtio("c")))
    indices = [re.search(r"id=disk-(\w+).*bootindex=(\d+)", device) for device in pairs(argv, "-device")]
    assert [match.groups() for match in indices if match] == [("a", "1"), ("b", "2"), ("c", "3")]


def test_a_disk_may_have_the_name_of_one_of_our_devices() -> None:
    names = ("serial", "watchdog", "mem", "rp0", "qmp", "agent", "console", "random")
    argv = cmdline(spec_of(Q35, *(virtio(name) for name in names)))
    for option in ("-device", "-chardev"):
        ids = [match.group(1) for value in pairs(argv, option) if (match := re.search(r"\bid=([^,]+)", value))]
        assert len(ids) == len(set(ids))


def test_a_slot_is_used_once() -> None:
    argv = cmdline(spec_of(Q35, *(virtio(f"d{number}") for number in range(16))))
    slots = [match.group(1) for device in pairs(argv, "-device") if (match := re.search(r"addr=([0-9a-f.]+)", device))]
    assert len(slots) == len(set(slots))


def test_a_comma_in_a_path_stays_in_the_path() -> None:
    paths = PartitionPaths("/d/a,b", "/r/a,b")
    disks = (ResolvedDisk("d0", Bus.VIRTIO, paths.vhost_user("d0")), ResolvedDisk("d1", Bus.SATA, paths.nbd("d1")))
    argv = cmdline(replace(spec_of(Q35, *disks), paths=paths))
    assert "socket,id=disk-d0,path=/r/a,,b/d0.vhost,reconnect=1" in pairs(argv, "-chardev")
    assert json.loads(pairs(argv, "-blockdev")[0])["server"]["path"] == "/r/a,b/d1.nbd"


def test_hot_plug_room_is_reserved_only_when_asked() -> None:
    plain = cmdline(spec_of(Q35))
    assert pairs(plain, "-smp") == ["2,sockets=1,cores=2,threads=1,maxcpus=2"]
    assert pairs(plain, "-m") == ["512M"]
    roomy = cmdline(replace(spec_of(Q35), max_vcpus=8, max_memory_bytes=4 * GIB))
    assert pairs(roomy, "-smp") == ["2,sockets=1,cores=8,threads=1,maxcpus=8"]
    assert pairs(roomy, "-m") == ["512M,slots=4,maxmem=4096M"]


def test_enlightenments_only_with_kvm() -> None:
    kvm = replace(spec_of(Q35), accelerator=Accelerator.KVM)
    assert "hv-relaxed=on" in pairs(cmdline(kvm), "-cpu")[0]
    assert "hv-" not in pairs(cmdline(replace(kvm, enlightenments=False)), "-cpu")[0]
    assert "hv-" not in pairs(cmdline(spec_of(Q35)), "-cpu")[0]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (spec_of(PC, emulated("d0", Bus.SATA)), "disk d0 is on bus sata, which machine pc does not have"),
        (spec_of(Q35, emulated("d0", Bus.IDE)), "disk d0 is on bus ide, which machine q35 does not have"),
        (spec_of(Q35, *(emulated(f"d{n}", Bus.SATA) for n in range(7))), "disk d6 is one more than the 6"),
        (spec_of(PC, *(emulated(f"d{n}", Bus.IDE) for n in range(5))), "disk d4 is one more than the 4"),
        (spec_of(Q35, *(virtio(f"d{n}") for n in range(17))), "disk d16 is one more than the 16"),
        (spec_of(Q35, replace(emulated("d0", Bus.SATA), read_only=True)), "disk d0 is read-only"),
        (replace(spec_of(Q35), accelerator=Accelerator.AUTO), "accelerator is not chosen"),
        (spec_of(PartitionDefinition("web", firmware=Firmware.UEFI)), "UEFI without firmware files"),
    ],
)
def test_what_has_no_place_is_refused_by_name(spec: MachineSpec, words: str) -> None:
    with pytest.raises(InvalidError, match=words) as caught:
        cmdline(spec)
    assert caught.value.remedy


def test_the_shell_line_survives_a_shell() -> None:
    import shlex

    argv = cmdline(CASES["q35-sata"])
    assert tuple(shlex.split(shell_line(argv))) == argv


def test_queue_has_room_for_the_largest_request_that_the_provider_offers() -> None:
    """A driver that does without indirect descriptors needs one for each segment, and two."""
    assert SEG_MAX + 2 <= VHOST_QUEUE_SIZE
