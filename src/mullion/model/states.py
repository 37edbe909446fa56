"""The states of a partition and of an operation.

A partition's state is derived from what is observed, so that any may follow any; an operation's has a table
(`mullion.parent.operations`).
"""

from __future__ import annotations

import enum


class PartitionState(enum.Enum):
    """What a partition is doing, as observed; `FAILED` carries a reason until the next start.

    `SAVED`: no process runs, memory and devices are in a file; a reason says why it could not be restored.
    """

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    SAVED = "saved"
    FAILED = "failed"


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
