"""The plan closes every gap, and planning on its result gives nothing more to do."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullion.model.definition import PowerState
from mullion.services.partition.plan import Step, plan_steps
from mullion.services.partition.record import GuestStatus, Observed, SavedPhase

pytestmark = pytest.mark.unit

observations = st.builds(
    Observed,
    guest=st.sampled_from(GuestStatus),
    provider_alive=st.booleans(),
    needs_provider=st.booleans(),
    is_stalled=st.booleans(),
    tpm_alive=st.booleans(),
    needs_tpm=st.booleans(),
)


def result_of(step: Step, observed: Observed) -> Observed:
    """What a step leaves when it succeeds."""
    changes: dict[Step, dict[str, object]] = {
        Step.START_PROVIDER: {"provider_alive": True},
        Step.START_QEMU: {"guest": GuestStatus.PRELAUNCH, "is_stalled": False},
        Step.LOAD_STATE: {"guest": GuestStatus.PAUSED, "is_stalled": False},
        Step.RESUME: {"guest": GuestStatus.RUNNING},
        Step.PAUSE: {"guest": GuestStatus.PAUSED},
        Step.QUIT_QEMU: {"guest": GuestStatus.ABSENT},
        Step.START_TPM: {"tpm_alive": True},
        Step.STOP_TPM: {"tpm_alive": False},
        Step.STOP_PROVIDER: {"provider_alive": False, "is_stalled": False},
    }
    return msgspec.structs.replace(observed, **changes.get(step, {}))


def phase_after(step: Step, saved: SavedPhase) -> SavedPhase:
    changes = {Step.FORGET_STATE: SavedPhase.NONE, Step.STAMP_DISKS: SavedPhase.COMPLETE}
    return changes.get(step, saved)


@given(st.sampled_from(PowerState), observations, st.booleans(), st.sampled_from(SavedPhase))
def test_a_plan_reaches_a_state_that_needs_no_plan(
    desired: PowerState, observed: Observed, is_failed: bool, saved: SavedPhase
) -> None:
    guest_switched_off = observed.guest is GuestStatus.POWERED_OFF
    for step in plan_steps(desired, observed, is_failed=is_failed, saved=saved):
        observed, saved = result_of(step, observed), phase_after(step, saved)
    wanted = PowerState.STOPPED if guest_switched_off else desired
    assert plan_steps(wanted, observed, is_failed=is_failed, saved=saved) == ()


@given(st.sampled_from(PowerState), observations, st.sampled_from(SavedPhase))
def test_a_failed_partition_is_never_started_by_itself(
    desired: PowerState, observed: Observed, saved: SavedPhase
) -> None:
    steps = plan_steps(desired, observed, is_failed=True, saved=saved)
    assert not {Step.START_QEMU, Step.LOAD_STATE} & set(steps)


@given(st.sampled_from(PowerState), observations, st.booleans(), st.sampled_from(SavedPhase))
def test_a_saved_guest_never_boots_and_its_state_never_outlives_its_run(
    desired: PowerState, observed: Observed, is_failed: bool, saved: SavedPhase
) -> None:
    """Restored, or left as it is; and at no step is there a guest that has run beside a state that could be loaded."""
    for step in plan_steps(desired, observed, is_failed=is_failed, saved=saved):
        if saved is not SavedPhase.NONE:
            assert step is not Step.START_QEMU
            had_run = observed.guest in (GuestStatus.RUNNING, GuestStatus.POWERED_OFF, GuestStatus.PANICKED)
            assert not had_run or step is Step.FORGET_STATE
        if step is Step.STAMP_DISKS:
            assert not observed.provider_alive, "it writes to the disks at its end"
            assert observed.guest is GuestStatus.ABSENT
        if step is Step.LOAD_STATE:
            assert saved is SavedPhase.COMPLETE
        observed, saved = result_of(step, observed), phase_after(step, saved)


def test_a_qemu_whose_state_nobody_feeds_any_more_is_started_anew() -> None:
    observed = Observed(GuestStatus.LOADING, provider_alive=True, needs_provider=True)
    assert plan_steps(PowerState.RUNNING, observed, is_failed=False, saved=SavedPhase.COMPLETE) == (
        Step.QUIT_QEMU,
        Step.STOP_PROVIDER,
        Step.CLEAN,
        Step.PREPARE,
        Step.START_PROVIDER,
        Step.LOAD_STATE,
        Step.RESUME,
        Step.FORGET_STATE,
    )


@given(observations)
def test_a_guest_never_runs_on_without_its_provider(observed: Observed) -> None:
    steps = plan_steps(PowerState.RUNNING, observed, is_failed=False)
    if Step.RESUME in steps and observed.needs_provider and not observed.provider_alive:
        assert steps.index(Step.START_PROVIDER) < steps.index(Step.RESUME)


@given(st.sampled_from(PowerState), observations, st.sampled_from(SavedPhase))
def test_a_guest_is_started_with_its_tpm_or_not_at_all(
    desired: PowerState, observed: Observed, saved: SavedPhase
) -> None:
    for step in plan_steps(desired, observed, is_failed=False, saved=saved):
        if step in (Step.START_QEMU, Step.LOAD_STATE):
            assert observed.tpm_alive is observed.needs_tpm
        if step is Step.STOP_TPM:
            assert observed.guest is GuestStatus.ABSENT
        observed = result_of(step, observed)


def test_no_room_pauses_and_room_resumes() -> None:
    full = Observed(GuestStatus.RUNNING, provider_alive=True, needs_provider=True, is_stalled=True)
    assert plan_steps(PowerState.RUNNING, full, is_failed=False) == (Step.PAUSE,)
    room = Observed(GuestStatus.PAUSED, provider_alive=True, needs_provider=True)
    assert plan_steps(PowerState.RUNNING, room, is_failed=False) == (Step.RESUME,)


def test_a_killed_provider_is_started_under_the_running_guest() -> None:
    observed = Observed(GuestStatus.RUNNING, provider_alive=False, needs_provider=True)
    assert plan_steps(PowerState.RUNNING, observed, is_failed=False) == (Step.START_PROVIDER,)
