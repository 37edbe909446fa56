"""Caps on disks: changed in a partition's definition, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from mullion.base.errors import InvalidError, NotFoundError
from mullion.base.units import format_size
from mullion.model.definition import DiskLimits

if TYPE_CHECKING:
    from mullion.client import Client
    from mullion.model.views import PartitionView

_NAMES: Final = {"": "", "read_": "reads: ", "write_": "writes: "}


def change_limits(client: Client, partition: str, disk_id: str | None, fields: Mapping[str, float]) -> PartitionView:
    """Replace the caps of a disk, or (None) of all disks together; without fields there are none any more.

    Raises: NotFoundError for an unknown disk; InvalidError for caps that make no sense; PreconditionError when somebody
    else changed the definition meanwhile.
    """
    view = client.partition(partition)
    definition = view.definition
    try:
        limits = msgspec.convert(dict(fields), DiskLimits, strict=False) if fields else None
    except msgspec.ValidationError as error:
        raise InvalidError(f"these caps are not possible: {error}") from error
    if disk_id is None:
        changed = msgspec.structs.replace(definition, disk_limits=limits)
    else:
        ids = [disk.id for disk in definition.disks]
        if disk_id not in ids:
            raise NotFoundError(
                f"partition {partition} has no disk {disk_id!r}",
                remedy=f"Its disks: {', '.join(ids) or 'none'}.",
                disk=disk_id,
            )
        disks = (
            msgspec.structs.replace(disk, limits=limits) if disk.id == disk_id else disk for disk in definition.disks
        )
        changed = msgspec.structs.replace(definition, disks=tuple(disks))
    return client.update_partition(partition, changed, view.etag)


def limits_words(limits: DiskLimits | None) -> str:
    """`500 requests/s, bursts of 2000 for 10 s; 50 MiB/s`."""
    if limits is None:
        return "no caps"
    words = []
    for prefix, name in _NAMES.items():
        iops, bytes_per_s = getattr(limits, f"{prefix}iops"), getattr(limits, f"{prefix}bytes_per_s")
        if iops:
            burst = limits.iops_burst if not prefix else 0
            words.append(
                f"{name}{iops} requests/s" + (f", bursts of {burst} for {limits.burst_s:g} s" if burst else "")
            )
        if bytes_per_s:
            burst = limits.bytes_per_s_burst if not prefix else 0
            more = f", bursts of {format_size(burst)}/s for {limits.burst_s:g} s" if burst else ""
            words.append(f"{name}{format_size(bytes_per_s)}/s{more}")
    return "; ".join(words) or "no caps"
