"""What differs between two definitions, in the words of the definition. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec
from msgspec.structs import replace

from mullion.base.units import format_size
from mullion.model.definition import PartitionDefinition

_NOTHING: Final = "nothing"


def adopt(wanted: PartitionDefinition, present: PartitionDefinition, *, says_power: bool) -> PartitionDefinition:
    """The wanted definition with what its author left to the service: the uuid and, if it is not spoken of, power."""
    return replace(wanted, uuid=wanted.uuid or present.uuid, power=wanted.power if says_power else present.power)


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
