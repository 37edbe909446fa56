"""When something repeated is due, and what of it is kept. Pure: the clock and the time zone come from the caller.

    every 6h · every 15min · daily 02:30 · weekly sun 03:00

Times of day are those of the host's time zone. Where its clocks go forward, a time that is skipped comes as much later
as they are moved; where they go back, a time that comes twice is the first of the two.

Invariants: of all times that passed since the last run, however many, one run is due; after it the next one lies in the
future. Where the last run lies in the future, because the clock was set back, the next one is counted from the present:
who keeps the time of the last run has to set it to the present then, else the next one stays ahead of the clock.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import InvalidError

MINUTE_S: Final = 60
DAY_S: Final = 86_400
INTERVAL_LIMIT_S: Final = 366 * DAY_S
KEEP_LIMIT: Final = 1000
_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY: Final = re.compile(r"(mon|tue|wed|thu|fri|sat|sun)|(mon|tues|wednes|thurs|fri|satur|sun)day")
_UNITS: Final = {"s": 1, "min": MINUTE_S, "m": MINUTE_S, "h": 3600, "d": DAY_S, "w": 7 * DAY_S}
_DURATION: Final = re.compile(r"(\d{1,9}) ?(s|min|m|h|d|w)")
_CLOCK: Final = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True, slots=True)
class Every:
    """At fixed intervals, counted from when the schedule was made."""

    interval_s: int

    def __str__(self) -> str:
        return f"every {format_interval(self.interval_s)}"

    def next_after(self, time_s: float, begun_s: float, zone: datetime.tzinfo | None) -> float:
        """The first due time later than `time_s`."""
        passed = math.floor(max(time_s - begun_s, 0.0) / self.interval_s)
        due_s = begun_s + (passed + 1) * self.interval_s
        return due_s if due_s > time_s else due_s + self.interval_s  # where the division was rounded up


@dataclass(frozen=True, slots=True)
class OnDays:
    """At a time of the day: every day, or on one day of the week (0 is Monday)."""

    hour: int
    minute: int
    weekday: int | None = None

    def __str__(self) -> str:
        clock = f"{self.hour:02}:{self.minute:02}"
        return f"daily {clock}" if self.weekday is None else f"weekly {_DAYS[self.weekday]} {clock}"

    def next_after(self, time_s: float, begun_s: float, zone: datetime.tzinfo | None) -> float:
        """The first due time later than `time_s`."""
        day = datetime.datetime.fromtimestamp(time_s, zone).date() - datetime.timedelta(days=1)
        while True:
            if self.weekday in (None, day.weekday()):
                local = datetime.datetime(day.year, day.month, day.day, self.hour, self.minute, tzinfo=zone)
                due_s = local.timestamp()
                if due_s > time_s:
                    return due_s
            day += datetime.timedelta(days=1)


Rule = Every | OnDays


def parse_rule(text: str) -> Rule:
    """A rule as people write it. Raises: InvalidError."""
    words = text.lower().split()
    match words:
        case ["every", *rest] if rest:
            return Every(parse_interval(" ".join(rest)))
        case ["daily", clock] if found := _CLOCK.fullmatch(clock):
            return OnDays(int(found[1]), int(found[2]))
        case ["weekly", day, clock] if _DAY.fullmatch(day) and (found := _CLOCK.fullmatch(clock)):
            return OnDays(int(found[1]), int(found[2]), _DAYS.index(day[:3]))
    raise InvalidError(
        f"{text!r} is no schedule", remedy="Write `every 6h`, `daily 02:30` or `weekly sun 03:00`.", field="rule"
    )


def parse_interval(text: str) -> int:
    """A duration such as 90s, 15min, 6h, 2d or 1w, in seconds. Raises: InvalidError."""
    found = _DURATION.fullmatch(text.strip().lower())
    interval_s = int(found[1]) * _UNITS[found[2]] if found else 0
    if not MINUTE_S <= interval_s <= INTERVAL_LIMIT_S:
        raise InvalidError(
            f"{text!r} is no duration from a minute to a year", remedy="Write 15min, 6h, 2d or 1w.", field="rule"
        )
    return interval_s


def format_interval(interval_s: int) -> str:
    """The shortest way to write it: `6h`, `90s`."""
    for unit in ("w", "d", "h", "min"):
        if interval_s % _UNITS[unit] == 0:
            return f"{interval_s // _UNITS[unit]}{unit}"
    return f"{interval_s}s"


def next_due(rule: Rule, *, begun_s: float, last_s: float | None, now_s: float, zone: datetime.tzinfo | None) -> float:
    """When the next run is due; not later than `now_s` means at once.

    `begun_s` is when the schedule was made, `last_s` when it ran last; `zone` None is that of the host. All times are
    seconds since 1970.
    """
    since_s = begun_s if last_s is None else last_s
    if since_s > now_s:  # the clock was set back
        return rule.next_after(now_s, min(begun_s, now_s), zone)
    return rule.next_after(since_s, begun_s, zone)


@dataclass(frozen=True, slots=True)
class Keeping:
    """What is kept of all that a schedule made: the newest `count`, nothing older than `age_s`; None is no limit."""

    count: int | None = None
    age_s: int | None = None

    def check(self) -> None:
        """Raises: InvalidError when everything would be kept, or nothing."""
        if self.count is None and self.age_s is None:
            raise InvalidError(
                "a schedule that deletes nothing fills the storage",
                remedy="Say how many to keep, or for how long: `--keep 24`, `--keep-for 30d`.",
                field="keep",
            )
        if self.count is not None and not 1 <= self.count <= KEEP_LIMIT:
            raise InvalidError(f"{self.count} cannot be kept", remedy=f"Keep 1 to {KEEP_LIMIT}.", field="keep")


def plan_expiry(made: Iterable[tuple[str, float]], keeping: Keeping, now_s: float) -> tuple[str, ...]:
    """Which of them go, oldest first: (id, seconds since 1970). The newest stays whatever its age."""
    newest_first = sorted(made, key=lambda one: (one[1], one[0]), reverse=True)
    going = [
        one
        for number, (one, made_s) in enumerate(newest_first)
        if number
        and (
            (keeping.count is not None and number >= keeping.count)
            or (keeping.age_s is not None and now_s - made_s > keeping.age_s)
        )
    ]
    return tuple(reversed(going))
