"""The control protocol's lines, and the gate for writers that wait for space."""

from __future__ import annotations

import errno
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullion.base.errors import InvalidError, TooLargeError
from mullion.provider.control_client import LINE_LIMIT_BYTES, LineDecoder, encode, encode_command
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


def test_commands() -> None:
    assert LineDecoder().feed(encode_command("status", 3)) == [{"command": "status", "id": 3}]
    assert LineDecoder().feed(encode_command("quit")) == [{"command": "quit"}]
    with pytest.raises(InvalidError, match="dance"):
        encode_command("dance")


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


def test_retry_wakes_who_waits_and_close_gives_up() -> None:
    woken: list[str] = []
    waits = threading.Event()
    gate = SpaceGate(lambda *_change: waits.set())
    gate.add_waker(lambda: woken.append("ring"))
    answers: list[bool] = []
    writer = threading.Thread(target=lambda: answers.append(gate.wait_for_space(FULL, "d0")))
    writer.start()
    waits.wait()
    gate.retry()
    writer.join()
    assert (answers, woken) == ([True], ["ring"])
    gate.close()
    assert gate.wait_for_space(FULL, "d0") is False


def test_mount_point_of_what_is_not_there() -> None:
    assert mount_point("/proc/self/fd") == "/proc"
    assert mount_point("/nowhere/at/all") == "/nowhere/at/all"
