"""QEMU's command line as pure data: a machine's specification in, the arguments out.

Spec: qemu(1) of version 7.2; options are chosen so that 7.2 and later take the same line.

PCI slots are fixed, on q35 and pc alike, so that a guest finds a device where it was after another was added:

    02 VGA · 03 virtio-serial (agent) · 04 virtio-rng · 05 watchdog i6300esb · 06 pvpanic-pci (q35)
    08.0-08.5 spare root ports rp0-rp5 (q35, for hot-plug) · 0a-19 synthetic disks, in order · 1a-1e free for network

Invariants: nothing here reads a file, the environment or the clock; equal input gives equal output; the machine starts
with its processors stopped (`-S`) and stays when the guest powers off (`-no-shutdown`), so that the parent reads
the reason from QEMU's state, not from an event that it may have missed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import InvalidError
from mullion.base.paths import PartitionPaths
from mullion.base.units import MIB
from mullion.model.definition import Accelerator, Bus, Firmware, Machine, PartitionDefinition, Transport

QEMU: Final = "qemu-system-x86_64"
SPARE_ROOT_PORTS: Final = 6
RECONNECT_S: Final = 1
"""How often QEMU tries to reach a provider that went away; QEMU 7.2 counts in whole seconds."""
DISK_THREAD: Final = "disks"
"""QEMU's thread for the virtio disks that it serves by NBD: without it they wait for the main loop, and the processors
that TCG emulates wait with them when they want the lock of that."""
NBD_RECONNECT_S: Final = 30
"""How long requests over NBD wait for a provider that went away, before they fail and pause the guest."""
VHOST_QUEUE_SIZE: Final = 256
"""Descriptors of a queue: as many as QEMU's own virtio-blk has, and `virtio_blk.SEG_MAX` and two at least."""
SATA_PORTS: Final = 6
IDE_UNITS: Final = 4
VIRTIO_SLOTS: Final = 16
TCG_CPU: Final = "max,la57=off"
"""All that TCG emulates but five-level paging: a kernel that sees it uses it, and each page walk gets longer."""
HYPERV_FLAGS: Final = (
    "hv-relaxed=on,hv-vapic=on,hv-spinlocks=0x1fff,hv-vpindex=on,hv-runtime=on,hv-time=on,"
    "hv-synic=on,hv-stimer=on,hv-frequencies=on"
)
SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

LISTENER_NAMES: Final = ("qmp", "rescue", "agent", "console")
"""The sockets on which QEMU listens."""


@dataclass(frozen=True, slots=True)
class ResolvedDisk:
    """A disk whose provider serves it on `socket`: vhost-user-blk or NBD for a virtio disk, NBD for an emulated one."""

    id: str
    bus: Bus
    socket: str
    read_only: bool = False
    serial: str = ""
    export: str = ""
    transport: Transport = Transport.VHOST_USER


@dataclass(frozen=True, slots=True)
class FirmwareFiles:
    """UEFI: the code (read-only, shared) and this partition's variables."""

    code: str
    variables: str


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """All that is needed to start a partition, resolved: nothing is looked up later.

    `run_as` is the user and group id under which QEMU runs (needs root), None for our own; `extra_groups` are more
    groups of it, besides the one that may open /dev/kvm.
    `max_vcpus` and `max_memory_bytes` reserve room for hot-plug; a guest pays for both, so None reserves nothing.
    """

    definition: PartitionDefinition
    uuid: str
    paths: PartitionPaths
    accelerator: Accelerator
    disks: tuple[ResolvedDisk, ...] = ()
    firmware: FirmwareFiles | None = None
    run_as: tuple[int, int] | None = None
    extra_groups: tuple[int, ...] = ()
    qemu: str = QEMU
    max_vcpus: int | None = None
    max_memory_bytes: int | None = None
    enlightenments: bool = True
    machine_type: str | None = None
    """The versioned machine type (`pc-q35-7.2`) that a saved state needs; None for the newest that QEMU has."""
    loads_state: bool = False
    """QEMU waits for a saved state before anything else (`Machine.load_state`)."""


def cmdline(spec: MachineSpec, listeners: Mapping[str, int] | None = None) -> tuple[str, ...]:
    """The arguments, from the program on.

    `listeners` are inherited descriptors that already listen, one for each of `LISTENER_NAMES`; without them QEMU binds
    the sockets itself, which is the form for a shell.
    Raises: InvalidError for disks that the machine has no place for, or an unresolved accelerator.
    """
    return tuple(_arguments(spec, listeners))


def shell_line(argv: Sequence[str]) -> str:
    """The command as a line that can be pasted into a shell."""
    return shlex.join(argv)


