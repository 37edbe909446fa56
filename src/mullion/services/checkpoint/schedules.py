"""Checkpoints by schedule, and which of them are kept.

A run makes a checkpoint and takes away what the schedule made before and no longer keeps: never what somebody else
made. Where nothing was written since the last one it makes none: else the points of a partition that rests would push
out those of its life.
"""

from __future__ import annotations

import asyncio
import calendar
import logging
import time
from typing import Any, Final

import msgspec

from mullion.base.errors import ConflictError, NotFoundError
from mullion.model.schedule import Keeping, plan_expiry
from mullion.model.views import CheckpointScheduleView
from mullion.parent.operations import Operations
from mullion.parent.schedules import ScheduleRecord, Schedules, run_when_free
from mullion.services.checkpoint.branching import layers_of
from mullion.services.checkpoint.controller import CheckpointController
from mullion.services.checkpoint.record import CheckpointRecord
from mullion.services.partition.controller import PartitionController
from mullion.services.partition.partition import Partition
from mullion.vhd import inspect_chain

log = logging.getLogger(__name__)

KIND: Final = "checkpoint"


class ScheduleOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a schedule of checkpoints says beside its times."""

    keep: int | None = None
    keep_for_s: int | None = None
    consistent: bool = False

    @property
    def keeping(self) -> Keeping:
        return Keeping(self.keep, self.keep_for_s)


class CheckpointSchedules:
    """The schedules of checkpoints; `register` before `Schedules.open`."""

    def __init__(
        self,
        schedules: Schedules,
        checkpoints: CheckpointController,
        partitions: PartitionController,
        operations: Operations,
    ) -> None:
        self._schedules = schedules
        self._checkpoints = checkpoints
        self._partitions = partitions
        self._operations = operations

    def register(self) -> None:
        """Have runs of schedules make checkpoints, and schedules go with their partition."""
        self._schedules.register(KIND, self._run)
        self._partitions.on_deleted.append(self._forget)

    def list(self, partition: str) -> tuple[CheckpointScheduleView, ...]:
        """Raises: NotFoundError."""
        self._partitions.find(partition)
        return tuple(self._view(record) for record in self._schedules.list(KIND, partition))

    def get(self, partition: str, name: str) -> CheckpointScheduleView:
        """Raises: NotFoundError."""
        return self._view(self._find(partition, name))

    def _find(self, partition: str, name: str) -> ScheduleRecord:
        self._partitions.find(partition)
        return self._schedules.find(KIND, partition, name)

    async def set(self, partition: str, name: str, rule: str, options: ScheduleOptions) -> CheckpointScheduleView:
        """Make or change a schedule. Raises: NotFoundError; InvalidError."""
        self._partitions.find(partition)
        options.keeping.check()
        plain: dict[str, Any] = msgspec.to_builtins(options)
        return self._view(await self._schedules.set(KIND, partition, name, rule, plain))

    async def remove(self, partition: str, name: str) -> None:
        """Forget a schedule; the checkpoints that it made stay. Raises: NotFoundError."""
        await self._schedules.remove(self._find(partition, name))

    def _view(self, record: ScheduleRecord) -> CheckpointScheduleView:
        options = _options_of(record)
        return CheckpointScheduleView(
            keep=options.keep,
            keep_for_s=options.keep_for_s,
            consistent=options.consistent,
            **self._schedules.view_fields(record),
        )

    async def _forget(self, partition: Partition) -> None:
        await self._schedules.remove_target(KIND, partition.name)

    # -- a run ---------------------------------------------------------------------------------------------------------

    async def _run(self, schedule: ScheduleRecord) -> str:
        """Make a checkpoint, then take away what is no longer kept. Raises: what hindered it."""
        partition = self._partitions.find(schedule.target)
        made = self._made_by(schedule)
        if made:
            is_same = await asyncio.to_thread(_is_unchanged, partition, made[-1])
            if is_same:
                return f"nothing was written since {made[-1].name}"
        name = await self._make(schedule)
        gone = await self._expire(schedule)
        return f"made {name}" + (f", deleted {', '.join(gone)}" if gone else "")

    async def _make(self, schedule: ScheduleRecord) -> str:
        """A checkpoint; waits while something else goes on with the partition. Its name."""
        options = _options_of(schedule)
        made = await run_when_free(
            self._operations,
            lambda: self._checkpoints.create(
                schedule.target,
                consistent=options.consistent and self._partitions.find(schedule.target).has_processes(),
                description=f"made by the schedule {schedule.name}",
                schedule=schedule.name,
            ),
        )
        return str(made["checkpoint"])

    async def _expire(self, schedule: ScheduleRecord) -> tuple[str, ...]:
        """Take away what is no longer kept; what is being read waits for the next run. The names of what went."""
        made = {record.id: record for record in self._made_by(schedule)}
        times = [(record.id, _seconds(record.created_at)) for record in made.values()]
        gone = []
        for expired in plan_expiry(times, _options_of(schedule).keeping, time.time()):
            record = made[expired]
            try:
                await self._checkpoints.remove(schedule.target, [record])
            except ConflictError as error:
                log.info("checkpoint %s is kept until the next run: %s", record.name, error)
                continue
            except NotFoundError:  # somebody deleted it meanwhile
                continue
            gone.append(record.name)
        return tuple(gone)

    def _made_by(self, schedule: ScheduleRecord) -> tuple[CheckpointRecord, ...]:
        """What a schedule made, oldest first."""
        return tuple(
            record
            for record in self._checkpoints.records(schedule.target)
            if record.schedule == schedule.name and record.is_ready
        )


def _options_of(record: ScheduleRecord) -> ScheduleOptions:
    return msgspec.convert(record.options, ScheduleOptions)


def _is_unchanged(partition: Partition, last: CheckpointRecord) -> bool:
    """Whether a partition that does not run holds what it held at its last checkpoint: nothing lies in its heads."""
    if partition.has_processes() or partition.record.checkpoint != last.id:
        return False
    for disk in last.disks:
        layers = layers_of(partition, disk.id)
        if layers.parents.get(layers.head) != disk.path or inspect_chain(layers.head).files[0].allocated_bytes:
            return False
    return True


def _seconds(at: str) -> float:
    """Of a time as `utc_now` writes it."""
    return calendar.timegm(time.strptime(at[:19], "%Y-%m-%dT%H:%M:%S")) + float(f"0{at[19:-1]}")
