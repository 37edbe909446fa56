"""What a definition becomes before its processes start: folders, found disks, specifications of provider and QEMU."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from mullion.base.errors import InvalidError, NotFoundError
from mullion.base.paths import PartitionPaths
from mullion.hypervisor import MachineSpec, ResolvedDisk, cmdline
from mullion.hypervisor.cmdline import FirmwareFiles
from mullion.hypervisor.firmware import prepare_uefi
from mullion.model.definition import (
    Accelerator,
    Bus,
    DiskAttachment,
    Firmware,
    PartitionDefinition,
    Transport,
)
from mullion.services.disk.controller import DiskController
from mullion.services.partition.limits import disk_limits, limits_fields
from mullion.services.partition.record import PartitionRecord
from mullion.services.partition.run_file import PreparedDisk, Run
from mullion.vhd import DiskBusyError

_SERIAL_LIMIT_CHARS: Final = 20
"""VIRTIO_BLK_ID_BYTES; ATA serial numbers have as many."""


@dataclass(frozen=True, slots=True)
class Preparer:
    """Finds what a partition needs on this host. Blocking: call it in a thread."""

    disks: DiskController
    holders: Callable[[], Mapping[str, str]]

    def check_definition(self, definition: PartitionDefinition, paths: PartitionPaths) -> None:
        """Refuse what can never start.

        Raises: InvalidError that says what does not fit: disks and buses, or paths too long for sockets.
        """
        seen: set[str] = set()
        for position, disk in enumerate(definition.disks):
            path = self.disks.resolve(disk.path)
            if path in seen:
                raise InvalidError(
                    f"disks[{position}].path: {path} is attached twice", remedy="Attach each disk once.", field="disks"
                )
            seen.add(path)
        disks = tuple(
            PreparedDisk(disk.id, disk.bus, disk.read_only, (), choose_transport(disk, Accelerator.TCG))
            for disk in definition.disks
        )
        record = PartitionRecord(definition, uuid="", created_at="")
        cmdline(_machine(record, paths, Run(Accelerator.TCG, "", disks), FirmwareFiles("", "")))

    def find_disks(
        self,
        name: str,
        definition: PartitionDefinition,
        accelerator: Accelerator,
        heads: Mapping[str, str],
    ) -> tuple[PreparedDisk, ...]:
        """The chains of the definition's disks, and how QEMU will reach them; `heads` are tops by disk id.

        Raises: NotFoundError for a missing file; VhdError for a damaged one; DiskBusyError when another partition
        has it.
        """
        return tuple(
            PreparedDisk(
                id=disk.id,
                bus=disk.bus,
                read_only=disk.read_only,
                chain=self.find_chain(name, heads.get(disk.id) or self.disks.resolve(disk.path)),
                transport=choose_transport(disk, accelerator),
            )
            for disk in definition.disks
        )

    def find_chain(self, name: str, path: str) -> tuple[str, ...]:
        """The files of the disk whose top is this one, top first. Raises: as `find_disks`."""
        chain = tuple(file.path for file in self.disks.inspect(path).files)
        holders = self.holders()
        for file in chain:
            holder = holders.get(file)
            if holder is not None and holder != name:
                raise DiskBusyError(
                    f"{file} is open for writing in partition {holder}",
                    remedy=f"Stop it first: mullion partition stop {holder}; or attach another disk.",
                    path=file,
                    holder=holder,
                )
        return chain


def choose_transport(disk: DiskAttachment, accelerator: Accelerator) -> Transport:
    """How QEMU reaches the provider of a disk when this accelerator runs the guest (ADR 0009)."""
    if disk.bus is not Bus.VIRTIO:
        return Transport.NBD
    if disk.transport is not Transport.AUTO:
        return disk.transport
    return Transport.VHOST_USER if accelerator is Accelerator.KVM else Transport.NBD


def take_back_disks(run: Run, run_as: tuple[int, int] | None) -> None:
    """The provider has ended: its disks are the service's again, not of a user id that may be given anew."""
    if run_as is None:
        return
    for disk in run.disks:
        if not disk.read_only and os.path.exists(disk.chain[0]) and os.stat(disk.chain[0]).st_uid == run_as[0]:
            os.chown(disk.chain[0], os.geteuid(), os.getegid(), follow_symlinks=False)


def provider_spec(
    record: PartitionRecord,
    paths: PartitionPaths,
    disks: tuple[PreparedDisk, ...],
    *,
    allow_faults: bool = False,
    homecoming_rate: int = 0,
) -> Mapping[str, Any]:
    """The provider's specification (`mullion.provider.main.ProviderSpec`) as JSON."""
    return {
        "partition": record.definition.name,
        "control": paths.provider_control,
        "pending_dir": paths.pending_dir,
        "log": paths.provider_log,
        "uid": record.user_id,
        "gid": record.user_id,
        "limits": limits_fields(record.definition.disk_limits),
        "allow_faults": allow_faults,
        "homecoming_rate": homecoming_rate,
        "disks": [
            {
                "id": disk.id,
                "chain": list(disk.chain),
                "read_only": disk.read_only,
                "serial": serial_of(record, disk),
                "vhost_user": paths.vhost_user(disk.id) if disk.transport is Transport.VHOST_USER else None,
                "nbd": paths.nbd(disk.id),
                "limits": disk_limits(record.definition, disk.id),
                "backing": paths.backing(disk.id) if disk.id in record.coming_home else None,
            }
            for disk in disks
        ],
    }


def machine_spec(record: PartitionRecord, paths: PartitionPaths, run: Run) -> MachineSpec:
    """QEMU's specification. Raises: MissingToolError when the firmware is not installed."""
    record = msgspec.structs.replace(record, definition=run.definition or record.definition)
    uefi = record.definition.firmware is Firmware.UEFI
    return _machine(record, paths, run, prepare_uefi(paths, record.run_as) if uefi else None)


def _machine(record: PartitionRecord, paths: PartitionPaths, run: Run, firmware: FirmwareFiles | None) -> MachineSpec:
    return MachineSpec(
        definition=record.definition,
        uuid=record.uuid,
        paths=paths,
        accelerator=run.accelerator,
        firmware=firmware,
        run_as=record.run_as,
        disks=tuple(
            ResolvedDisk(
                id=disk.id,
                bus=disk.bus,
                read_only=disk.read_only,
                socket=paths.vhost_user(disk.id) if disk.transport is Transport.VHOST_USER else paths.nbd(disk.id),
                serial=serial_of(record, disk),
                export=disk.id,
                transport=disk.transport,
            )
            for disk in run.disks
        ),
    )


def check_direct_boot(definition: PartitionDefinition) -> None:
    """Raises: NotFoundError when a kernel or initrd of the definition is missing."""
    if definition.direct_boot is None:
        return
    for field, path in (("kernel", definition.direct_boot.kernel), ("initrd", definition.direct_boot.initrd)):
        if path is not None and not os.path.isfile(path):
            raise NotFoundError(f"direct_boot.{field}: {path} does not exist", remedy="Correct the path.", path=path)


def serial_of(record: PartitionRecord, disk: PreparedDisk) -> str:
    """A serial number that stays with partition and disk: the guest finds it in /dev/disk/by-id."""
    return f"{disk.id}-{record.uuid[:8]}"[-_SERIAL_LIMIT_CHARS:]
