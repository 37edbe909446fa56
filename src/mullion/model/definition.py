"""Definitions: what an administrator wants a partition to be. Pure data, no I/O.

TOML for people, JSON on the wire, the same fields in both. Sizes are int bytes here; `mullion.model.parse` turns the
people's `512M` into them and says, when a field is wrong, which one and what is allowed.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

from msgspec import Meta, Struct, field

NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(?!\n)$"
"""A name is an RFC 1123 label: it serves as host name and as file name. `$` alone would let a last newline through."""

LABEL_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(?!\n)$"
"""What checkpoints and schedules are called."""
LABEL_FORM: Final = "letters, digits, `.`, `_` and `-`, a letter or digit first, at most 64 characters"

Name = Annotated[
    str, Meta(pattern=NAME_PATTERN, description="lower-case letters, digits and inner hyphens, at most 63 characters")
]
DiskId = Annotated[
    str,
    Meta(
        pattern=r"^([a-z][a-z0-9-]{0,15})?(?!\n)$",
        description="the disk's name within its partition: a lower-case letter, then letters, digits and hyphens, at "
        "most 16 characters; empty to have one assigned",
    ),
]
MemoryBytes = Annotated[int, Meta(ge=16 * 1024 * 1024, le=16 * 1024**4, multiple_of=1024 * 1024)]
VcpuCount = Annotated[int, Meta(ge=1, le=255)]
"""pc takes no more; q35 more only with an interrupt controller in the kernel and x2APIC, which TCG has not."""


class Bus(enum.Enum):
    """How the guest sees a disk: synthetic (virtio, needs a driver in the guest) or emulated (any guest knows it)."""

    VIRTIO = "virtio"
    SATA = "sata"
    IDE = "ide"


class Transport(enum.Enum):
    """How QEMU reaches the provider of a virtio disk; the guest sees the same device either way.

    `auto` takes shared memory (vhost-user) where the guest runs on KVM, and the NBD socket under TCG: translated code
    is not told of memory that another process writes (docs/adr/0009-transport-under-tcg.md).
    """

    AUTO = "auto"
    VHOST_USER = "vhost-user"
    NBD = "nbd"


class Machine(enum.Enum):
    """The machine type: q35 (PCI Express) or, for old guests, pc (1996's chipset)."""

    Q35 = "q35"
    PC = "pc"


class Firmware(enum.Enum):
    BIOS = "bios"
    UEFI = "uefi"


class Accelerator(enum.Enum):
    """Who runs the guest's instructions. `auto` takes KVM where a probe shows that it can run a guest, else TCG."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class PowerState(enum.Enum):
    """What an administrator wants: the reconciler brings it about."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


Rate = Annotated[int, Meta(ge=0, le=1 << 50)]


class DiskLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """Caps in requests and bytes a second, 0 for none. Changed while the partition runs, they hold at once.

    With a burst, a disk that was below its cap may do so many a second for `burst_s` seconds.
    """

    iops: Rate = 0
    read_iops: Rate = 0
    write_iops: Rate = 0
    bytes_per_s: Rate = 0
    read_bytes_per_s: Rate = 0
    write_bytes_per_s: Rate = 0
    iops_burst: Rate = 0
    bytes_per_s_burst: Rate = 0
    burst_s: Annotated[float, Meta(gt=0, le=3600)] = 1.0


class DiskAttachment(Struct, frozen=True, forbid_unknown_fields=True):
    """A VHD of a partition. `path` is absolute, or relative to the disk pool; chains are found from its top."""

    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    id: DiskId = ""
    bus: Bus = Bus.VIRTIO
    read_only: bool = False
    transport: Transport = Transport.AUTO
    limits: DiskLimits | None = None


class DirectBoot(Struct, frozen=True, forbid_unknown_fields=True):
    """Boot a kernel of the host instead of the disk's boot loader. Paths are absolute."""

    kernel: Annotated[str, Meta(pattern="^/")]
    initrd: Annotated[str, Meta(pattern="^/")] | None = None
    command_line: Annotated[str, Meta(max_length=2047)] = ""


class PartitionDefinition(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that an administrator says of a partition."""

    name: Name
    description: Annotated[str, Meta(max_length=1000)] = ""
    uuid: str = ""
    vcpus: VcpuCount = 1
    memory_bytes: MemoryBytes = 512 * 1024 * 1024
    machine: Machine = Machine.Q35
    firmware: Firmware = Firmware.BIOS
    tpm: bool = False
    accelerator: Accelerator = Accelerator.AUTO
    disks: Annotated[tuple[DiskAttachment, ...], Meta(max_length=16)] = ()
    disk_limits: DiskLimits | None = None
    """Of all disks together."""
    direct_boot: DirectBoot | None = None
    power: PowerState = PowerState.STOPPED
    shutdown_timeout_s: Annotated[int, Meta(ge=0, le=3600)] = 60
    labels: dict[str, str] = field(default_factory=dict)
