"""The disk machines of the unit tests, run for longer."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from tests.framework.exploring import EXPLORE
from tests.unit.vhd.chain_machine import ChainMachine
from tests.unit.vhd.disk_machine import DiskMachine
from tests.unit.vhd.switch_machine import SwitchMachine

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(600 + 600 * EXPLORE)]  # making a find small takes up to 300 s
EXAMPLES = 400 * max(1, EXPLORE)

TestDiskForLong = DiskMachine.TestCase
TestDiskForLong.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=50, suppress_health_check=list(HealthCheck)
)

TestChainForLong = ChainMachine.TestCase
TestChainForLong.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=30, suppress_health_check=list(HealthCheck)
)

TestSwitchForLong = SwitchMachine.TestCase
TestSwitchForLong.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=30, suppress_health_check=list(HealthCheck)
)
