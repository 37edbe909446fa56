"""The states of a partition and of an operation, and which may follow which."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final


class PartitionState(enum.Enum):
    """What a partition is doing, as observed; `FAILED` carries a reason until the next start."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    FAILED = "failed"


TRANSITIONS: Final[Mapping[PartitionState, frozenset[PartitionState]]] = {
    PartitionState.STOPPED: frozenset({PartitionState.STARTING}),
    PartitionState.STARTING: frozenset(
        {PartitionState.RUNNING, PartitionState.PAUSED, PartitionState.FAILED, PartitionState.STOPPED}
    ),
    PartitionState.RUNNING: frozenset(
        {PartitionState.PAUSED, PartitionState.STOPPING, PartitionState.STOPPED, PartitionState.FAILED}
    ),
    PartitionState.PAUSED: frozenset(
        {PartitionState.RUNNING, PartitionState.STOPPING, PartitionState.STOPPED, PartitionState.FAILED}
    ),
    PartitionState.STOPPING: frozenset({PartitionState.STOPPED, PartitionState.FAILED, PartitionState.RUNNING}),
    PartitionState.FAILED: frozenset({PartitionState.STARTING, PartitionState.STOPPED}),
}


class OperationState(enum.Enum):
    """An operation is pending, then running, then ends in exactly one of three ways."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (OperationState.SUCCEEDED, OperationState.FAILED, OperationState.CANCELLED)
