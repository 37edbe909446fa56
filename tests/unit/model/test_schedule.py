"""When schedules are due and what they keep: at every instant, in zones whose clocks jump."""

from __future__ import annotations

import datetime
import itertools
import zoneinfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mullion.base.errors import InvalidError
from mullion.model.schedule import (
    Every,
    Keeping,
    OnDays,
    Rule,
    next_due,
    parse_interval,
    parse_rule,
    plan_expiry,
)

pytestmark = pytest.mark.unit

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
UTC = datetime.UTC
RULES = st.one_of(
    st.integers(60, 40 * 86_400).map(Every),
    st.builds(OnDays, st.integers(0, 23), st.integers(0, 59), st.one_of(st.none(), st.integers(0, 6))),
)
TIMES = st.floats(1.7e9, 1.9e9)
ZONES = st.sampled_from([UTC, BERLIN, zoneinfo.ZoneInfo("Australia/Lord_Howe"), zoneinfo.ZoneInfo("America/St_Johns")])


def at(text: str, zone: datetime.tzinfo = BERLIN, fold: int = 0) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).timestamp()


def due(rule: str, last: str, now: str | None = None) -> str:
    """The next due time after a last run, as the clock on the wall shows it in Berlin."""
    last_s = at(last)
    now_s = last_s if now is None else at(now)
    due_s = next_due(parse_rule(rule), begun_s=last_s, last_s=last_s, now_s=now_s, zone=BERLIN)
    return datetime.datetime.fromtimestamp(due_s, BERLIN).strftime("%Y-%m-%d %H:%M %Z")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("every 1h", Every(3600)),
        ("every 90 s", Every(90)),
        ("Every 15min", Every(900)),
        ("every 1w", Every(604_800)),
        ("daily 02:30", OnDays(2, 30)),
        ("weekly SUN 03:00", OnDays(3, 0, 6)),
        ("weekly monday 0:05", OnDays(0, 5, 0)),
        ("weekly Wednesday 0:05", OnDays(0, 5, 2)),
    ],
)
def test_rules_are_read_as_people_write_them(text: str, rule: Rule) -> None:
    assert parse_rule(text) == rule
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    ["", "every", "every 1", "every 0h", "every 59s", "every 400d", "daily", "daily 24:00", "daily 2", "weekly 03:00",
     "weekly xyz 03:00", "weekly sunny 03:00", "weekly su 03:00", "hourly", "* * * * *", "every 99999999999999h", "daily 02:30 now"],
)  # fmt: skip
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(InvalidError, match="is no"):
        parse_rule(text)


def test_intervals() -> None:
    assert [parse_interval(text) for text in ("60s", "2m", "30d")] == [60, 120, 2_592_000]


@pytest.mark.parametrize(
    ("rule", "last", "expected"),
    [
        ("every 1h", "2026-05-01 12:00", "2026-05-01 13:00 CEST"),
        ("daily 02:30", "2026-05-01 02:30", "2026-05-02 02:30 CEST"),
        ("daily 02:30", "2026-05-01 01:00", "2026-05-01 02:30 CEST"),
        ("daily 02:30", "2026-03-28 02:30", "2026-03-29 03:30 CEST"),  # there is no 02:30 on that day
        ("daily 02:30", "2026-03-29 04:00", "2026-03-30 02:30 CEST"),
        ("daily 02:30", "2026-10-24 02:30", "2026-10-25 02:30 CEST"),  # the first of two
        ("every 1h", "2026-03-29 01:30", "2026-03-29 03:30 CEST"),
        ("weekly sun 03:00", "2026-05-03 03:00", "2026-05-10 03:00 CEST"),
        ("weekly sun 03:00", "2026-05-02 12:00", "2026-05-03 03:00 CEST"),
        ("weekly mon 00:00", "2026-12-28 00:00", "2027-01-04 00:00 CET"),
    ],
)
def test_the_next_time(rule: str, last: str, expected: str) -> None:
    assert due(rule, last) == expected


