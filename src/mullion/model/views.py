"""What the API answers: the shapes that the service fills and that clients, CLI and web read.

Times are RFC 3339 in UTC; sizes int bytes; durations float seconds.
"""

from __future__ import annotations

from msgspec import Struct, field

from mullion.model.definition import PartitionDefinition
from mullion.model.states import OperationState, PartitionState


class ErrorView(Struct, frozen=True):
    """The body of every answer that is not a success. `exit_code` is what a command that meets it ends with."""

    code: str
    message: str
    remedy: str
    context: dict[str, object] = field(default_factory=dict)
    exit_code: int = 1


class ChainFileView(Struct, frozen=True):
    """One file of a disk's chain, top first."""

    path: str
    type: str
    size_bytes: int
    file_bytes: int
    unique_id: str
    block_bytes: int | None = None
    read_only: bool = False


class DiskView(Struct, frozen=True):
    """A VHD with its chain. `holder` names the partition that has it open for writing."""

    path: str
    name: str
    type: str
    size_bytes: int
    file_bytes: int
    allocated_bytes: int
    chain: tuple[ChainFileView, ...]
    holder: str | None = None
    warnings: tuple[str, ...] = ()


class AttachedDiskView(Struct, frozen=True):
    id: str
    bus: str
    read_only: bool
    chain: tuple[str, ...]
    transport: str
    nbd_socket: str | None = None


class ProviderDiskView(Struct, frozen=True):
    """A disk as its provider serves it. Requests that had to wait for a cap: how many, how long together, and now."""

    id: str
    state: str
    chain: tuple[str, ...]
    requests: int
    limits: dict[str, float] = field(default_factory=dict)
    waits: int = 0
    waited_s: float = 0.0
    waiting: int = 0
    faults: tuple[dict[str, object], ...] = ()
    """Injected ones, with how often each has hit."""
    is_traced: bool = False


class ProviderView(Struct, frozen=True):
    """The process that serves a partition's disks; `limits` are of all disks together."""

    partition: str
    pid: int
    uptime_s: float
    limits: dict[str, float]
    disks: tuple[ProviderDiskView, ...]


class TraceDiskView(Struct, frozen=True):
    """What was recorded of a disk since the last look; `dropped` counts all that found no room since the start.

    A request is: microseconds since the start, kind, offset, length, latency in microseconds, whether it failed.
    """

    id: str
    dropped: int
    more: int
    requests: tuple[tuple[int, str, int, int, int, bool], ...]


class TraceView(Struct, frozen=True):
    """A look into the traces that run."""

    disks: tuple[TraceDiskView, ...]


class SavedStateView(Struct, frozen=True):
    """Memory and devices of a partition in a file; they are gone from there once the guest has run again."""

    saved_at: str
    path: str
    file_bytes: int


class PartitionView(Struct, frozen=True):
    """A partition: what is wanted (definition) and what is (the rest)."""

    name: str
    uuid: str
    state: PartitionState
    definition: PartitionDefinition
    etag: str
    reason: str | None = None
    remedy: str | None = None
    accelerator: str | None = None
    accelerator_reason: str | None = None
    qemu_pid: int | None = None
    provider_pid: int | None = None
    started_at: str | None = None
    boot_s: float | None = None
    agent_answers: bool = False
    guest_addresses: tuple[str, ...] = ()
    exit_status: int | None = None
    log_excerpt: str | None = None
    disks: tuple[AttachedDiskView, ...] = ()
    folder: str = ""
    console_log: str = ""
    saved: SavedStateView | None = None


class OperationView(Struct, frozen=True):
    """Work that takes longer than a second. `progress` runs from 0 to 1."""

    id: str
    kind: str
    target: str
    state: OperationState
    created_at: str
    updated_at: str
    progress: float = 0.0
    stage: str = ""
    cancellable: bool = False
    result: dict[str, object] | None = None
    error: ErrorView | None = None


class EventView(Struct, frozen=True):
    """Something that happened; `cursor` grows by one without gaps and is where a reader resumes."""

    cursor: int
    at: str
    kind: str
    target: str
    data: dict[str, object] = field(default_factory=dict)


class CheckpointDiskView(Struct, frozen=True):
    """A disk in a checkpoint: the layer that holds it, and what that takes on the host's filesystem."""

    id: str
    path: str
    size_bytes: int
    held_bytes: int


