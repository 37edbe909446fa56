"""Saving a partition and restoring it: memory, devices and disks belong together, or the state is refused.

    save     pause ─► flush the disks ─► write the state, durable ─► record: saved, wanted stopped ─► end QEMU and
             provider ─► record: how the disks are now (the provider writes to them last)
    restore  check every byte of the state, and the disks ─► provider ─► QEMU, stopped ─► load ─► let it run ─► record:
             not saved ─► remove the file

Durability: a crash before the record says `saved` leaves the guest paused, or gone as by any crash; it goes on, and
what was written of the state is removed. After it, the partition is saved: what still runs is ended. While restoring,
the record says `saved` until the guest has run; if it has run and the record could not be changed, the disks have
changed too, and the state is refused: it is never restored over newer disks.
Not handled: a disk that is changed with its size, id and time of change kept, or after the provider has ended and
before its stamp is taken, which is when the service was killed in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from mullion.base.errors import ConflictError, MullionError, NotFoundError, UnavailableError
from mullion.base.units import utc_now
from mullion.hypervisor.errors import StartFailedError, StateRefusedError
from mullion.hypervisor.saved_state import check_movable, host_cpu, machine_facts
from mullion.hypervisor.state_file import (
    StateAbout,
    StateDamagedError,
    StateInfo,
    check_state,
    remove_state,
)
from mullion.model.definition import Accelerator, PartitionDefinition, PowerState
from mullion.services.partition.preparation import Preparer, machine_spec
from mullion.services.partition.record import DiskStamp, PartitionRecord, SavedState
from mullion.services.partition.run_file import PreparedDisk, Run
from mullion.vhd.image import load_image, open_file

if TYPE_CHECKING:
    from mullion.services.partition.partition import Partition

log = logging.getLogger(__name__)

Say = Callable[[str, float | None], None]

_PREFIX: Final = "saved-"
_SUFFIX: Final = ".state"
_FLUSH_S: Final = 600.0
"""A bound against hanging: what a guest has written and not flushed may be gigabytes, on slow storage."""
_WRITE_PART: Final = 0.9
"""What part of saving is writing the state, for progress."""


class StateUnfitError(ConflictError):
    """A saved state is whole, but what it belongs to has changed: a disk, the processor."""

    code = "state-unfit"
    default_remedy = (
        "Bring back what the message names, or throw the state away with `mullion partition discard-state` and start "
        "the partition, which boots from its disks."
    )


def state_path(partition: Partition, saved: SavedState) -> str:
    return f"{partition.runtime.paths.data}/{saved.file}"


# -- saving ------------------------------------------------------------------------------------------------------------


async def write_saved(partition: Partition, say: Say) -> SavedState:
    """Pause the guest and write its state, durably; the caller puts it into the record. The guest stays paused.

    Raises: what `Machine.write_state` raises, and what provider and QEMU refuse; no file is left then.
    """
    about = await ready_to_write(partition)
    runtime = partition.runtime
    machine = runtime.machine
    if machine is None:
        raise UnavailableError(f"partition {partition.name} has no QEMU that could be saved")
    await machine.pause()
    say("flushing the disks", 0.0)
    await flush_disks(partition)
    name = new_state_name()
    say("writing memory and devices", None)
    info = await machine.write_state(
        f"{runtime.paths.data}/{name}",
        about,
        on_progress=lambda part: say("writing memory and devices", part * _WRITE_PART),
    )
    return as_saved(partition, name, about, info)


async def ready_to_write(partition: Partition) -> StateAbout:
    """What can be done while the guest runs: refuse what cannot be written, flush most of the disks, describe.

    Raises: UnavailableError without QEMU or a provider; what provider and QEMU refuse; as `describe`.
    """
    machine = partition.runtime.machine
    if machine is None:
        raise UnavailableError(f"partition {partition.name} has no QEMU that could be saved")
    await check_movable(machine)
    await flush_disks(partition)
    return await describe(partition)


def new_state_name() -> str:
    """A name in the partition's data folder that no state has; what crashes leave under it is swept away."""
    return f"{_PREFIX}{uuid.uuid4().hex[:8]}{_SUFFIX}"


