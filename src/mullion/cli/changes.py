"""What differs between two definitions, in the words of the definition. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec
from msgspec.structs import replace

from mullion.base.units import format_size
from mullion.model.definition import DiskAttachment, PartitionDefinition

_NOTHING: Final = "nothing"


def adopt_what_the_service_gave(
    wanted: PartitionDefinition, present: PartitionDefinition, *, says_power: bool
) -> PartitionDefinition:
    """The wanted definition, completed by what its author left to the service: uuid, ids of disks, and power.

    A file that does not speak of power neither starts nor stops anything.
    """
    known = {disk.path: disk.id for disk in present.disks}
    taken = {disk.id for disk in wanted.disks}
    disks = tuple(_with_known_id(disk, known, taken) for disk in wanted.disks)
    return replace(
        wanted,
        uuid=wanted.uuid or present.uuid,
        power=wanted.power if says_power else present.power,
        disks=disks,
    )


def _with_known_id(disk: DiskAttachment, known: dict[str, str], taken: set[str]) -> DiskAttachment:
    identity = known.get(disk.path, "")
    return replace(disk, id=identity) if not disk.id and identity not in taken else disk


def changes(before: PartitionDefinition, after: PartitionDefinition) -> list[str]:
    """One line for each field that differs: `memory_bytes: 512 MiB → 1 GiB`."""
    old, new = dict(_flat("", msgspec.to_builtins(before))), dict(_flat("", msgspec.to_builtins(after)))
    return [
        f"{name}: {_shown(name, old.get(name))} → {_shown(name, new.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _flat(prefix: str, value: object) -> Iterator[tuple[str, object]]:
    """Every leaf of a document with its path: `disks[0].path`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _flat(f"{prefix}[{index}]", inner)
    elif value is not None:
        yield prefix, value


def _shown(name: str, value: object) -> str:
    if value is None or value == "":
        return _NOTHING
    if name.endswith("_bytes") and isinstance(value, int):
        return format_size(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
