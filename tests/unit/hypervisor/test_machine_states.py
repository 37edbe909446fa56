"""QEMU's words become the model's, and an exit status a sentence."""

from __future__ import annotations

import pytest

from mullion.hypervisor.errors import (
    AgentError,
    AgentRefusedError,
    MachineGoneError,
    MonitorError,
    MonitorRefusedError,
    StartFailedError,
)
from mullion.hypervisor.states import RUN_STATES, ExitReport, status_of
from mullion.model.states import PartitionState

pytestmark = pytest.mark.unit

QAPI_RUN_STATES = (  # noqa: SIM905 - QEMU 7.2, qapi/run-state.json, RunState
    "debug inmigrate internal-error io-error paused postmigrate prelaunch finish-migrate restore-vm running save-vm "
    "shutdown suspended watchdog guest-panicked colo"
).split()


def test_every_run_state_of_qemu_is_known() -> None:
    assert sorted(RUN_STATES) == sorted(QAPI_RUN_STATES)


def test_only_running_has_no_reason_but_paused() -> None:
    without = {name for name, (_, reason) in RUN_STATES.items() if reason is None}
    assert without == {"running", "paused"}


def test_an_unknown_run_state_is_paused_and_named() -> None:
    status = status_of("meditating")
    assert (status.state, status.reason) == (PartitionState.PAUSED, "meditating")


@pytest.mark.parametrize(
    ("report", "words", "number"),
    [
        (ExitReport(0), "QEMU ended with exit status 0", None),
        (ExitReport(1), "QEMU ended with exit status 1", None),
        (ExitReport(137), "QEMU was killed by SIGKILL (exit status 137)", 9),
        (ExitReport(134), "QEMU was killed by SIGABRT (exit status 134)", 6),
        (ExitReport(128 + 99), "QEMU was killed by signal 99 (exit status 227)", 99),
        (ExitReport(None), "QEMU ended; its exit status is unknown, because its wrapper was killed as well", None),
    ],
)
def test_an_exit_in_words(report: ExitReport, words: str, number: int | None) -> None:
    assert str(report) == words
    assert report.signal == number
    assert report.is_clean == (report.status == 0)


def test_errors_have_a_code_and_a_remedy_of_their_own() -> None:
    kinds = (AgentError, AgentRefusedError, MachineGoneError, MonitorError, MonitorRefusedError, StartFailedError)
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert len({kind.default_remedy for kind in kinds}) == len(kinds)
