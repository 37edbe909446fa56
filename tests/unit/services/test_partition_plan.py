"""The plan closes every gap, and planning on its result gives nothing more to do."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullion.model.definition import PowerState
from mullion.services.partition.plan import Step, plan_steps
from mullion.services.partition.record import GuestStatus, Observed

pytestmark = pytest.mark.unit

observations = st.builds(
    Observed,
    guest=st.sampled_from(GuestStatus),
    provider_alive=st.booleans(),
    needs_provider=st.booleans(),
    is_stalled=st.booleans(),
)


def result_of(step: Step, observed: Observed) -> Observed:
    """What a step leaves when it succeeds."""
    changes: dict[Step, dict[str, object]] = {
        Step.START_PROVIDER: {"provider_alive": True},
        Step.START_QEMU: {"guest": GuestStatus.PRELAUNCH, "is_stalled": False},
        Step.RESUME: {"guest": GuestStatus.RUNNING},
        Step.PAUSE: {"guest": GuestStatus.PAUSED},
        Step.QUIT_QEMU: {"guest": GuestStatus.ABSENT},
        Step.STOP_PROVIDER: {"provider_alive": False, "is_stalled": False},
    }
    return msgspec.structs.replace(observed, **changes.get(step, {}))


@given(st.sampled_from(PowerState), observations, st.booleans())
def test_a_plan_reaches_a_state_that_needs_no_plan(desired: PowerState, observed: Observed, is_failed: bool) -> None:
    guest_switched_off = observed.guest is GuestStatus.POWERED_OFF
    for step in plan_steps(desired, observed, is_failed=is_failed):
        observed = result_of(step, observed)
    wanted = PowerState.STOPPED if guest_switched_off else desired
    assert plan_steps(wanted, observed, is_failed=is_failed) == ()


@given(st.sampled_from(PowerState), observations)
def test_a_failed_partition_is_never_started_by_itself(desired: PowerState, observed: Observed) -> None:
    assert Step.START_QEMU not in plan_steps(desired, observed, is_failed=True)


@given(observations)
def test_a_guest_never_runs_on_without_its_provider(observed: Observed) -> None:
    steps = plan_steps(PowerState.RUNNING, observed, is_failed=False)
    if Step.RESUME in steps and observed.needs_provider and not observed.provider_alive:
        assert steps.index(Step.START_PROVIDER) < steps.index(Step.RESUME)


def test_no_room_pauses_and_room_resumes() -> None:
    full = Observed(GuestStatus.RUNNING, provider_alive=True, needs_provider=True, is_stalled=True)
    assert plan_steps(PowerState.RUNNING, full, is_failed=False) == (Step.PAUSE,)
    room = Observed(GuestStatus.PAUSED, provider_alive=True, needs_provider=True)
    assert plan_steps(PowerState.RUNNING, room, is_failed=False) == (Step.RESUME,)


def test_a_killed_provider_is_started_under_the_running_guest() -> None:
    observed = Observed(GuestStatus.RUNNING, provider_alive=False, needs_provider=True)
    assert plan_steps(PowerState.RUNNING, observed, is_failed=False) == (Step.START_PROVIDER,)
