"""The rate of a merge: how much when, and how copies become pieces."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullion.base.errors import InvalidError
from mullion.base.units import KIB, MIB
from mullion.vhd.fileio import FileIO
from mullion.vhd.pacing import PAGE_BYTES, PIECE_BYTES, Budget, Pace, PacedIO, StoppedError, checked_rate

pytestmark = pytest.mark.unit


@given(
    rate=st.integers(64 * KIB, 1 << 34),
    pieces=st.lists(st.integers(1, PIECE_BYTES), min_size=1, max_size=60),
    idle_s=st.floats(0, 2),
)
def test_never_more_than_the_rate_and_a_tenth_of_a_second(rate: int, pieces: list[int], idle_s: float) -> None:
    budget = Budget(rate)
    now_s = begun_s = 1000.0 + idle_s
    for number, count in enumerate(pieces):
        now_s += budget.spend(count, now_s)
        done = sum(pieces[:number])
        assert done <= rate * (now_s - begun_s + 0.1) * 1.0001 + 1


def test_no_limit_and_a_limit_again() -> None:
    budget = Budget(0)
    assert [budget.spend(1 << 40, 5.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    budget.set_rate(MIB, 6.0)
    assert budget.spend(MIB, 6.0) == 0.0
    assert budget.spend(MIB, 6.0) == pytest.approx(1.0, abs=0.11)


@given(first=st.integers(64 * KIB, 1 << 30), second=st.integers(64 * KIB, 1 << 30), owed=st.integers(1, 1 << 30))
def test_what_is_owed_is_paid_at_the_new_rate(first: int, second: int, owed: int) -> None:
    budget = Budget(first)
    budget.spend(owed, 100.0)
    was_s = budget.spend(0, 100.0)
    budget.set_rate(second, 100.0)
    assert budget.spend(0, 100.0) == pytest.approx(was_s * first / second)


@pytest.mark.parametrize("rate", [-1, 1, 64 * KIB - 1, 1 << 51])
def test_rates_at_which_nothing_would_end_are_refused(rate: int) -> None:
    with pytest.raises(InvalidError):
        checked_rate(rate)
    pace = Pace(MIB)
    with pytest.raises(InvalidError):
        pace.set_rate(rate)
    assert pace.rate == MIB


def test_a_stopped_pace_lets_nothing_through() -> None:
    pace = Pace(0)
    pace.take(5)
    pace.stop()
    with pytest.raises(StoppedError):
        pace.take(1)
    assert pace.taken_bytes == 5


class CountingPace(Pace):
    """Notes what is taken."""

    def __init__(self) -> None:
        super().__init__(0)
        self.pieces: list[int] = []

    def take(self, count: int) -> None:
        super().take(count)
        self.pieces.append(count)


@pytest.mark.parametrize("is_direct", [False, True])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 3 * MIB), (512, 3 * MIB), (512, 512), (PAGE_BYTES, PAGE_BYTES), (PAGE_BYTES - 512, 1024), (1024, MIB + 512)],
)
def test_copies_are_pieces_and_complete(offset: int, length: int, is_direct: bool, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    content = os.urandom(4 * MIB)
    source.write_bytes(content)
    target.write_bytes(bytes(4 * MIB))
    flags = os.O_RDWR | (os.O_DIRECT if is_direct else 0)
    fds = [os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR), os.open(target, flags)]
    pace = CountingPace()
    io = PacedIO(FileIO(), pace, fds[2] if is_direct else None)
    io.copy_range(fds[0], 1536, fds[1], offset, length)
    for fd in fds:
        os.close(fd)
    assert sum(pace.pieces) == length
    assert max(pace.pieces) <= PIECE_BYTES
    written = target.read_bytes()
    assert written[offset : offset + length] == content[1536 : 1536 + length]
    assert not any(written[:offset])
    assert not any(written[offset + length :])
