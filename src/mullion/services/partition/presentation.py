"""How a partition is shown: record and observation become the API's view."""

from __future__ import annotations

import os

from mullion.model.states import PartitionState
from mullion.model.views import AttachedDiskView, PartitionView, SavedStateView
from mullion.services.partition.record import BackupOrigin, PartitionRecord
from mullion.services.partition.runtime import Runtime
from mullion.services.partition.stalls import Stall


def present(
    record: PartitionRecord,
    revision: int,
    state: PartitionState,
    runtime: Runtime,
) -> PartitionView:
    """The view of a partition in this state."""
    name = record.definition.name
    reason = remedy = None
    failure = record.failure if state in (PartitionState.FAILED, PartitionState.SAVED) else None
    if failure is not None:
        reason, remedy = failure.reason, failure.remedy
    elif (reason := stall_reason(runtime)) is not None:
        remedy = "Mend what is named, make room: the partition goes on by itself, nothing is lost."
    elif runtime.trouble is not None and runtime.machine is not None:
        reason, remedy = f"its disks are not served: {runtime.trouble.message}", runtime.trouble.remedy
    elif runtime.unreachable is not None:
        reason, remedy = f"QEMU does not answer: {runtime.unreachable.message}", runtime.unreachable.remedy
    elif is_tpm_lost(runtime):
        reason = "its TPM has ended: the guest gets no answer from it any more"
        remedy = f"Read {runtime.paths.tpm_log}; stop and start the partition: its TPM keeps what it knows."
    elif record.coming_home and record.origin is not None:
        reason, remedy = _coming_home(record, record.origin, runtime)
    machine, provider, run = runtime.machine, runtime.provider, runtime.started_with
    is_up = runtime.has_machine
    return PartitionView(
        name=name,
        uuid=record.uuid,
        state=state,
        definition=record.definition,
        etag=str(revision),
        reason=reason,
        remedy=remedy,
        accelerator=run.accelerator.value if run and is_up else None,
        accelerator_reason=run.accelerator_reason if run and is_up else None,
        qemu_pid=machine.identity.pid if machine is not None else None,
        provider_pid=provider.pid if provider is not None else None,
        started_at=record.started_at if is_up else None,
        boot_s=record.boot_s if is_up else None,
        agent_answers=runtime.guest.agent_answers and is_up,
        guest_addresses=runtime.guest.addresses if is_up else (),
        exit_status=failure.exit_status if failure is not None else None,
        log_excerpt=failure.log_excerpt if failure is not None else None,
        disks=tuple(
            AttachedDiskView(
                id=disk.id,
                bus=disk.bus.value,
                read_only=disk.read_only,
                chain=disk.chain,
                transport=disk.transport.value,
                nbd_socket=runtime.paths.nbd(disk.id) if provider is not None else None,
            )
            for disk in runtime.disks
        )
        if is_up
        else (),
        folder=runtime.paths.data,
        console_log=runtime.paths.console_log,
        saved=SavedStateView(
            record.saved.saved_at, f"{runtime.paths.data}/{record.saved.file}", record.saved.file_bytes
        )
        if record.saved is not None
        else None,
    )


def is_tpm_lost(runtime: Runtime) -> bool:
    """Whether the guest was started with a TPM that has died: QEMU does not take another."""
    run = runtime.started_with
    return runtime.machine is not None and runtime.tpm is None and bool(run and run.definition and run.definition.tpm)


def _coming_home(record: PartitionRecord, origin: BackupOrigin, runtime: Runtime) -> tuple[str, str]:
    """What is to be said of a partition that was restored instantly and is not whole yet."""
    if runtime.waits_for_backup is not None and runtime.has_machine:
        reason = f"reads of blocks that are only in backup {origin.backup} wait: {runtime.waits_for_backup}"
        remedy = (
            "Mend the way to the repository, or say where it is now: "
            f"mullion backup repository set {origin.repository} PLACE; where its passphrase was changed, with "
            "--passphrase-file FILE in place of PLACE. Then the partition goes on, nothing is lost."
        )
        return reason, remedy
    disks = ", ".join(record.coming_home)
    reason = f"{disks} {'is' if len(record.coming_home) == 1 else 'are'} coming home from backup {origin.backup}"
    return reason, "Let it run; how far that is: mullion operation list"


def stall_reason(runtime: Runtime) -> str | None:
    """Why disks cannot go on, or None when all can."""
    stalls = sorted(runtime.stalls.found.items())
    return "; ".join(_describe(runtime, disk, stall) for disk, stall in stalls) or None


def _describe(runtime: Runtime, disk_id: str, stall: Stall) -> str:
    """`disk0: no space left on /srv/vm (for /srv/vm/web.vhd)`."""
    path = next((disk.chain[0] for disk in runtime.disks if disk.id == disk_id), None)
    if path is None:
        return f"{disk_id or 'a disk'}: {stall.reason}"
    return f"{disk_id}: {stall.reason} in {os.path.dirname(path)} (for {os.path.basename(path)})"
