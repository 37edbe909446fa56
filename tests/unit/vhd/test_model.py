"""The disk machines, as long as a unit test may take; `tests/fuzz/test_vhd_model.py` lets it run longer."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from tests.unit.vhd.chain_machine import ChainMachine
from tests.unit.vhd.disk_machine import DiskMachine
from tests.unit.vhd.switch_machine import SwitchMachine

pytestmark = pytest.mark.unit

TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)

TestChain = ChainMachine.TestCase
TestChain.settings = settings(
    max_examples=20, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)

TestSwitch = SwitchMachine.TestCase
TestSwitch.settings = settings(
    max_examples=20, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
