"""Sizes and durations as people write them and as programs count them.

Sizes are int bytes at every boundary; suffixes K, M, G, T are powers of 1024, whatever follows them (`M`, `MB`, `MiB`).
"""

from __future__ import annotations

import re
import time
from typing import Final

from mullion.base.errors import InvalidError

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB
SECTOR_BYTES: Final = 512

_FACTORS: Final = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE: Final = re.compile(r"\s*(\d{1,20})(?:\.(\d{1,3}))?\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as `512`, `40M`, `1.5G` or `2 TiB`.

    Raises: InvalidError when the text is not a size or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidError(f"{text!r} is not a size", remedy="Write a number with K, M, G or T, such as 512M or 40G.")
    whole, fraction, suffix = match.groups()
    factor = _FACTORS[suffix.upper()]
    size_bytes = int(whole) * factor
    if fraction:
        part, rest = divmod(int(fraction) * factor, 10 ** len(fraction))
        if rest:
            raise InvalidError(f"{text!r} is not a whole number of bytes", remedy="Use a smaller unit.")
        size_bytes += part
    return size_bytes


def format_size(size_bytes: int) -> str:
    """A size for people: `40 MiB`, `1.5 GiB`, `1.99 TiB`, `511 B`."""
    for unit, factor, digits in (("TiB", TIB, 2), ("GiB", GIB, 1), ("MiB", MIB, 1), ("KiB", KIB, 1)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.{digits}f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{size_bytes} B"


def format_duration(seconds: float) -> str:
    """A duration for people: `640 ms`, `12.3 s`, `4 min 05 s`, `3 h 07 min`, `2 d 03 h`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02} h"


def utc_now() -> str:
    """The present time as RFC 3339 in UTC, with microseconds: `2026-11-22T09:30:00.000125Z`."""
    return format_time(time.time_ns())


def format_time(unix_ns: int) -> str:
    """A time in nanoseconds since 1970 as RFC 3339 in UTC; such texts sort as the times do."""
    seconds, rest_ns = divmod(unix_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest_ns // 1000:06}Z"
