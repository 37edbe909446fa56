"""From what is wanted and what is there to the steps that close the gap. Pure: no I/O, no clock, no memory.

Invariants: planning on the result of all steps gives no steps; every step may be repeated after a crash; a partition
without its provider is never let go on (its disks would stall), and a failed one is never started without being asked.
A TPM is started before QEMU, which connects to it once; one that dies later cannot be replaced.
A saved state is restored instead of a boot, and forgotten as soon as the guest has run again, before anything else: it
belongs to disks that are not there any more.
"""

from __future__ import annotations

import enum

from mullion.model.definition import PowerState
from mullion.services.partition.record import GuestStatus, Observed, SavedPhase

_HAS_RUN = frozenset({GuestStatus.RUNNING, GuestStatus.POWERED_OFF, GuestStatus.PANICKED})


class Step(enum.Enum):
    """What the controller can do to a partition."""

    CLEAN = "remove stale files"
    PREPARE = "check disks and make the folders"
    START_PROVIDER = "start the provider"
    START_TPM = "start the TPM"
    START_QEMU = "start QEMU"
    LOAD_STATE = "load the saved state"
    FORGET_STATE = "remove the saved state"
    STAMP_DISKS = "note the state of the disks"
    RESUME = "let the guest run"
    PAUSE = "pause the guest"
    QUIT_QEMU = "end QEMU"
    STOP_TPM = "end the TPM"
    STOP_PROVIDER = "flush and end the provider"


def plan_steps(
    desired: PowerState, observed: Observed, *, is_failed: bool, saved: SavedPhase = SavedPhase.NONE
) -> tuple[Step, ...]:
    """The steps in order; empty when nothing is to be done.

    `is_failed`: the partition failed and nobody has asked for a new start since.
    """
    if saved is not SavedPhase.NONE and observed.guest in _HAS_RUN:
        return (Step.FORGET_STATE, *plan_steps(desired, observed, is_failed=is_failed))
    if desired is PowerState.STOPPED or observed.guest is GuestStatus.POWERED_OFF:
        return _plan_stop(observed, saved)
    if is_failed and observed.guest in (GuestStatus.ABSENT, GuestStatus.LOADING):
        return _plan_stop(observed, saved)
    if observed.guest in (GuestStatus.PANICKED, GuestStatus.UNREACHABLE):
        return _plan_provider(observed)
    if observed.guest is GuestStatus.LOADING:  # whoever fed it is gone
        return (Step.QUIT_QEMU, *_plan_start(desired, observed, saved))
    if observed.guest is GuestStatus.ABSENT:
        return _plan_start(desired, observed, saved)
    steps = [*_plan_provider(observed)]
    if desired is PowerState.PAUSED or observed.is_stalled:
        if observed.guest is GuestStatus.RUNNING:
            steps.append(Step.PAUSE)
    elif observed.guest in (GuestStatus.PAUSED, GuestStatus.PRELAUNCH):
        steps += _let_go(saved)
    return tuple(steps)


def _let_go(saved: SavedPhase) -> tuple[Step, ...]:
    return (Step.RESUME,) if saved is SavedPhase.NONE else (Step.RESUME, Step.FORGET_STATE)


def _plan_provider(observed: Observed) -> tuple[Step, ...]:
    """A QEMU that is there needs its provider, whatever the guest does."""
    return (Step.START_PROVIDER,) if observed.needs_provider and not observed.provider_alive else ()


def _plan_start(desired: PowerState, observed: Observed, saved: SavedPhase) -> tuple[Step, ...]:
    steps = []
    if observed.tpm_alive:
        steps.append(Step.STOP_TPM)
    if observed.provider_alive:  # left over from a QEMU that died: its chain may not be the one that is wanted now
        steps.append(Step.STOP_PROVIDER)
    if saved is SavedPhase.UNSTAMPED:
        steps.append(Step.STAMP_DISKS)
    steps += [Step.CLEAN, Step.PREPARE]
    if observed.needs_provider:
        steps.append(Step.START_PROVIDER)
    if observed.needs_tpm:
        steps.append(Step.START_TPM)
    steps.append(Step.START_QEMU if saved is SavedPhase.NONE else Step.LOAD_STATE)
    if desired is PowerState.RUNNING:
        steps += _let_go(saved)
    return tuple(steps)


def _plan_stop(observed: Observed, saved: SavedPhase) -> tuple[Step, ...]:
    steps = []
    if observed.guest is not GuestStatus.ABSENT:
        steps.append(Step.QUIT_QEMU)
    if observed.tpm_alive:
        steps.append(Step.STOP_TPM)
    if observed.provider_alive:
        steps.append(Step.STOP_PROVIDER)
    if saved is SavedPhase.UNSTAMPED:
        steps.append(Step.STAMP_DISKS)
    if observed.guest is not GuestStatus.ABSENT or observed.provider_alive or observed.tpm_alive:
        steps.append(Step.CLEAN)
    return tuple(steps)
