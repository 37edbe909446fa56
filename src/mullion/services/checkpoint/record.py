"""What the store keeps of a checkpoint.

    checkpoints/PARTITION/ID

The files belong to the partition's record (`services.partition.record.DiskLayers`): a checkpoint names, for each disk,
the file that was its head when the checkpoint was made. That file is frozen as long as a checkpoint names it.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from mullion.model.definition import PartitionDefinition
from mullion.services.partition.record import SavedState

PREFIX: Final = "checkpoints/"


class Consistency(enum.Enum):
    """What the disks of a checkpoint are like for the guest that starts from them."""

    CRASH = "crash"
    """As after a power cut: what the guest had flushed is there."""
    FILESYSTEM = "filesystem"
    """The guest's filesystems were frozen: nothing needs to be repaired."""
    STOPPED = "stopped"
    """The partition did not run."""
    MEMORY = "memory"
    """Memory and devices are in the checkpoint too: the guest goes on where it was."""


class FrozenDisk(msgspec.Struct, frozen=True):
    """A disk in a checkpoint: the file that was its head."""

    id: str
    path: str
    size_bytes: int


class CheckpointRecord(msgspec.Struct, frozen=True):
    """One checkpoint in the store."""

    id: str
    partition: str
    name: str
    created_at: str
    definition: PartitionDefinition
    disks: tuple[FrozenDisk, ...]
    consistency: Consistency
    parent: str | None = None
    """The id of the checkpoint that it was made on."""
    description: str = ""
    schedule: str = ""
    """The name of the schedule that made it: such a one is subject to its retention."""
    saved: SavedState | None = None
    """Memory and devices."""
    firmware: str | None = None
    """The folder with the firmware's variables and the TPM's state."""
    is_live: bool = False
    """The guest ran on while its memory was written."""
    stood_still_because: str = ""
    """Why it did not, where memory was written."""
    is_passing: bool = False
    """Made for one reader of the partition as it is now: shown to nobody, and gone with the reader."""
    is_ready: bool = False
    """False until the disks are frozen: one that is found so after a crash is completed or dropped."""

    @property
    def key(self) -> str:
        return key_of(self.partition, self.id)

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, value: bytes) -> CheckpointRecord:
        return msgspec.json.decode(value, type=cls)


def key_of(partition: str, checkpoint_id: str) -> str:
    return f"{prefix_of(partition)}{checkpoint_id}"


def prefix_of(partition: str) -> str:
    return f"{PREFIX}{partition}/"
