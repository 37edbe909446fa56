"""Layers over a real chain pass the suite of block devices, and a rule that never hits changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.block_device import BlockDeviceContract

from mullion.base.block import BlockDevice
from mullion.base.units import MIB
from mullion.provider.layers import FaultLayer, FaultRule, TraceLayer
from mullion.provider.layers.guarded import Kind
from mullion.vhd import create_dynamic, open_chain

pytestmark = pytest.mark.contract


class TestLayers(BlockDeviceContract):
    """A trace over faults over a dynamic disk."""

    @pytest.fixture
    def device(self, tmp_path: Path) -> Iterator[BlockDevice]:
        path = str(tmp_path / "d.vhd")
        create_dynamic(path, 5 * MIB + 512)
        with open_chain(path) as chain:
            faults = FaultLayer(
                chain,
                [FaultRule(error="EIO", every=1 << 40), FaultRule(kinds=(Kind.READ,), error="EIO", offset=1 << 50)],
            )
            trace = TraceLayer(faults, lambda _trace: None, capacity=100)
            yield trace
            assert trace.waiting <= 100