class CheckpointView(Struct, frozen=True):
    """A frozen point in a partition's life.

    `consistency` is crash (as after a power cut), filesystem (the guest's filesystems were frozen), stopped, or memory.
    """

    id: str
    name: str
    partition: str
    created_at: str
    consistency: str
    parent: str | None = None
    description: str = ""
    schedule: str = ""
    has_memory: bool = False
    is_live: bool = False
    """The guest ran on while its memory was written."""
    stood_still_because: str = ""
    """Why it did not."""
    is_ready: bool = True
    is_present: bool = False
    """Whether what is there now was made from it."""
    disks: tuple[CheckpointDiskView, ...] = ()


class MergeView(Struct, frozen=True):
    """A layer that is being merged into the one below it: `state` is copying, relinking, waiting or failed."""

    disk: str
    upper: str
    lower: str
    state: str
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_s: int = 0
    reason: str | None = None
    limit_bytes_per_s: int | None = None
    """The rate that is kept, 0 for none; null while nobody copies."""


class CheckpointTreeView(Struct, frozen=True):
    """The checkpoints of a partition, oldest first; `present` is the id of the one that the present stems from."""

    partition: str
    present: str | None
    checkpoints: tuple[CheckpointView, ...]
    merges: tuple[MergeView, ...] = ()
    merge_rate: int = 0
    """Bytes a second for the merge of a layer; 0 is without a limit."""
    is_merge_rate_own: bool = False
    """Whether it is this partition's; else it is the service's setting."""


class ScheduleView(Struct, frozen=True, kw_only=True):
    """What is done to a partition again and again; `last_error` is why the last run failed, if it did."""

    name: str
    partition: str
    rule: str
    consistent: bool
    next_at: str
    last_at: str | None
    last_result: str
    last_error: ErrorView | None
    etag: str


class CheckpointScheduleView(ScheduleView, frozen=True, kw_only=True):
    """Checkpoints that are made again and again: how many, and for how long, are kept."""

    keep: int | None
    keep_for_s: int | None


class BackupScheduleView(ScheduleView, frozen=True, kw_only=True):
    """Backups that are made again and again; `keep` says how many each rule keeps, nothing that all are kept."""

    repository: str
    keep: dict[str, int]


class FileVolumeView(Struct, frozen=True):
    """A volume of a partition's disk and what it holds; `remedy` says what to do with one that cannot be read."""

    disk: str
    number: int
    type: str
    filesystem: str
    label: str
    offset: int
    size_bytes: int
    readable: bool
    remedy: str = ""


class ExportedDiskView(Struct, frozen=True):
    """A disk over NBD; `context` is the metadata context that tells what has changed."""

    id: str
    uri: str
    size_bytes: int
    context: str | None = None


class ExportView(Struct, frozen=True):
    """A checkpoint that is offered over NBD. `tls` is the folder of the server's certificates."""

    id: str
    partition: str
    pid: int
    address: str | None
    tls: str | None
    client_certificates: str | None
    connections: int
    bytes_read: int
    disks: tuple[ExportedDiskView, ...]


class RepositoryView(Struct, frozen=True):
    """A place for backups that the service knows."""

    name: str
    url: str
    added_at: str


class BackupDiskView(Struct, frozen=True):
    """A disk in a backup: `data_bytes` it holds, `read_bytes` were read for it, `new_bytes` were added by it."""

    id: str
    size_bytes: int
    data_bytes: int
    read_bytes: int
    new_bytes: int


class BackupView(Struct, frozen=True):
    """A backup of a partition. `base` is the one whose unchanged parts were taken over; it is whole without it."""

    id: str
    repository: str
    partition: str
    begun_at: str
    ended_at: str
    host: str
    new_bytes: int
    disks: tuple[BackupDiskView, ...]
    base: str | None = None
    blobs: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    definition: str = ""
    """The partition's definition as JSON; only where one backup is shown."""


class ImageView(Struct, frozen=True):
    name: str
    path: str
    size_bytes: int
    file_bytes: int
    built_at: str


class CheckView(Struct, frozen=True):
    """One line of `mullion doctor`: `verdict` is ok, note or missing; `remedy` the command that mends it."""

    name: str
    verdict: str
    detail: str
    remedy: str = ""


class StatusView(Struct, frozen=True):
    """The service and its host at a glance."""

    version: str
    pid: int
    started_at: str
    uptime_s: float
    host_name: str
    accelerator: str
    accelerator_reason: str
    partitions: dict[str, int]
    api_socket: str
    api_url: str
    data_dir: str
    run_dir: str