def as_saved(partition: Partition, name: str, about: StateAbout, info: StateInfo) -> SavedState:
    """A state that was written to a file of this name, as the record keeps it."""
    run = partition.runtime.started_with
    assert run is not None, "it had a QEMU when the state was begun, and what that was started with is kept"
    return SavedState(
        file=name,
        seal=info.seal,
        saved_at=about.saved_at,
        run=msgspec.structs.replace(run, definition=about.definition),
        machine_type=about.machine_type,
        host_cpu=about.host_cpu,
        file_bytes=info.file_bytes,
        was_paused=partition.record.desired is PowerState.PAUSED,
    )


async def describe(partition: Partition) -> StateAbout:
    """What this partition's QEMU was started with, for a state of it.

    Raises: UnavailableError when it has none; what QEMU refuses; VhdError for a disk that cannot be read.
    """
    runtime, record = partition.runtime, partition.record
    machine, run = runtime.machine, runtime.started_with
    if machine is None or run is None:
        raise UnavailableError(f"partition {partition.name} has no QEMU")
    version, kind = await machine_facts(machine)
    return StateAbout(
        partition=partition.name,
        uuid=record.uuid,
        saved_at=utc_now(),
        qemu_version=version,
        machine_type=kind,
        accelerator=run.accelerator,
        host_cpu=host_cpu(),
        definition=run.definition or record.definition,
        disks=await asyncio.to_thread(_top_ids, run),
    )


def _top_ids(run: Run) -> dict[str, str]:
    return {disk.id: _unique_id(disk.chain[0]) for disk in run.disks}


async def flush_disks(partition: Partition) -> None:
    """Have all that the guest has written so far be durable. Raises: what the provider reports."""
    link = partition.runtime.link
    if link is not None:
        await link.request("flush", deadline_s=_FLUSH_S)
    elif partition.runtime.disks:
        raise UnavailableError(
            f"partition {partition.name} has no provider that could flush its disks", remedy="Try again in a moment."
        )


def stamp_disks(record: PartitionRecord, preparer: Preparer) -> dict[str, DiskStamp]:
    """The disks as they are, now that nobody writes to them. Blocking. Raises: VhdError; OSError."""
    saved = record.saved
    assert saved is not None, "the plan stamps only what was saved"
    return {disk.id: _stamp(_top(record, preparer, disk)) for disk in saved.run.disks if not disk.read_only}


def _top(record: PartitionRecord, preparer: Preparer, disk: PreparedDisk) -> str:
    """The file that is the top of a saved disk now; merges of layers that nobody needs go on meanwhile."""
    saved = record.saved
    head = record.heads.get(disk.id)
    if head is not None or saved is None or saved.run.definition is None:
        return head or disk.chain[0]
    return next(preparer.disks.resolve(one.path) for one in saved.run.definition.disks if one.id == disk.id)


def _stamp(path: str) -> DiskStamp:
    status = os.stat(path)
    return DiskStamp(path, _unique_id(path), status.st_size, status.st_mtime_ns)


def _unique_id(path: str) -> str:
    fd = open_file(path)
    try:
        return load_image(fd, path).footer.unique_id.hex()
    finally:
        os.close(fd)


async def unstamp(partition: Partition) -> None:
    """Call this before the service itself changes files of a saved partition's disks without changing their content.

    The disks are stamped anew afterwards: by the plan, when the lock is free, which the caller holds. A state that does
    not fit its disks already stays as it is.
    """
    record = partition.record
    saved = record.saved
    if saved is None or saved.disks is None:
        return
    preparer = partition.surroundings.preparer
    try:
        if await asyncio.to_thread(stamp_disks, record, preparer) != saved.disks:
            return
    except MullionError as error:  # restoring will say so
        log.warning("%s: %s", partition.name, error)
        return
    await partition.save(saved=msgspec.structs.replace(saved, disks=None))
    partition.runtime.wake()


# -- restoring ---------------------------------------------------------------------------------------------------------


def check_memory(path: str, saved: SavedState) -> None:
    """Read every byte of a state, and look whether this host can go on with it. Blocking.

    Raises: NotFoundError; StateDamagedError; StateUnfitError.
    """
    info = check_state(path)
    if info.seal != saved.seal:
        raise StateDamagedError(f"{path} is whole, but not the state that was saved last", path=path, offset=0)
    if saved.run.accelerator is Accelerator.KVM and saved.host_cpu != host_cpu():
        raise StateUnfitError(
            f"it was saved on the processor {saved.host_cpu}, and this is {host_cpu()}: a guest that runs on KVM would "
            "not survive the change"
        )


