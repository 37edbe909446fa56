"""The controllers of a service in this process, as `mullion.daemon` puts them together; no partition can be started."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Self

import pytest

from mullion.base.paths import HostPaths
from mullion.parent.events import Events
from mullion.parent.operations import Operations
from mullion.parent.store import Store
from mullion.services.checkpoint.controller import CheckpointController
from mullion.services.checkpoint.keeper import MergeSlots
from mullion.services.disk.controller import DiskController
from mullion.services.partition.controller import PartitionController
from mullion.services.partition.partition import Surroundings
from mullion.services.partition.preparation import Preparer


@dataclass(frozen=True)
class Controllers:
    """All are open but `checkpoints`, which begins to work when it is."""

    events: Events
    operations: Operations
    disks: DiskController
    partitions: PartitionController
    checkpoints: CheckpointController

    @classmethod
    async def open(cls, store: Store, paths: HostPaths) -> Self:
        events = Events(store)
        await events.open()
        operations = Operations(store, events)
        await operations.open()
        disks = DiskController(
            paths,
            store,
            lambda name: name,
            holders=dict,
            attached=lambda: partitions.attached(),  # noqa: PLW0108 - made below
        )
        surroundings = Surroundings(
            preparer=Preparer(disks, dict),
            fleet=None,  # type: ignore[arg-type]  # nothing is started here
            boot_slots=asyncio.Semaphore(1),
            choose_accelerator=lambda _: pytest.fail("nothing is started here"),
        )
        partitions = PartitionController(
            store=store,
            events=events,
            operations=operations,
            paths=paths,
            disks=disks,
            surroundings=surroundings,
            allocate_uid=None,
        )
        await partitions.open()
        checkpoints = CheckpointController(
            store=store,
            events=events,
            operations=operations,
            partitions=partitions,
            slots=MergeSlots(asyncio.Semaphore(1), 0),
        )
        return cls(events, operations, disks, partitions, checkpoints)

    async def close(self, *deaths: type[BaseException]) -> None:
        """Close all; `deaths` are what the test ends its service by: whoever dies keeps none of the others open."""
        ends = (
            self.checkpoints.close,
            lambda: self.operations.close(grace_s=0),
            self.partitions.close,
            self.events.close,
        )
        for end in ends:
            with contextlib.suppress(*deaths):
                await end()
