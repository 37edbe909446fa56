"""Which backups are kept: pure arithmetic on their times.

Each rule keeps the newest backup of each of the last N hours, days, ISO weeks, months or years, in UTC, that have any;
`last` keeps the newest N. A backup that any rule keeps is kept. Partitions are judged each for itself, also two that
have the same name, as on two hosts.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import InvalidError
from mullion.repository.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Retention:
    """How many are kept by each rule; 0 means that the rule keeps none."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    def check(self) -> None:
        """Raises: InvalidError when a number is negative, or nothing at all would be kept."""
        numbers = (self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly)
        if min(numbers) < 0 or not any(numbers):
            raise InvalidError(
                "the retention keeps nothing", remedy="Say how many to keep, by at least one of its rules: last = 7."
            )


_PERIODS: Final[Mapping[str, Callable[[datetime.datetime], tuple[int, ...]]]] = {
    "hourly": lambda time: (time.year, time.month, time.day, time.hour),
    "daily": lambda time: (time.year, time.month, time.day),
    "weekly": lambda time: time.isocalendar()[:2],
    "monthly": lambda time: (time.year, time.month),
    "yearly": lambda time: (time.year,),
}


def plan_retention(backups: Iterable[Manifest], retention: Retention) -> dict[str, tuple[str, ...]]:
    """The rules that keep each backup, by its id; none for those that may go. Raises: InvalidError."""
    retention.check()
    series: dict[tuple[str, str], list[Manifest]] = defaultdict(list)
    for manifest in backups:
        series[manifest.partition, manifest.partition_id].append(manifest)
    kept: dict[str, tuple[str, ...]] = {}
    for manifests in series.values():
        newest_first = sorted(manifests, key=lambda manifest: (manifest.begun_ns, manifest.id), reverse=True)
        kept |= _plan_series(newest_first, retention)
    return kept


def _plan_series(newest_first: list[Manifest], retention: Retention) -> dict[str, tuple[str, ...]]:
    reasons: dict[str, list[str]] = {manifest.id: [] for manifest in newest_first}
    for manifest in newest_first[: retention.last]:
        reasons[manifest.id].append("last")
    for rule, period_of in _PERIODS.items():
        seen: set[tuple[int, ...]] = set()
        for manifest in newest_first:
            time = datetime.datetime.fromtimestamp(manifest.begun_ns // 1_000_000_000, datetime.UTC)
            period = period_of(time)
            if period not in seen and len(seen) < getattr(retention, rule):
                seen.add(period)
                reasons[manifest.id].append(rule)
    return {backup_id: tuple(found) for backup_id, found in reasons.items()}