def _arguments(spec: MachineSpec, listeners: Mapping[str, int] | None) -> Iterator[str]:
    definition, paths = spec.definition, spec.paths
    q35 = definition.machine is Machine.Q35
    yield from (spec.qemu, "-name", f"guest={definition.name},debug-threads=on", "-uuid", spec.uuid)
    yield from ("-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX)
    yield from ("-S", "-no-shutdown", "-action", "panic=pause", "-msg", "timestamp=on")
    if spec.loads_state:
        yield from ("-incoming", "defer")
    yield from _processor(spec)
    yield from _memory(spec)
    yield from ("-rtc", "base=utc", "-boot", "strict=on")
    yield from ("-global", "ICH9-LPC.disable_s3=1" if q35 else "PIIX4_PM.disable_s3=1")

    yield from _listening("qmp", paths.qmp, listeners)
    yield from ("-mon", "chardev=qmp,mode=control")
    yield from _listening("rescue", paths.qmp_rescue, listeners)
    yield from ("-mon", "chardev=rescue,mode=control")
    yield from _listening("console", paths.console, listeners, logfile=paths.console_log, logappend="on")
    yield from ("-serial", "chardev:console")

    bus = "pcie.0" if q35 else "pci.0"
    yield from _device("VGA", bus=bus, addr="02")
    yield from _listening("agent", paths.agent, listeners)
    yield from _device("virtio-serial-pci", id="serial", bus=bus, addr="03")
    yield from _device("virtserialport", bus="serial.0", nr="1", chardev="agent", name="org.qemu.guest_agent.0")
    if definition.tpm:
        yield from ("-chardev", _options("socket", id="tpm", path=paths.tpm), "-tpmdev", "emulator,id=tpm,chardev=tpm")
        # SeaBIOS and Linux know both; Windows wants the newer interface, which exists with UEFI only.
        yield from _device("tpm-crb" if definition.firmware is Firmware.UEFI else "tpm-tis", tpmdev="tpm")
    yield from ("-object", "rng-builtin,id=random")
    yield from _device("virtio-rng-pci", rng="random", bus=bus, addr="04")
    yield from _device("i6300esb", id="watchdog", bus=bus, addr="05")
    if q35:
        yield from _device("pvpanic-pci", bus=bus, addr="06")
        for port in range(SPARE_ROOT_PORTS):
            yield from _device(
                "pcie-root-port",
                id=f"rp{port}",
                bus=bus,
                addr=f"08.{port}",
                multifunction="on",
                chassis=str(port + 1),
                slot=str(port + 1),
            )
    else:
        yield from _device("pvpanic")
    yield from _disks(spec, bus)
    if (boot := definition.direct_boot) is not None:
        yield from ("-kernel", boot.kernel)
        if boot.initrd is not None:
            yield from ("-initrd", boot.initrd)
        if boot.command_line:
            yield from ("-append", boot.command_line)


def _processor(spec: MachineSpec) -> Iterator[str]:
    definition = spec.definition
    match spec.accelerator:
        case Accelerator.KVM:
            yield from ("-accel", "kvm")
            yield from ("-cpu", f"host,migratable=on,{HYPERV_FLAGS}" if spec.enlightenments else "host,migratable=on")
        case Accelerator.TCG:
            yield from ("-accel", "tcg,thread=multi", "-cpu", TCG_CPU)
        case Accelerator.AUTO:
            raise InvalidError(
                f"partition {definition.name}: the accelerator is not chosen yet",
                remedy="This is a fault in Mullion: probe the accelerator before the command line is made.",
            )
    most = max(definition.vcpus, spec.max_vcpus or 0)
    yield from ("-smp", f"{definition.vcpus},sockets=1,cores={most},threads=1,maxcpus={most}")


def _memory(spec: MachineSpec) -> Iterator[str]:
    definition = spec.definition
    size = f"{definition.memory_bytes // MIB}M"
    machine = f"{spec.machine_type or definition.machine.value},memory-backend=mem,graphics=off"
    if spec.firmware is not None:
        machine += ",pflash0=firmware-code,pflash1=firmware-vars"
    elif definition.firmware is Firmware.UEFI:
        raise InvalidError(
            f"partition {definition.name}: UEFI without firmware files",
            remedy="This is a fault in Mullion: prepare the firmware before the command line is made.",
        )
    yield from ("-object", f"memory-backend-memfd,id=mem,size={size},share=on", "-machine", machine)
    if spec.max_memory_bytes is None:
        yield from ("-m", size)
    else:
        yield from ("-m", f"{size},slots=4,maxmem={spec.max_memory_bytes // MIB}M")
    if spec.firmware is not None:
        yield from _blockdev(node="firmware-code", read_only=True, file=spec.firmware.code)
        yield from _blockdev(node="firmware-vars", read_only=False, file=spec.firmware.variables)


def _disks(spec: MachineSpec, bus: str) -> Iterator[str]:
    definition = spec.definition
    counts = dict.fromkeys(Bus, 0)
    if any(disk.bus is Bus.VIRTIO and disk.transport is Transport.NBD for disk in spec.disks):
        yield from ("-object", f"iothread,id={DISK_THREAD}")
    for index, disk in enumerate(spec.disks, start=1):  # boot index 0 belongs to a kernel of the host (-kernel)
        place, counts[disk.bus] = counts[disk.bus], counts[disk.bus] + 1
        match disk.bus:
            case Bus.VIRTIO:
                _check_place(definition, disk, place, VIRTIO_SLOTS)
                where = {"bus": bus, "addr": f"{0x0A + place:02x}", "num-queues": "1", "config-wce": "off"}
                if disk.transport is Transport.NBD:
                    yield from _over_nbd(disk, "virtio-blk-pci", index, iothread=DISK_THREAD, **where)
                    continue
                name = f"disk-{disk.id}"  # our prefix: a disk may be called `watchdog`
                yield from ("-chardev", _options("socket", id=name, path=disk.socket, reconnect=str(RECONNECT_S)))
                yield from _device(
                    "vhost-user-blk-pci",
                    id=name,
                    chardev=name,
                    bootindex=str(index),
                    **{"queue-size": str(VHOST_QUEUE_SIZE)},
                    **where,
                )
            case Bus.SATA:
                if definition.machine is not Machine.Q35:
                    raise _wrong_machine(definition, disk, "q35", "ide")
                _check_place(definition, disk, place, SATA_PORTS)
                yield from _emulated(disk, index, bus=f"ide.{place}")
            case Bus.IDE:
                if definition.machine is not Machine.PC:
                    raise _wrong_machine(definition, disk, "pc", "sata")
                _check_place(definition, disk, place, IDE_UNITS)
                yield from _emulated(disk, index, bus=f"ide.{place // 2}", unit=str(place % 2))


def _emulated(disk: ResolvedDisk, index: int, **place: str) -> Iterator[str]:
    if disk.read_only:
        raise InvalidError(
            f"disk {disk.id} is read-only, which the emulated bus {disk.bus.value} cannot express",
            remedy="Put the disk on bus virtio, or put a differencing disk over it and attach that.",
            disk=disk.id,
        )
    yield from _over_nbd(disk, "ide-hd", index, **place)


def _over_nbd(disk: ResolvedDisk, driver: str, index: int, **options: str) -> Iterator[str]:
    """A disk of QEMU's own, backed by the provider's NBD export. What fails pauses the guest; `cont` repeats it."""
    name = f"disk-{disk.id}"
    node = {
        "driver": "nbd",
        "node-name": name,
        "read-only": disk.read_only,
        "server": {"type": "unix", "path": disk.socket},
        "export": disk.export,
        "reconnect-delay": NBD_RECONNECT_S,
        "discard": "unmap",
    }
    yield from ("-blockdev", json.dumps(node))
    yield from _device(
        driver,
        id=name,
        drive=name,
        serial=disk.serial or disk.id,
        bootindex=str(index),
        werror="stop",
        rerror="stop",
        **options,
    )


def _check_place(definition: PartitionDefinition, disk: ResolvedDisk, place: int, limit: int) -> None:
    if place >= limit:
        raise InvalidError(
            f"partition {definition.name}: disk {disk.id} is one more than the {limit} that bus {disk.bus.value} takes",
            remedy="Put some of the disks on bus virtio, or leave some out.",
            disk=disk.id,
        )


def _wrong_machine(definition: PartitionDefinition, disk: ResolvedDisk, machine: str, other: str) -> InvalidError:
    return InvalidError(
        f"partition {definition.name}: disk {disk.id} is on bus {disk.bus.value}, "
        f"which machine {definition.machine.value} does not have",
        remedy=f"Choose machine {machine}, or put the disk on bus {other} or virtio.",
        disk=disk.id,
    )


def _listening(name: str, path: str, listeners: Mapping[str, int] | None, **more: str) -> Iterator[str]:
    where = {"path": path} if listeners is None else {"fd": str(listeners[name])}
    yield from ("-chardev", _options("socket", id=name, **where, server="on", wait="off", **more))


def _blockdev(*, node: str, read_only: bool, file: str) -> Iterator[str]:
    tree = {"driver": "raw", "node-name": node, "read-only": read_only, "file": {"driver": "file", "filename": file}}
    yield from ("-blockdev", json.dumps(tree))


def _device(driver: str, **options: str) -> Iterator[str]:
    yield from ("-device", _options(driver, **options))


def _options(head: str, **options: str) -> str:
    """QEMU's option string; a comma within a value is doubled."""
    return ",".join([head, *(f"{name}={value.replace(',', ',,')}" for name, value in options.items())])