def prepare_saved(record: PartitionRecord, data_folder: str, preparer: Preparer) -> Run:
    """What to start QEMU with, after every byte of the state and the disks it belongs to were looked at. Blocking.

    Raises: StateDamagedError; StateUnfitError; NotFoundError, VhdError, DiskBusyError for a disk.
    """
    saved = record.saved
    assert saved is not None, "the plan restores only what was saved"
    check_memory(f"{data_folder}/{saved.file}", saved)
    disks = []
    for disk in saved.run.disks:
        top = _top(record, preparer, disk)
        stamp = (saved.disks or {}).get(disk.id)
        if stamp is not None:
            _check_stamp(disk.id, stamp, top)
        disks.append(msgspec.structs.replace(disk, chain=preparer.find_chain(record.definition.name, top)))
    return msgspec.structs.replace(saved.run, disks=tuple(disks))


def _check_stamp(disk_id: str, stamp: DiskStamp, top: str) -> None:
    if top != stamp.path:
        raise StateUnfitError(f"disk {disk_id} is {top} now, and was {stamp.path} when the partition was saved")
    try:
        present = _stamp(stamp.path)
    except (FileNotFoundError, NotFoundError) as error:
        raise StateUnfitError(f"disk {disk_id} ({stamp.path}), which belongs to the saved state, is gone") from error
    if present.unique_id != stamp.unique_id:
        raise StateUnfitError(f"disk {disk_id} ({stamp.path}) is another disk than the one that was saved")
    if present != stamp:
        raise StateUnfitError(
            f"disk {disk_id} ({stamp.path}) has been written to since the partition was saved: its memory does not fit "
            "any more"
        )


async def load_saved(partition: Partition) -> None:
    """Start QEMU and have it load the state; the guest stands still. The provider runs. The caller holds the lock.

    Raises: StateDamagedError; StateRefusedError; MissingToolError; what `Machine.load_state` raises.
    """
    runtime, record = partition.runtime, partition.record
    saved, run = record.saved, runtime.started_with
    assert saved is not None
    assert run is not None, "prepared in an earlier step"
    spec = dataclasses.replace(
        machine_spec(record, runtime.paths, run), machine_type=saved.machine_type, loads_state=True
    )
    path = state_path(partition, saved)
    try:
        await runtime.load_machine(spec, path, saved.seal)
    except BaseException as error:
        # The guest has not run. The provider may have tidied a disk up: as it leaves it, it belongs to the state.
        with contextlib.suppress(MullionError):
            await partition.save(saved=msgspec.structs.replace(saved, disks=None))
        if not isinstance(error, StartFailedError):
            raise
        raise StateRefusedError(
            f"QEMU cannot be started as it was for {path}: {error.message}",
            path=path,
            log_excerpt=error.context.get("log_excerpt"),
        ) from error


def changed_since(record: PartitionRecord) -> bool:
    """Whether the definition says another machine than the one that was saved, which is the one that goes on."""
    saved = record.saved
    if saved is None or saved.run.definition is None:
        return False
    return _machine_of(saved.run.definition) != _machine_of(record.definition)


def _machine_of(definition: PartitionDefinition) -> PartitionDefinition:
    """The definition without what is not of the machine."""
    return msgspec.structs.replace(
        definition, power=PowerState.STOPPED, description="", labels={}, shutdown_timeout_s=0
    )


# -- removing ----------------------------------------------------------------------------------------------------------


async def forget_saved(partition: Partition) -> None:
    """The state is worthless from now on: out of the record, then its file."""
    saved = partition.record.saved
    if saved is not None:
        await partition.save(saved=None)
        await asyncio.to_thread(remove_state, state_path(partition, saved))


def sweep_states(data_folder: str, record: PartitionRecord) -> None:
    """Remove what crashes have left: states that were begun, or that no record names. Blocking."""
    kept = record.saved.file if record.saved is not None else None
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(data_folder):
            if name.startswith(_PREFIX) and name.endswith((_SUFFIX, f"{_SUFFIX}.new")) and name != kept:
                log.info("%s/%s belongs to no saved state: removed", data_folder, name)
                os.unlink(f"{data_folder}/{name}")
