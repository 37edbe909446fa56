"""What a running partition was started with, kept beside its sockets.

A definition may change while its partition runs, and so may the accelerator that a new start would choose. A provider
that has to be started again under a running guest needs what QEMU was told, not what would be told today.
"""

from __future__ import annotations

import msgspec

from mullion.base.files import replace_file
from mullion.base.paths import PartitionPaths
from mullion.model.definition import Accelerator, Bus, PartitionDefinition, Transport


class PreparedDisk(msgspec.Struct, frozen=True):
    """A disk of the definition, found: its chain of files, top first, and how QEMU reaches it."""

    id: str
    bus: Bus
    read_only: bool
    chain: tuple[str, ...]
    transport: Transport


class Run(msgspec.Struct, frozen=True):
    """One start of a partition."""

    accelerator: Accelerator
    accelerator_reason: str
    disks: tuple[PreparedDisk, ...]
    definition: PartitionDefinition | None = None
    """What QEMU was started with; None for a start by an older version of ours."""


def write_run(paths: PartitionPaths, run: Run) -> None:
    """Keep it for the parent that comes after us."""
    replace_file(paths.run_file, msgspec.json.encode(run), durable=False)


def read_run(paths: PartitionPaths) -> Run | None:
    """What the partition was started with; None when it was not, or by an older version of ours."""
    try:
        with open(paths.run_file, "rb") as file:
            return msgspec.json.decode(file.read(), type=Run)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
