"""The control protocol's lines, and the gate for rings that wait for space."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullion.base.errors import InvalidError, TooLargeError
from mullion.provider.control_client import LINE_LIMIT_BYTES, LineDecoder, encode
from mullion.provider.space import Shortage, SpaceGate, mount_point

pytestmark = pytest.mark.unit

FULL = OSError(errno.ENOSPC, "No space left on device")


@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9), max_size=3)), st.data())
def test_lines_survive_any_cut(messages: list[dict[str, object]], data: st.DataObject) -> None:
    stream = b"".join(map(encode, messages))
    decoder, found = LineDecoder(), []
    while stream:
        count = data.draw(st.integers(1, len(stream)))
        found += decoder.feed(stream[:count])
        stream = stream[count:]
    assert found == messages


@given(st.binary(max_size=200))
def test_any_bytes_are_objects_or_an_error(data: bytes) -> None:
    try:
        found = LineDecoder().feed(data + b"\n")
    except InvalidError:
        return
    assert all(isinstance(message, dict) for message in found)


@pytest.mark.parametrize("line", [b"x" * (LINE_LIMIT_BYTES + 1), b"x" * (LINE_LIMIT_BYTES + 1) + b"\n"])
def test_line_too_long(line: bytes) -> None:
    with pytest.raises(TooLargeError):
        LineDecoder().feed(line)


def test_gate_tells_each_change_once() -> None:
    told: list[tuple[str, str, Shortage | None]] = []
    gate = SpaceGate(lambda event, disk, shortage: told.append((event, disk, shortage)))
    gate.register("d0", "/proc/self/status")
    gate.recovered("d0")
    gate.report(FULL, "d0")
    gate.report(FULL, "d0")
    assert [(event, disk) for event, disk, _shortage in told] == [("no_space", "d0")]
    shortage = gate.shortage("d0")
    assert shortage is not None
    assert (shortage.filesystem, shortage.reason) == ("/proc", "No space left on device")
    gate.recovered("d0")
    gate.recovered("d0")
    assert [event for event, _disk, _shortage in told] == ["no_space", "space"]
    assert gate.shortage("d0") is None


def test_retry_wakes_every_ring() -> None:
    woken: list[str] = []
    gate = SpaceGate(lambda *_change: None)
    for ring in ("d0", "d1"):
        gate.add_waker(lambda ring=ring: woken.append(ring))
    gate.retry()
    assert woken == ["d0", "d1"]


def test_mount_point_of_what_is_not_there() -> None:
    assert mount_point("/proc/self/fd") == "/proc"
    assert mount_point("/nowhere/at/all") == "/nowhere/at/all"
