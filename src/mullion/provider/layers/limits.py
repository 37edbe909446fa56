"""The caps on a disk or on all disks of a partition: what an administrator says, and the buckets that this makes.

JSON: `{"iops", "read_iops", "write_iops", "bytes_per_s", "read_bytes_per_s", "write_bytes_per_s", "iops_burst",
"bytes_per_s_burst": whole numbers, 0 for none; "burst_s": seconds}`. With `iops_burst` a disk that was below its cap
may do so many a second for `burst_s` seconds before it is back at `iops`; the same for bytes.
A request of any kind that reads or changes data counts once; only READ and WRITE count their bytes (a discard moves
none); FLUSH is free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Final, NamedTuple, Self

from mullion.base.errors import InvalidError

SLICE_S: Final = 0.1
"""How much of a rate may be done at once: what a sleeper that wakes late may catch up with."""
RATE_LIMIT: Final = 1 << 50
BURST_LIMIT_S: Final = 3600.0


class Cap(NamedTuple):
    """One bucket: whether it counts bytes or requests, for reads, writes or (None) both."""

    counts_bytes: bool
    for_writes: bool | None
    rate: int
    capacity: float


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps in requests and bytes a second; 0 for none."""

    iops: int = 0
    read_iops: int = 0
    write_iops: int = 0
    bytes_per_s: int = 0
    read_bytes_per_s: int = 0
    write_bytes_per_s: int = 0
    iops_burst: int = 0
    bytes_per_s_burst: int = 0
    burst_s: float = 1.0

    @classmethod
    def from_fields(cls, given: object, where: str) -> Self:
        """Raises: InvalidError that names the field."""
        if not isinstance(given, Mapping):
            raise InvalidError(f"{where}: an object is needed")
        known = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in known:
                raise InvalidError(f"{where}: unknown field {name!r}", remedy=f"Known are: {', '.join(known)}.")
            if name == "burst_s":
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= BURST_LIMIT_S:
                    raise InvalidError(f"{where}.burst_s: seconds above 0, at most {BURST_LIMIT_S:g}, are needed")
            elif isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= RATE_LIMIT:
                raise InvalidError(f"{where}.{name}: a whole number from 0 to {RATE_LIMIT} is needed")
        limits = cls(**given)
        limits.check(where)
        return limits

    def check(self, where: str) -> None:
        """Raises: InvalidError when a burst has no cap that it exceeds."""
        for name, cap, burst in (
            ("iops", self.iops, self.iops_burst),
            ("bytes_per_s", self.bytes_per_s, self.bytes_per_s_burst),
        ):
            if burst and not 0 < cap < burst:
                raise InvalidError(
                    f"{where}.{name}_burst: {burst} is not above {name}, which is {cap}",
                    remedy=f"Give {name} too, and a burst above it.",
                )

    def to_fields(self) -> dict[str, object]:
        """What is limited, as JSON's values; nothing when nothing is."""
        said = {name: value for name, value in asdict(self).items() if value and name != "burst_s"}
        has_burst = self.iops_burst or self.bytes_per_s_burst
        return {**said, "burst_s": self.burst_s} if has_burst else said

    def caps(self) -> dict[str, Cap]:
        """A bucket for each cap, by name; with a burst there is one more, which caps the burst."""
        found: dict[str, Cap] = {}
        for name, counts_bytes, for_writes, burst in (
            ("iops", False, None, self.iops_burst),
            ("read_iops", False, False, 0),
            ("write_iops", False, True, 0),
            ("bytes_per_s", True, None, self.bytes_per_s_burst),
            ("read_bytes_per_s", True, False, 0),
            ("write_bytes_per_s", True, True, 0),
        ):
            rate: int = getattr(self, name)
            if not rate:
                continue
            saved = (burst - rate) * self.burst_s if burst else 0.0
            found[name] = Cap(counts_bytes, for_writes, rate, max(rate * SLICE_S + saved, 1.0))
            if burst:
                found[f"{name}_burst"] = Cap(counts_bytes, for_writes, burst, max(burst * SLICE_S, 1.0))
        return found


NO_LIMITS: Final = Limits()
