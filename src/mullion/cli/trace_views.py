"""How traced requests look: one line each, and what they amount to in the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from mullion.base.units import format_size
from mullion.model.views import TraceDiskView

_FIELDS: Final = ("at_us", "kind", "offset", "length", "latency_us", "failed")
_PERCENTS: Final = (50, 90, 99, 100)
_BUCKETS: Final = 64  # log2 of microseconds and bytes

Request = tuple[int, str, int, int, int, bool]


def json_line(disk: str, request: Request) -> str:
    """A request as an object of its own."""
    return json.dumps({"disk": disk, **dict(zip(_FIELDS, request, strict=True))}, separators=(",", ":"))


def table_line(disk: str, request: Request) -> str:
    """`   1.234567 s  disk0  read   4 KiB at 0x1000   85 us`."""
    at_us, kind, offset, length, latency_us, failed = request
    end = "  FAILED" if failed else ""
    return (
        f"{at_us / 1e6:12.6f} s  {disk}  {kind:<12} {format_size(length):>9} at {offset:#014x} {latency_us:>8} us{end}"
    )


@dataclass
class _Kind:
    """The requests of one kind on one disk: counts only, whatever their number."""

    count: int = 0
    bytes: int = 0
    failed: int = 0
    sequential: int = 0
    next_offset: int = -1
    latencies: list[int] = field(default_factory=lambda: [0] * _BUCKETS)
    sizes: list[int] = field(default_factory=lambda: [0] * _BUCKETS)

    def add(self, request: Request) -> None:
        _at_us, _kind, offset, length, latency_us, failed = request
        self.count += 1
        self.bytes += length
        self.failed += failed
        self.sequential += offset == self.next_offset
        self.next_offset = offset + length
        self.latencies[latency_us.bit_length()] += 1
        self.sizes[length.bit_length()] += 1


class TraceSummary:
    """Adds up what was read of a trace, in bounded memory."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._dropped: dict[str, int] = {}

    def add(self, view: TraceDiskView) -> None:
        self._dropped[view.id] = view.dropped
        for request in view.requests:
            self._kinds.setdefault((view.id, request[1]), _Kind()).add(request)

    def facts(self) -> list[dict[str, object]]:
        """A row for each kind of request on each disk; latencies are upper ends, sizes lower ends of powers of two."""
        return [
            {
                "disk": disk,
                "kind": kind,
                "requests": one.count,
                "bytes": one.bytes,
                "failed": one.failed,
                "sequential": round(one.sequential / one.count, 3),
                "latency_us": {str(percent): percentile(one.latencies, percent) for percent in _PERCENTS},
                "median_bytes": percentile(one.sizes, 50) // 2 if one.bytes else 0,
            }
            for (disk, kind), one in sorted(self._kinds.items())
        ]

    def json_line(self) -> str:
        return json.dumps({"summary": self.facts(), "dropped": self._dropped}, separators=(",", ":"))

    def render(self) -> str:
        from mullion.cli.tables import table

        facts = self.facts()
        rows = [
            (
                str(one["disk"]),
                str(one["kind"]),
                str(one["requests"]),
                format_size(int(str(one["bytes"]))),
                f"{float(str(one['sequential'])):.0%}",
                *(f"< {latency} us" for latency in _latencies(one)),
                str(one["failed"]),
            )
            for one in facts
        ]
        heads = ("DISK", "KIND", "REQUESTS", "DATA", "SEQUENTIAL", *(f"{p} %" for p in _PERCENTS), "FAILED")
        text = table(heads, rows, right=tuple(range(2, 10))) if rows else "No requests."
        lost = [
            f"{disk}: {count} requests came faster than they were read"
            for disk, count in self._dropped.items()
            if count
        ]
        return "\n".join([text, *lost])


def _latencies(fact: dict[str, object]) -> list[object]:
    found = fact["latency_us"]
    assert isinstance(found, dict)
    return list(found.values())


def percentile(buckets: Sequence[int], percent: int) -> int:
    """The upper end of the power of two in which so many percent of all are reached."""
    wanted, seen = sum(buckets) * percent / 100, 0
    for number, count in enumerate(buckets):
        seen += count
        if count and seen >= wanted:
            return 1 << number
    return 0
