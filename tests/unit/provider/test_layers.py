"""Trace and injected faults over a disk: what they record, whom they hit, and that they go away again."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from tests.framework.virtqueue import GranuleDisk

from mullion.base.errors import InvalidError, NotFoundError, StateError
from mullion.provider.device import DirectDevice
from mullion.provider.layers import FaultLayer, FaultRule, Limits, TraceLayer
from mullion.provider.layers.commands import LayerControl

pytestmark = pytest.mark.unit

DISK_BYTES = 1024 * 1024


@pytest.fixture
def disk() -> Iterator[GranuleDisk]:
    made = GranuleDisk(DISK_BYTES)
    yield made
    made.close()


class Used:
    """The exports, as far as layers know them."""

    def __init__(self, disk: DirectDevice) -> None:
        self.device = disk

    def use(self, device: DirectDevice) -> None:
        self.device = device


@pytest.fixture
def used(disk: GranuleDisk) -> Used:
    return Used(disk)


@pytest.fixture
def control(disk: GranuleDisk, used: Used) -> LayerControl:
    made = LayerControl(allow_faults=True)
    made.add("d", disk, Limits(), used.use)
    return made


def ask(control: LayerControl, command: str, **fields: object) -> dict[str, object]:
    return dict(control.handlers()[command](fields))


class TestTrace:
    def test_what_was_asked_is_recorded_with_its_latency(self, disk: GranuleDisk) -> None:
        now_ns = 0

        def clock() -> int:
            nonlocal now_ns
            now_ns += 5000
            return now_ns

        trace = TraceLayer(disk, lambda _trace: None, clock_ns=clock)
        trace.pwritev(4096, [memoryview(bytes(512)), memoryview(bytes(512))])
        trace.pread(0, bytearray(100))
        trace.discard(8192, 4096)
        trace.flush()
        assert [record[1:] for record in trace.take(10)] == [
            ("write", 4096, 1024, 5, False),
            ("read", 0, 100, 5, False),
            ("discard", 8192, 4096, 5, False),
            ("flush", 0, 0, 5, False),
        ]
        assert trace.take(10) == []

    def test_a_failure_is_recorded_and_passed_on(self, disk: GranuleDisk) -> None:
        disk.failure = OSError(errno.EIO, "broken")
        trace = TraceLayer(disk, lambda _trace: None)
        with pytest.raises(OSError, match="broken"):
            trace.pwrite(0, bytes(512))
        assert trace.take(1)[0][5] is True

    def test_memory_is_bounded_and_what_is_lost_is_counted(self, disk: GranuleDisk) -> None:
        trace = TraceLayer(disk, lambda _trace: None, capacity=10)
        for _ in range(25):
            trace.flush()
        assert trace.dropped == 15
        assert len(trace.take(100)) == 10

    def test_one_that_nobody_reads_takes_itself_away(self, disk: GranuleDisk) -> None:
        now_ns = 0
        gone: list[TraceLayer] = []
        trace = TraceLayer(disk, gone.append, clock_ns=lambda: now_ns)
        now_ns = 29 * 10**9
        trace.flush()
        trace.take(1)
        now_ns += 29 * 10**9
        trace.flush()
        assert gone == []
        now_ns += 2 * 10**9
        trace.flush()
        trace.flush()
        assert gone == [trace]

    def test_start_read_stop(self, control: LayerControl, used: Used, disk: GranuleDisk) -> None:
        assert used.device is disk
        ask(control, "trace", do="start")
        assert used.device.direct_read == {}, "with a layer every request comes by preadv"
        used.device.flush()
        (said,) = ask(control, "trace", do="read", disk="d")["disks"]  # type: ignore[misc]
        assert [record[1] for record in said["requests"]] == ["flush"]
        assert control.disk_status("d")["is_traced"] is True
        ask(control, "trace", do="stop")
        assert used.device is disk
        assert ask(control, "trace", do="read") == {"disks": []}


class TestFaults:
    def test_only_what_fits_is_hit(self, disk: GranuleDisk) -> None:
        rule = FaultRule.from_fields({"kinds": ["read"], "offset": 4096, "length": 4096, "error": "EIO"}, "rule")
        layer = FaultLayer(disk, [rule])
        for offset, length in ((0, 4096), (8192, 512)):
            layer.pread(offset, bytearray(length))
        layer.pwrite(4096, bytes(512))
        for offset, length in ((4096, 1), (0, 4097), (8191, 512)):
            with pytest.raises(OSError, match="injected") as caught:
                layer.pread(offset, bytearray(length))
            assert caught.value.errno == errno.EIO
        assert layer.status()[0]["hits"] == 3

    def test_what_is_hit_does_not_reach_the_disk(self, disk: GranuleDisk) -> None:
        layer = FaultLayer(disk, [FaultRule(error="ENOSPC")])
        with pytest.raises(OSError, match="injected") as caught:
            layer.pwrite(0, b"x" * 512)
        assert caught.value.errno == errno.ENOSPC
        assert disk.content(0, 512) == bytes(512)

    def test_every_third_and_no_more_than_two(self, disk: GranuleDisk) -> None:
        layer = FaultLayer(disk, [FaultRule(error="EIO", every=3, count=2)])
        outcomes = []
        for _ in range(12):
            try:
                layer.flush()
            except OSError:
                outcomes.append("x")
            else:
                outcomes.append(".")
        assert "".join(outcomes) == "..x..x......"

    def test_latency_adds_up_and_has_an_end(self, disk: GranuleDisk) -> None:
        slept: list[float] = []
        layer = FaultLayer(disk, [FaultRule(latency_ms=250), FaultRule(latency_ms=9_900)], sleep=slept.append)
        layer.flush()
        assert slept == [10.0]

    def test_rules_come_and_go_below_a_trace(self, control: LayerControl, used: Used, disk: GranuleDisk) -> None:
        ask(control, "trace", do="start")
        said = ask(control, "fault", disk="d", rules=[{"error": "EIO"}])
        assert said["rules"][0]["error"] == "EIO"  # type: ignore[index]
        with pytest.raises(OSError, match="injected"):
            used.device.flush()
        assert control.disk_status("d")["faults"][0]["hits"] == 1  # type: ignore[index]
        ask(control, "fault", disk="d", rules=[])
        used.device.flush()
        ask(control, "trace", do="stop")
        assert used.device is disk

    def test_they_are_refused_where_they_were_not_allowed(self, disk: GranuleDisk, used: Used) -> None:
        control = LayerControl(allow_faults=False)
        control.add("d", disk, Limits(), used.use)
        with pytest.raises(StateError, match="not injected"):
            ask(control, "fault", disk="d", rules=[{"error": "EIO"}])
        assert used.device is disk

    @pytest.mark.parametrize(
        ("rule", "named"),
        [
            ({}, "neither"),
            ({"error": "EPERM"}, "error"),
            ({"latency_ms": 10_001}, "latency_ms"),
            ({"error": "EIO", "every": 0}, "every"),
            ({"error": "EIO", "kinds": ["format"]}, "kinds"),
            ({"error": "EIO", "kinds": "read"}, "kinds"),
            ({"error": "EIO", "offset": -1}, "offset"),
            ({"errors": "EIO"}, "'errors'"),
        ],
    )
    def test_wrong_rules_are_named(self, control: LayerControl, rule: object, named: str) -> None:
        with pytest.raises(InvalidError, match=named):
            ask(control, "fault", disk="d", rules=[rule])


@pytest.mark.parametrize(
    ("command", "fields", "error"),
    [
        ("throttle", {"disk": "other", "limits": {}}, NotFoundError),
        ("throttle", {"disk": "d"}, InvalidError),
        ("throttle", {"disk": 7, "limits": {}}, NotFoundError),
        ("trace", {"do": "sing"}, InvalidError),
        ("trace", {"do": "read", "disk": "other"}, NotFoundError),
        ("fault", {"rules": []}, NotFoundError),
        ("fault", {"disk": "d", "rules": [{"error": "EIO"}] * 17}, InvalidError),
    ],
)
def test_wrong_commands_are_refused(
    control: LayerControl, command: str, fields: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        ask(control, command, **fields)


def test_caps_are_set_and_shown(control: LayerControl) -> None:
    assert ask(control, "throttle", disk="d", limits={"iops": 5}) == {"disk": "d", "limits": {"iops": 5}}
    ask(control, "throttle", disk=None, limits={"bytes_per_s": 7})
    assert control.disk_status("d")["throttle"]["limits"] == {"iops": 5}  # type: ignore[index]
    assert control.partition_status() == {"limits": {"bytes_per_s": 7}}
    assert control.lane("d").is_limited
    ask(control, "throttle", disk="d", limits={})
    ask(control, "throttle", disk=None, limits={})
    assert not control.lane("d").is_limited
