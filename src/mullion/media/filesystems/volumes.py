"""The volumes of a disk: the filesystem on the whole of it, or its partitions, and which one is meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mullion.base.block import BlockDevice
from mullion.base.units import format_size
from mullion.media.errors import FilesystemError, VolumeChoiceError
from mullion.media.filesystems.recognize import Recognised, recognize
from mullion.vhd.partitions import EXTENDED_TYPES, read_partitions

WHOLE: Final = 0
"""The number of the volume that is the whole disk."""

_FIRMWARE: Final = "EFI system"
_KINDS: Final = {
    "07": "Windows", "0b": "FAT32", "0c": "FAT32", "04": "FAT16", "06": "FAT16", "0e": "FAT16", "01": "FAT12",
    "27": "Windows recovery", "42": "Windows dynamic disk", "82": "Linux swap", "83": "Linux", "8e": "Linux LVM",
    "fd": "Linux RAID", "ef": _FIRMWARE, "a5": "FreeBSD", "af": "HFS",
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": _FIRMWARE, "e3c9e316-0b5c-4db8-817d-f92df00215ae": "Microsoft reserved",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "basic data", "de94bba4-06d1-4d40-a16a-bfd50179d6ac": "Windows recovery",
    "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3": "Windows dynamic disk",
    "e75caf8f-f680-4cee-afa3-b001e56efc2d": "Storage Spaces",
    "0fc63daf-8483-4772-8e79-3d69d8477de4": "Linux", "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap",
    "e6d6d379-f507-44c2-a23c-238f2a3df928": "Linux LVM", "a19d880f-05fc-4d3b-a006-743f0f84911e": "Linux RAID",
    "21686148-6449-6e6f-744e-656564454649": "BIOS boot", "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "Linux root",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Volume:
    """Where a filesystem may be; offset and length in bytes of the disk."""

    number: int
    offset: int
    length: int
    kind: str
    """What the partition table says that it is for."""
    name: str
    holds: Recognised

    def __str__(self) -> str:
        label = self.name or self.holds.label
        return f"{self.number} {self.holds.title}{f' {label!r}' if label else ''} ({format_size(self.length)})"


def list_volumes(device: BlockDevice) -> tuple[list[Volume], tuple[str, ...]]:
    """All volumes of a disk, and what is wrong with its partition table. Raises: what reading the device raises."""
    table = read_partitions(device)
    whole = Volume(WHOLE, 0, device.size_bytes, "whole disk", "", recognize(device, 0, device.size_bytes))
    if table is None:
        return [whole], ()
    volumes = [
        Volume(
            part.number,
            part.offset,
            part.length,
            _KINDS.get(part.kind, f"type {part.kind}"),
            part.name,
            recognize(device, part.offset, part.length),
        )
        for part in table.partitions
        if part.kind not in {f"{kind:02x}" for kind in EXTENDED_TYPES}
    ]
    # Images of CDs that also boot from a stick have a partition table in front of the filesystem on the whole.
    if whole.holds.kind is not None:
        volumes.insert(0, whole)
    return volumes, table.problems


def choose_volume(path: str, volumes: list[Volume], number: int | None) -> Volume:
    """The volume of that number; without one, the only one that can be read besides those of the firmware.

    Raises: VolumeChoiceError when the number is none of a volume, or several could be meant; FilesystemError when what
    was chosen, or all there is, cannot be read, with its name and what to do instead.
    """
    listed = ", ".join(map(str, volumes)) or "none"
    if number is not None:
        chosen = next((volume for volume in volumes if volume.number == number), None)
        if chosen is None:
            raise VolumeChoiceError(
                f"{path} has no volume {number}; it has: {listed}",
                remedy="Choose one of these with --volume.",
                path=path,
            )
        if chosen.holds.kind is None:
            raise _unreadable(path, chosen)
        return chosen
    readable = meant_volumes([volume for volume in volumes if volume.holds.kind is not None])
    if len(readable) == 1:
        return readable[0]
    if readable:
        raise VolumeChoiceError(
            f"{path} has several volumes: {listed}", remedy="Choose one with --volume, such as --volume "
            f"{readable[0].number}.", path=path,
        )  # fmt: skip
    if len(volumes) == 1:
        raise _unreadable(path, volumes[0])
    remedies = sorted({volume.holds.remedy for volume in volumes if volume.holds.remedy})
    raise FilesystemError(
        f"{path}: none of its volumes can be read: {listed}", remedy=" ".join(remedies) or None, path=path
    )


def meant_volumes(volumes: list[Volume]) -> list[Volume]:
    """Those that are meant by who names none: not what the firmware starts from, unless there is nothing else."""
    return [volume for volume in volumes if volume.kind != _FIRMWARE] or volumes


def _unreadable(path: str, volume: Volume) -> FilesystemError:
    where = "" if volume.number == WHOLE else f" in volume {volume.number}"
    return FilesystemError(
        f"{path} holds {volume.holds.title}{where}: there are no files that can be read here",
        remedy=volume.holds.remedy or None,
        path=path,
        offset=volume.offset,
    )