def test_an_hour_that_comes_twice_brings_one_run() -> None:
    first_s = at("2026-10-25 02:30")
    again = next_due(OnDays(2, 30), begun_s=0, last_s=first_s, now_s=first_s, zone=BERLIN)
    assert again == at("2026-10-26 02:30")


def test_runs_that_were_missed_are_one() -> None:
    assert due("every 1h", "2026-05-01 12:00", now="2026-05-04 08:20") == "2026-05-01 13:00 CEST"  # over: at once
    begun_s, now_s = at("2026-05-01 12:00"), at("2026-05-04 08:20")
    assert next_due(Every(3600), begun_s=begun_s, last_s=now_s, now_s=now_s, zone=BERLIN) == at("2026-05-04 09:00")


def test_a_clock_that_was_set_back_does_not_stop_it() -> None:
    last_s, now_s = at("2036-05-01 12:00"), at("2026-05-01 12:10")
    assert next_due(Every(3600), begun_s=last_s, last_s=last_s, now_s=now_s, zone=BERLIN) == now_s + 3600
    assert next_due(OnDays(2, 30), begun_s=last_s, last_s=last_s, now_s=now_s, zone=BERLIN) == at("2026-05-02 02:30")


@given(RULES, TIMES, TIMES, TIMES, ZONES)
@example(OnDays(2, 30), 1.774e9, 1.7747e9, 1.7748e9, BERLIN)
def test_after_a_run_the_next_one_lies_ahead_but_not_far(
    rule: Rule, begun_s: float, last_s: float, now_s: float, zone: datetime.tzinfo
) -> None:
    due_s = next_due(rule, begun_s=begun_s, last_s=last_s, now_s=now_s, zone=zone)
    period_s = rule.interval_s if isinstance(rule, Every) else 86_400 * (1 if rule.weekday is None else 7)
    longest_s = period_s + 7200  # a clock that goes back makes a day longer
    assert due_s - min(last_s, now_s) <= longest_s or due_s - begun_s <= longest_s
    assert due_s <= max(now_s, begun_s, last_s) + longest_s
    after_s = next_due(rule, begun_s=min(begun_s, now_s), last_s=now_s, now_s=now_s, zone=zone)
    assert now_s < after_s <= now_s + longest_s


@given(RULES, TIMES, ZONES)
def test_every_day_has_its_time(rule: Rule, start_s: float, zone: datetime.tzinfo) -> None:
    if isinstance(rule, Every):
        return
    seen_s = [start_s]
    for _ in range(10):
        seen_s.append(next_due(rule, begun_s=start_s, last_s=seen_s[-1], now_s=seen_s[-1], zone=zone))
    days = [datetime.datetime.fromtimestamp(time_s, zone).date() for time_s in seen_s[1:]]
    step = 1 if rule.weekday is None else 7
    assert [(after - before).days for before, after in itertools.pairwise(days)] == [step] * 9


@given(
    st.lists(TIMES, max_size=30), st.one_of(st.none(), st.integers(1, 40)), st.one_of(st.none(), st.integers(60, 10**8)),
    TIMES,
)  # fmt: skip
def test_what_goes_is_older_than_what_stays(
    times: list[float], count: int | None, age_s: int | None, now_s: float
) -> None:
    made = [(f"{number}", time_s) for number, time_s in enumerate(times)]
    going = plan_expiry(made, Keeping(count, age_s), now_s)
    times_of = dict(made)
    staying = [one for one, _ in made if one not in going]
    assert not made or staying
    assert max((times_of[one] for one in going), default=0.0) <= min((times_of[one] for one in staying), default=0.0)
    assert [times_of[one] for one in going] == sorted(times_of[one] for one in going)
    if count is not None:
        assert len(staying) <= count
    if age_s is not None:
        assert len([one for one in staying if now_s - times_of[one] > age_s]) <= 1
    assert plan_expiry([(one, times_of[one]) for one in staying], Keeping(count, age_s), now_s) == ()


@pytest.mark.parametrize("keeping", [Keeping(), Keeping(count=0), Keeping(count=5000)])
def test_a_retention_that_cannot_be_meant_is_refused(keeping: Keeping) -> None:
    with pytest.raises(InvalidError):
        keeping.check()
