"""What a checkpoint holds besides disks, and the partition held still while its disks are frozen.

    disks only            nothing is stopped; with UEFI or a TPM the guest is paused while their few bytes are copied
    filesystems frozen    by the guest's agent (`hypervisor.freeze`)
    memory                the guest is paused, its disks are flushed, memory and devices are written; or, where the
                          host allows it, written while it runs on (`live_memory`)

The files lie in a folder of the checkpoint's own, durable before the record names them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Callable

import msgspec

from mullion.base.errors import ConflictError, MullionError
from mullion.base.files import sync_folder
from mullion.hypervisor.firmware_state import copy_firmware_state, restore_firmware_state
from mullion.hypervisor.freeze import frozen_filesystems
from mullion.model.definition import Firmware, PowerState
from mullion.services.checkpoint.record import CheckpointRecord, Consistency
from mullion.services.partition.partition import Partition
from mullion.services.partition.record import SavedState
from mullion.services.partition.saving import check_memory, new_state_name, state_path, write_saved

Say = Callable[[str], None]

_MEMORY = "memory.state"
_FIRMWARE = "firmware"


@contextlib.asynccontextmanager
async def held_still(
    partition: Partition, record: CheckpointRecord, say: Say, *, is_live: bool = False
) -> AsyncIterator[CheckpointRecord]:
    """The record with all that is held besides disks, which are to be frozen inside the block; then the guest goes on.

    `is_live`: the memory is the caller's to write (`live_memory`), from inside the block on. The caller holds the
    partition's lock. Raises: as `frozen_filesystems`; what writing the state raises.
    """
    async with contextlib.AsyncExitStack() as stack:
        machine = partition.runtime.machine
        if machine is not None and record.consistency is Consistency.FILESYSTEM:
            say("freezing the guest's filesystems")
            await stack.enter_async_context(frozen_filesystems(machine.agent, partition.runtime.paths.provider_log))
        if machine is not None and (record.consistency is Consistency.MEMORY or _has_firmware_state(partition)):
            stack.push_async_callback(_go_on, partition)
            await machine.pause()
        if record.consistency is Consistency.MEMORY and not is_live:
            record = msgspec.structs.replace(record, saved=await _write_memory(partition, record, say))
        elif machine is None and partition.record.saved is not None and not record.is_passing:
            record = await asyncio.to_thread(_take_saved, partition, record)
        if _has_firmware_state(partition) and not record.is_passing:
            folder = f"{folder_of(partition, record)}/{_FIRMWARE}"
            await asyncio.to_thread(_copy_firmware, partition, folder)
            record = msgspec.structs.replace(record, firmware=folder)
        yield record


async def _go_on(partition: Partition) -> None:
    if partition.record.desired is PowerState.RUNNING:
        await partition.runtime.resume()


async def _write_memory(partition: Partition, record: CheckpointRecord, say: Say) -> SavedState:
    saved = await write_saved(partition, lambda what, _part: say(what))
    return await asyncio.to_thread(move_memory, partition, record, saved)


def move_memory(partition: Partition, record: CheckpointRecord, saved: SavedState) -> SavedState:
    """The state that was written where the partition keeps its own is the checkpoint's from now on. Blocking; durable.

    Raises: OSError.
    """
    folder = folder_of(partition, record)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    os.rename(state_path(partition, saved), f"{folder}/{_MEMORY}")
    sync_folder(folder)
    sync_folder(partition.runtime.paths.data)
    return msgspec.structs.replace(saved, file=_relative(record))


def _take_saved(partition: Partition, record: CheckpointRecord) -> CheckpointRecord:
    """A partition that is saved keeps its memory; the checkpoint has it too."""
    saved = partition.record.saved
    assert saved is not None
    folder = folder_of(partition, record)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    os.link(state_path(partition, saved), f"{folder}/{_MEMORY}")
    sync_folder(folder)
    kept = msgspec.structs.replace(saved, file=_relative(record), disks=None)
    return msgspec.structs.replace(record, saved=kept, consistency=Consistency.MEMORY)


def _copy_firmware(partition: Partition, folder: str) -> None:
    os.makedirs(os.path.dirname(folder), mode=0o700, exist_ok=True)
    copy_firmware_state(partition.runtime.paths, folder)


def _has_firmware_state(partition: Partition) -> bool:
    definition = partition.record.definition
    return definition.firmware is Firmware.UEFI or definition.tpm


def check_memory_of(partition: Partition, record: CheckpointRecord, saved: SavedState) -> None:
    """Can the guest go on with a checkpoint's memory? Blocking.

    Raises: ConflictError that says why not: nothing was changed.
    """
    try:
        check_memory(f"{partition.runtime.paths.data}/{saved.file}", saved)
    except MullionError as error:
        raise ConflictError(
            f"checkpoint {record.name} of partition {partition.name} cannot be applied: {error.message}",
            remedy="The partition is as it was. The files of the checkpoint's disks can be had still: "
            f"mullion files ls {partition.name}@{record.name}",
            partition=partition.name,
        ) from error


def put_back(partition: Partition, record: CheckpointRecord) -> SavedState | None:
    """Firmware and TPM as they were; memory for the next start, if the checkpoint has it. Blocking; may be repeated.

    Raises: NotFoundError; InvalidError; OSError.
    """
    paths = partition.runtime.paths
    if record.firmware is not None:
        restore_firmware_state(paths, record.firmware, partition.record.run_as)
    if record.saved is None:
        return None
    name = new_state_name()
    os.link(f"{paths.data}/{record.saved.file}", f"{paths.data}/{name}")
    sync_folder(paths.data)
    return msgspec.structs.replace(record.saved, file=name, disks=None)


def folder_of(partition: Partition, record: CheckpointRecord) -> str:
    """Where a checkpoint keeps what is not a disk."""
    return f"{partition.runtime.paths.data}/{os.path.dirname(_relative(record))}"


def _relative(record: CheckpointRecord) -> str:
    return f"checkpoints/{record.id}/{_MEMORY}"


def remove_folder(partition: Partition, record: CheckpointRecord) -> None:
    """All of a checkpoint but its disks. Blocking; may be repeated."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder_of(partition, record))


def sweep_folders(partition: Partition, known: set[str]) -> None:
    """Remove folders of checkpoints that a crash has left without a record. Blocking."""
    base = f"{partition.runtime.paths.data}/checkpoints"
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(base):
            if name not in known:
                shutil.rmtree(f"{base}/{name}")
