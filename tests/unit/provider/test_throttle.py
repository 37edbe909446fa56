"""Caps: the bucket's arithmetic, and who goes ahead when, with a clock that the test turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullion.base.errors import InvalidError
from mullion.provider.layers import Limits, Throttle, Turn
from mullion.provider.layers.bucket import Bucket
from mullion.provider.layers.limits import SLICE_S

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def serve(turns: dict[str, Turn], size_bytes: int, clock: Clock, seconds: float) -> list[tuple[float, str]]:
    """Everybody always has a request ready; who went ahead when. All ask again as soon as they were told to."""
    done: list[tuple[float, str]] = []
    end_s = clock.now_s + seconds
    ask_at_s = dict.fromkeys(turns, clock.now_s)
    while True:
        name = min(ask_at_s, key=lambda name: ask_at_s[name])
        clock.now_s = max(clock.now_s, ask_at_s[name])
        if clock.now_s > end_s:
            clock.now_s = end_s
            return done
        left_s = turns[name].ask(False, size_bytes)
        if left_s:
            ask_at_s[name] = clock.now_s + left_s
        else:
            done.append((clock.now_s, name))


@given(
    rate=st.floats(1, 1e6),
    slice_s=st.floats(0.001, 2),
    charges=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=60),
)
def test_no_span_of_time_sees_more_than_the_rate_and_one_burst(
    rate: float, slice_s: float, charges: list[tuple[float, int]]
) -> None:
    capacity = max(rate * slice_s, 1.0)
    bucket = Bucket(rate, capacity, 0.0)
    now_s, gone_ahead = 0.0, []
    for pause_s, amount in charges:
        now_s += pause_s
        ticket = bucket.charge(amount, now_s)
        now_s += bucket.wait_s(ticket, amount, now_s)
        assert bucket.wait_s(ticket, amount, now_s + 1e-9) == 0.0, "who has waited as long as told goes ahead"
        gone_ahead.append((now_s, amount))
    largest = max(amount for _, amount in gone_ahead)
    for first in range(len(gone_ahead)):
        total = 0
        for at_s, amount in gone_ahead[first:]:
            total += amount
            span_s = at_s - gone_ahead[first][0]
            assert total <= rate * span_s + max(capacity, largest) + max(1e-3, total * 1e-6)


@given(
    rates=st.lists(st.floats(10, 1e5), min_size=2, max_size=6),
    size=st.integers(1, 50),
)
def test_each_new_rate_holds_at_once(rates: list[float], size: int) -> None:
    """In the first 100 ms after a change, and in the second after those, as many as the new rate says."""
    now_s = 0.0
    bucket = Bucket(rates[0], rates[0] * SLICE_S, now_s)
    for rate in rates:
        bucket.change(rate, rate * SLICE_S, now_s)
        begun_s, amount = now_s, 0
        while now_s < begun_s + max(0.1, 40 * size / rate):
            ticket = bucket.charge(size, now_s)
            now_s += bucket.wait_s(ticket, size, now_s)
            amount += size
        expected = rate * (now_s - begun_s)
        # One burst at the very beginning, one request that does not fit, and none of the rate before.
        assert amount <= expected + max(rate * SLICE_S, size) + size
        assert amount >= expected - max(rate * SLICE_S, size) - size


def test_a_charge_above_the_capacity_goes_ahead_in_the_end() -> None:
    bucket = Bucket(100.0, 10.0, 0.0)
    assert bucket.wait_s(bucket.charge(1000, 0.0), 1000, 0.0) == 0.0
    ticket = bucket.charge(1, 0.0)
    assert bucket.wait_s(ticket, 1, 0.0) == pytest.approx(9.91)
    assert bucket.wait_s(ticket, 1, 9.92) == 0.0


def test_a_cap_is_kept_over_time() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.set_limits("a", Limits(iops=500))
    done = serve({"a": throttle.lane("a").turn()}, 4096, clock, 20.0)
    assert len(done) == pytest.approx(500 * 20, rel=0.01)


def test_bytes_and_requests_are_both_kept() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.set_limits("a", Limits(iops=1000, bytes_per_s=1 << 20))
    turn = throttle.lane("a").turn()
    assert len(serve({"a": turn}, 65536, clock, 10.0)) == pytest.approx(160, rel=0.02)
    assert len(serve({"a": turn}, 512, clock, 10.0)) == pytest.approx(10_000, rel=0.02)


def test_reads_do_not_wait_for_a_cap_on_writes() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.set_limits("a", Limits(write_iops=1))
    turn = throttle.lane("a").turn()
    assert all(turn.ask(False, 4096) == 0.0 for _ in range(1000))
    assert turn.ask(True, 4096) > 0.0


def test_a_burst_lasts_as_long_as_was_said_and_no_longer() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.set_limits("a", Limits(iops=100, iops_burst=1000, burst_s=2.0), is_in_use=False)
    done = serve({"a": throttle.lane("a").turn()}, 512, clock, 12.0)
    assert sum(at_s < 1001.0 for at_s, _ in done) == pytest.approx(1000, rel=0.12)  # and a slice of 100 ms
    assert len(done) == pytest.approx(900 * 2 + 100 * 12, rel=0.02)
    last = [at_s for at_s, _ in done if at_s > 1006.0]
    assert len(last) == pytest.approx(600, rel=0.03)


def test_disks_of_a_partition_share_by_turns_whatever_each_has_ready() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.set_limits(None, Limits(iops=300))
    turns = {f"greedy{number}": throttle.lane("a").turn() for number in range(4)}  # four rings of one disk
    turns["modest"] = throttle.lane("b").turn()
    done = serve(turns, 4096, clock, 30.0)
    assert len(done) == pytest.approx(300 * 30, rel=0.02)
    assert sum(name == "modest" for _, name in done) == pytest.approx(150 * 30, rel=0.05)
    for number in range(4):
        assert sum(name == f"greedy{number}" for _, name in done) == pytest.approx(150 * 30 / 4, rel=0.1)


def test_one_that_goes_away_is_not_waited_for() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.set_limits("a", Limits(iops=10))
    gone, stays = throttle.lane("a").turn(), throttle.lane("a").turn()
    serve({"gone": gone, "stays": stays}, 512, clock, 3.0)
    gone.leave()
    assert len(serve({"stays": stays}, 512, clock, 10.0)) == pytest.approx(100, rel=0.03)


def test_a_change_is_in_force_for_who_waits_already() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    woken: list[float] = []
    throttle.add_waker(lambda: woken.append(clock.now_s))
    throttle.set_limits("a", Limits(iops=1))
    turn = throttle.lane("a").turn()
    serve({"a": turn}, 512, clock, 5.0)
    assert turn.ask(False, 512) > 0.0
    throttle.set_limits("a", Limits(iops=1000))
    assert len(woken) == 2
    clock.now_s += 0.1
    assert turn.ask(False, 512) == 0.0
    assert turn.ask(False, 512) == 0.0


def test_taking_the_cap_away_lets_all_go_and_leaves_nothing_behind() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.set_limits("a", Limits(iops=1))
    first, second = throttle.lane("a").turn(), throttle.lane("a").turn()
    serve({"first": first, "second": second}, 512, clock, 5.0)
    throttle.set_limits("a", Limits())
    assert not first.is_limited
    assert first.ask(False, 512) == second.ask(False, 512) == 0.0
    throttle.set_limits("a", Limits(iops=100))
    assert len(serve({"second": second}, 512, clock, 10.0)) == pytest.approx(1000, rel=0.03)


def test_how_long_requests_waited_is_known() -> None:
    clock = Clock()
    throttle = Throttle(clock)
    throttle.set_limits("a", Limits(iops=10), is_in_use=False)
    serve({"a": throttle.lane("a").turn()}, 512, clock, 10.0)
    said = throttle.status("a")
    assert said["limits"] == {"iops": 10}
    assert said["waits"] == pytest.approx(99, abs=1)
    assert said["waited_s"] == pytest.approx(10.0, abs=0.2)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"iops": -1}, "limits.iops"),
        ({"iops": True}, "limits.iops"),
        ({"bytes_per_s": 1.5}, "limits.bytes_per_s"),
        ({"iops": 100, "iops_burst": 100}, "iops_burst"),
        ({"iops_burst": 100}, "iops_burst"),
        ({"iops": 1, "burst_s": 0}, "burst_s"),
        ({"iops": 1, "burst_s": float("nan")}, "burst_s"),
        ({"ops": 1}, "'ops'"),
        (7, "an object"),
    ],
)
def test_wrong_limits_are_named(fields: object, named: str) -> None:
    with pytest.raises(InvalidError, match=named):
        Limits.from_fields(fields, "limits")


@given(st.builds(Limits, iops=st.integers(0, 1 << 50), write_bytes_per_s=st.integers(0, 1 << 50)))
def test_what_is_shown_gives_the_same_limits_again(limits: Limits) -> None:
    assert Limits.from_fields(limits.to_fields(), "x") == limits
