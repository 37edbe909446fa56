"""What the store keeps of a partition, and where its observed state comes from.

The record is the whole truth that survives: the definition, who the partition is (uuid, user id), the boot of the host
on which it was last started, why it failed, if it did, and where its memory is, if it was saved. Everything else is
observed.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from mullion.model.definition import PartitionDefinition, PowerState
from mullion.model.states import PartitionState
from mullion.services.partition.run_file import Run

PREFIX: Final = "partitions/"


class Failure(msgspec.Struct, frozen=True):
    """Why a partition is `failed`; cleared by the next start."""

    reason: str
    remedy: str
    exit_status: int | None = None
    log_excerpt: str | None = None


class Merging(msgspec.Struct, frozen=True):
    """A layer that is being merged into the one below it; what is left to be done is idempotent."""

    upper: str
    lower: str
    is_copied: bool = False
    """The lower layer holds it all, durable: what lies above may name it as parent, and the upper one may go."""


class DiskLayers(msgspec.Struct, frozen=True):
    """The files of a disk that has checkpoints (ADR 0012): the definition's file and the children made over it.

    Paths are absolute. What lies below the definition's file (an image, for example) is not ours and not in here.
    """

    head: str
    """The file that the partition writes."""
    parents: dict[str, str | None]
    """Each file's parent; None for the definition's file."""
    merging: Merging | None = None
    is_coming_home: bool = False
    """What no file has is in the backup that the record names; it comes home into the definition's file."""


class DiskStamp(msgspec.Struct, frozen=True):
    """The top of a disk when nobody wrote it any more: whoever finds another has another content before him."""

    path: str
    unique_id: str
    file_bytes: int
    modified_ns: int


class SavedState(msgspec.Struct, frozen=True):
    """Memory and devices of a partition that was saved, and what belongs to them.

    It may be restored only on the disks as they were: once the guest has run again, it is worthless.
    """

    file: str
    """Its name in the partition's data folder."""
    seal: str
    """Stands for every byte of the file."""
    saved_at: str
    run: Run
    """What QEMU was started with; `definition` is never None here."""
    machine_type: str
    host_cpu: str
    file_bytes: int
    was_paused: bool = False
    disks: dict[str, DiskStamp] | None = None
    """By disk id; None until the provider has ended, which writes to them last."""

    @property
    def phase(self) -> SavedPhase:
        return SavedPhase.UNSTAMPED if self.disks is None else SavedPhase.COMPLETE


class SavedPhase(enum.Enum):
    """What there is of a saved state."""

    NONE = "none"
    UNSTAMPED = "unstamped"  # whole, but it is not noted yet which disks belong to it
    COMPLETE = "complete"


class BackupOrigin(msgspec.Struct, frozen=True):
    """The backup that a partition's disks are coming home from; kept until nobody reads it any more."""

    repository: str
    backup: str
    disks: tuple[str, ...] = ()
    """By id: all disks that it has."""


class PartitionRecord(msgspec.Struct, frozen=True):
    """One partition in the store. What is wanted of it is all in the definition; acts change its `power`."""

    definition: PartitionDefinition
    uuid: str
    created_at: str
    user_id: int | None = None
    started_at: str | None = None
    started_boot_id: str | None = None
    boot_s: float | None = None
    failure: Failure | None = None
    layers: dict[str, DiskLayers] = {}
    """By disk id; a disk without checkpoints is its definition's file."""
    checkpoint: str | None = None
    """The id of the checkpoint that the present was made from."""
    saved: SavedState | None = None
    origin: BackupOrigin | None = None
    merge_rate: int | None = None
    """Bytes a second for the merge of one of its layers, 0 for no limit; None is what the service's setting says."""

    @property
    def coming_home(self) -> tuple[str, ...]:
        """The disks of which some blocks are still in the backup only."""
        return tuple(disk for disk, layers in self.layers.items() if layers.is_coming_home)

    @property
    def files(self) -> set[str]:
        """The files of its disks that checkpoints and restores have made."""
        return {path for layers in self.layers.values() for path in layers.parents}

    @property
    def heads(self) -> dict[str, str]:
        """By disk id the file that is its top now, where that is not the definition's."""
        return {disk: layers.head for disk, layers in self.layers.items()}

    @property
    def desired(self) -> PowerState:
        return self.definition.power

    @property
    def run_as(self) -> tuple[int, int] | None:
        """User and group under which QEMU and the provider run; None for our own."""
        return None if self.user_id is None else (self.user_id, self.user_id)

    @property
    def saved_phase(self) -> SavedPhase:
        return SavedPhase.NONE if self.saved is None else self.saved.phase

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, value: bytes) -> PartitionRecord:
        return msgspec.json.decode(value, type=cls)


class GuestStatus(enum.Enum):
    """What QEMU says of the guest."""

    ABSENT = "absent"  # no QEMU process
    UNREACHABLE = "unreachable"  # QEMU runs, its monitors do not answer
    LOADING = "loading"  # QEMU waits for a saved state, or takes it
    PRELAUNCH = "prelaunch"  # started, not yet let go
    RUNNING = "running"
    PAUSED = "paused"
    POWERED_OFF = "powered-off"  # the guest switched itself off; QEMU waits
    PANICKED = "panicked"


class Observed(msgspec.Struct, frozen=True):
    """A partition's processes as they are now."""

    guest: GuestStatus = GuestStatus.ABSENT
    provider_alive: bool = False
    needs_provider: bool = False
    is_stalled: bool = False  # a disk cannot go on: no room, or errors
    tpm_alive: bool = False
    needs_tpm: bool = False


def key_of(name: str) -> str:
    return f"{PREFIX}{name}"


def state_of(record: PartitionRecord, observed: Observed, *, is_stopping: bool, is_starting: bool) -> PartitionState:
    """The state that an administrator sees."""
    if is_starting:
        return PartitionState.STARTING
    match observed.guest:
        case GuestStatus.PANICKED:
            return PartitionState.FAILED
        case GuestStatus.ABSENT:
            if is_stopping and observed.provider_alive:
                return PartitionState.STOPPING
            if record.saved is not None and (record.failure or record.desired is PowerState.STOPPED):
                return PartitionState.SAVED
            if record.failure:
                return PartitionState.FAILED
            # What is wanted running and is not there is about to be started: after a reboot of the host, for example.
            return PartitionState.STOPPED if record.desired is PowerState.STOPPED else PartitionState.STARTING
        case GuestStatus.POWERED_OFF:
            return PartitionState.STOPPING
        case GuestStatus.LOADING:
            return PartitionState.STARTING
        case GuestStatus.PRELAUNCH:
            return PartitionState.PAUSED if record.desired is PowerState.PAUSED else PartitionState.STARTING
        case GuestStatus.RUNNING | GuestStatus.UNREACHABLE:
            return PartitionState.STOPPING if is_stopping else PartitionState.RUNNING
        case GuestStatus.PAUSED:
            return PartitionState.STOPPING if is_stopping else PartitionState.PAUSED
