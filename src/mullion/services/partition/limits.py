"""Caps on disks: from the definition to the provider, at its start and whenever either has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from mullion.model.definition import DiskLimits, PartitionDefinition
from mullion.services.partition.provider_link import ProviderLink


def limits_fields(limits: DiskLimits | None) -> Mapping[str, Any]:
    """As the provider takes them."""
    fields: Mapping[str, Any] = {} if limits is None else msgspec.to_builtins(limits)
    return fields


def disk_limits(definition: PartitionDefinition, disk_id: str) -> Mapping[str, Any]:
    """Those of one disk; none for a disk that the definition does not know any more."""
    return limits_fields(next((disk.limits for disk in definition.disks if disk.id == disk_id), None))


async def follow_limits(link: ProviderLink, definition: PartitionDefinition) -> None:
    """Have a provider keep the caps of the definition; those that it keeps already are left as they are.

    Raises: what `ProviderLink.request` raises.
    """
    status = await link.request("status")
    wanted = DiskLimits() if definition.disk_limits is None else definition.disk_limits
    if status.get("limits") != _shown(wanted):
        await link.request("throttle", disk=None, limits=limits_fields(definition.disk_limits))
    for disk in status.get("disks", ()):
        if "throttle" not in disk:
            continue  # an older provider, which knows no caps
        attached = next((one.limits for one in definition.disks if one.id == disk["id"]), None)
        if disk["throttle"]["limits"] != _shown(attached or DiskLimits()):
            await link.request("throttle", disk=disk["id"], limits=limits_fields(attached))


def _shown(limits: DiskLimits) -> dict[str, Any]:
    """As a provider shows them: what is limited."""
    fields = {name: value for name, value in msgspec.to_builtins(limits).items() if value and name != "burst_s"}
    has_burst = limits.iops_burst or limits.bytes_per_s_burst
    return {**fields, "burst_s": limits.burst_s} if has_burst else fields
