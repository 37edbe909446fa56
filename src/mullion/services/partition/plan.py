"""From what is wanted and what is there to the steps that close the gap. Pure: no I/O, no clock, no memory.

Invariants: planning on the result of all steps gives no steps; every step may be repeated after a crash; a partition
without its provider is never let go on (its disks would stall), and a failed one is never started without being asked.
"""

from __future__ import annotations

import enum

from mullion.model.definition import PowerState
from mullion.services.partition.record import GuestStatus, Observed


class Step(enum.Enum):
    """What the controller can do to a partition."""

    CLEAN = "remove stale files"
    PREPARE = "check disks and make the folders"
    START_PROVIDER = "start the provider"
    START_QEMU = "start QEMU"
    RESUME = "let the guest run"
    PAUSE = "pause the guest"
    QUIT_QEMU = "end QEMU"
    STOP_PROVIDER = "flush and end the provider"


def plan_steps(desired: PowerState, observed: Observed, *, is_failed: bool) -> tuple[Step, ...]:
    """The steps in order; empty when nothing is to be done.

    `is_failed`: the partition failed and nobody has asked for a new start since.
    """
    if desired is PowerState.STOPPED or observed.guest is GuestStatus.POWERED_OFF:
        return _plan_stop(observed)
    if is_failed and observed.guest is GuestStatus.ABSENT:
        return _plan_stop(observed)
    if observed.guest in (GuestStatus.PANICKED, GuestStatus.UNREACHABLE):
        return _plan_provider(observed)
    if observed.guest is GuestStatus.ABSENT:
        return _plan_start(desired, observed)
    steps = [*_plan_provider(observed)]
    if desired is PowerState.PAUSED or observed.is_stalled:
        if observed.guest is GuestStatus.RUNNING:
            steps.append(Step.PAUSE)
    elif observed.guest in (GuestStatus.PAUSED, GuestStatus.PRELAUNCH):
        steps.append(Step.RESUME)
    return tuple(steps)


def _plan_provider(observed: Observed) -> tuple[Step, ...]:
    """A QEMU that is there needs its provider, whatever the guest does."""
    return (Step.START_PROVIDER,) if observed.needs_provider and not observed.provider_alive else ()


def _plan_start(desired: PowerState, observed: Observed) -> tuple[Step, ...]:
    steps = []
    if observed.provider_alive:  # left over from a QEMU that died: its chain may not be the one that is wanted now
        steps.append(Step.STOP_PROVIDER)
    steps += [Step.CLEAN, Step.PREPARE]
    if observed.needs_provider:
        steps.append(Step.START_PROVIDER)
    steps.append(Step.START_QEMU)
    if desired is PowerState.RUNNING:
        steps.append(Step.RESUME)
    return tuple(steps)


def _plan_stop(observed: Observed) -> tuple[Step, ...]:
    steps = []
    if observed.guest is not GuestStatus.ABSENT:
        steps.append(Step.QUIT_QEMU)
    if observed.provider_alive:
        steps.append(Step.STOP_PROVIDER)
    if steps:
        steps.append(Step.CLEAN)
    return tuple(steps)
