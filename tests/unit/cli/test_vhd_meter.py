"""The progress line: rate and time left are on it on a terminal of 80 columns, and it never wraps."""

from __future__ import annotations

import pytest

from mullion.base.units import GIB, MIB
from mullion.cli.vhd.meter import meter_line

pytestmark = pytest.mark.unit


def test_everything_where_there_is_room() -> None:
    line = meter_line("convert", "copying", GIB, 4 * GIB, 2.0, width=120)
    assert line == "convert  [##........]  25%  1 GiB of 4 GiB  512 MiB/s  6.0 s left  copying"


@pytest.mark.parametrize("width", [10, 40, 79, 200])
def test_it_never_wraps(width: int) -> None:
    assert len(meter_line("compact", "looking for zeros", 134 * MIB + 1, 2040 * GIB, 700.0, width=width)) <= width


def test_the_stage_goes_before_the_time_left() -> None:
    line = meter_line("convert", "verifying", 134 * MIB + 99999, 286 * MIB + 99999, 1.0, width=79)
    assert line.endswith(" left")


def test_work_without_a_size_is_its_stage() -> None:
    assert meter_line("merge", "taking the layers out", 0, 0, 9.0, width=79) == "merge  taking the layers out"
