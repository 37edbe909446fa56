"""Backups by schedule, and which of them are kept.

A run makes a backup, then forgets those of the same partition in the same repository that no rule keeps: by the
partition's id, so that another host's or an earlier partition of the same name loses nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from mullion.base.errors import ConflictError, MullionError
from mullion.base.units import format_size
from mullion.model.views import BackupScheduleView
from mullion.parent.operations import Operations
from mullion.parent.schedules import ScheduleRecord, Schedules, run_when_free
from mullion.services.backup.controller import BackupController
from mullion.services.partition.controller import PartitionController
from mullion.services.partition.partition import Partition

log = logging.getLogger(__name__)

KIND: Final = "backup"


class ScheduleOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a schedule of backups says beside its times; without `keep` nothing is forgotten."""

    repository: str
    keep: dict[str, int] = {}
    consistent: bool = False


class BackupSchedules:
    """The schedules of backups; `register` before `Schedules.open`."""

    def __init__(
        self, schedules: Schedules, backups: BackupController, partitions: PartitionController, operations: Operations
    ) -> None:
        self._schedules = schedules
        self._backups = backups
        self._partitions = partitions
        self._operations = operations

    def register(self) -> None:
        """Have runs of schedules make backups, and schedules go with their partition."""
        self._schedules.register(KIND, self._run)
        self._partitions.on_deleted.append(self._forget)
        self._backups.check_unscheduled = self._check_unscheduled

    def list(self, partition: str | None) -> tuple[BackupScheduleView, ...]:
        """Of one partition, or all. Raises: NotFoundError."""
        if partition is not None:
            self._partitions.find(partition)
        return tuple(_view(self._schedules, record) for record in self._schedules.list(KIND, partition))

    def get(self, partition: str, name: str) -> BackupScheduleView:
        """Raises: NotFoundError."""
        self._partitions.find(partition)
        return _view(self._schedules, self._schedules.find(KIND, partition, name))

    async def set(
        self, partition: str, name: str, rule: str, repository: str | None, keep: Mapping[str, int], *, consistent: bool
    ) -> BackupScheduleView:
        """Make or change a schedule. Raises: NotFoundError; InvalidError."""
        self._partitions.find(partition)
        kept = {period: count for period, count in keep.items() if count}
        options = ScheduleOptions(self._backups.repositories.choose(repository), kept, consistent)
        plain: dict[str, Any] = msgspec.to_builtins(options)
        return _view(self._schedules, await self._schedules.set(KIND, partition, name, rule, plain))

    async def remove(self, partition: str, name: str) -> None:
        """Forget a schedule; the backups that it made stay. Raises: NotFoundError."""
        self._partitions.find(partition)
        await self._schedules.remove(self._schedules.find(KIND, partition, name))

    def _check_unscheduled(self, repository: str) -> None:
        """Raises: ConflictError: without that repository each run would fail."""
        for record in self._schedules.list(KIND):
            if _options_of(record).repository == repository:
                raise ConflictError(
                    f"repository {repository} is needed: schedule {record.name} of partition {record.target} backs up "
                    "into it",
                    remedy="Remove the schedule first, or set it to another repository: "
                    f"mullion backup schedule remove {record.target} {record.name}",
                    repository=repository,
                )

    async def _forget(self, partition: Partition) -> None:
        await self._schedules.remove_target(KIND, partition.name)

    # -- a run ---------------------------------------------------------------------------------------------------------

    async def _run(self, schedule: ScheduleRecord) -> str:
        """Make a backup, then forget what is no longer kept. Raises: what hindered the backup."""
        options = _options_of(schedule)
        partition = self._partitions.find(schedule.target)
        made = await run_when_free(
            self._operations,
            lambda: self._backups.create(
                schedule.target, options.repository, consistent=options.consistent and partition.has_processes()
            ),
        )
        new_bytes = made["new_bytes"]
        assert isinstance(new_bytes, int)
        said = f"made {made['backup']} ({format_size(new_bytes)} new)"
        return said + (await self._expire(partition, options) if options.keep else "")

    async def _expire(self, partition: Partition, options: ScheduleOptions) -> str:
        """Forget what no rule keeps; what hinders that is no failure of the backup: the next run makes up for it."""
        try:
            done = await run_when_free(
                self._operations,
                lambda: self._backups.prune(
                    options.repository,
                    partition=partition.name,
                    partition_id=partition.record.uuid,
                    keep=options.keep,
                    forget=(),
                    dry_run=False,
                ),
            )
        except MullionError as error:
            log.warning("old backups of %s stay until the next run: %s", partition.name, error)
            return f"; old ones stay until the next run: {error.message}"
        gone = done["forgotten"]
        assert isinstance(gone, list)
        return f", forgot {', '.join(gone)}" if gone else ""


def _options_of(record: ScheduleRecord) -> ScheduleOptions:
    return msgspec.convert(record.options, ScheduleOptions)


def _view(schedules: Schedules, record: ScheduleRecord) -> BackupScheduleView:
    options = _options_of(record)
    return BackupScheduleView(
        repository=options.repository,
        keep=options.keep,
        consistent=options.consistent,
        **schedules.view_fields(record),
    )
