"""Faults on purpose: what a guest, and an administrator, do when a disk fails, is slow or full. For tests and drills.

JSON of a rule: `{"kinds": ["read", "write", "flush", "discard", "write_zeroes"], "offset": first byte, "length": bytes
(0: to the end), "error": "EIO" or "ENOSPC" (null: none), "latency_ms": added to each, "every": each so manieth request
that fits, "count": how many are hit at most (0: no end)}`; all may be left out, but one of error and latency.
A request that is hit by an error does not reach the disk. Latency holds up the disk's ring, as a slow disk does; that
of a flush holds up nothing else.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final, Self

from mullion.base.errors import InvalidError
from mullion.provider.device import DirectDevice
from mullion.provider.layers.guarded import GuardedLayer, Kind

MAX_RULES: Final = 16
MAX_LATENCY_MS: Final = 10_000
_ERRORS: Final = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
_LIMIT: Final = 1 << 63


@dataclass(frozen=True, slots=True)
class FaultRule:
    """Which requests are hit, and by what."""

    kinds: tuple[Kind, ...] = ()
    offset: int = 0
    length: int = 0
    error: str | None = None
    latency_ms: int = 0
    every: int = 1
    count: int = 0

    @classmethod
    def from_fields(cls, given: object, where: str) -> Self:
        """Raises: InvalidError that names the field."""
        if not isinstance(given, Mapping):
            raise InvalidError(f"{where}: an object is needed")
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise InvalidError(f"{where}: unknown field {name!r}", remedy=f"Known are: {', '.join(known)}.")
        error = given.get("error")
        if error is not None and error not in _ERRORS:
            raise InvalidError(f"{where}.error: {error!r} is not one of {', '.join(_ERRORS)}")
        rule = cls(
            kinds=_kinds(given.get("kinds", ()), f"{where}.kinds"),
            offset=_number(given, "offset", where, 0, _LIMIT),
            length=_number(given, "length", where, 0, _LIMIT),
            error=error,
            latency_ms=_number(given, "latency_ms", where, 0, MAX_LATENCY_MS),
            every=_number(given, "every", where, 1, _LIMIT),
            count=_number(given, "count", where, 0, _LIMIT),
        )
        if error is None and not rule.latency_ms:
            raise InvalidError(f"{where}: neither an error nor a latency", remedy="Give one of them.")
        return rule

    def to_fields(self) -> dict[str, object]:
        return {
            "kinds": [kind.value for kind in self.kinds],
            "offset": self.offset,
            "length": self.length,
            "error": self.error,
            "latency_ms": self.latency_ms,
            "every": self.every,
            "count": self.count,
        }

    def fits(self, kind: Kind, offset: int, length: int) -> bool:
        if self.kinds and kind not in self.kinds:
            return False
        if kind is Kind.FLUSH:  # of the whole disk
            return True
        return offset + length > self.offset and (not self.length or offset < self.offset + self.length)


class FaultLayer(GuardedLayer):
    """A disk with rules. Used by the threads of all transports."""

    def __init__(
        self, below: DirectDevice, rules: Sequence[FaultRule], sleep: Callable[[float], None] = time.sleep
    ) -> None:
        super().__init__(below)
        self.rules = tuple(rules)
        self._sleep = sleep
        self._lock = threading.Lock()
        self._seen = [0] * len(rules)
        self.hits = [0] * len(rules)

    def around(self, kind: Kind, offset: int, length: int, act: Callable[[], None]) -> None:
        latency_ms, error = 0, None
        with self._lock:
            for number, rule in enumerate(self.rules):
                if not rule.fits(kind, offset, length) or (rule.count and self.hits[number] >= rule.count):
                    continue
                self._seen[number] += 1
                if self._seen[number] % rule.every:
                    continue
                self.hits[number] += 1
                latency_ms += rule.latency_ms
                error = error or rule.error
        if latency_ms:
            self._sleep(min(latency_ms, MAX_LATENCY_MS) / 1000)
        if error is not None:
            raise OSError(_ERRORS[error], f"{os.strerror(_ERRORS[error])} (injected fault)")
        act()

    def status(self) -> list[dict[str, object]]:
        """The rules and how often each has hit."""
        return [{**rule.to_fields(), "hits": hits} for rule, hits in zip(self.rules, self.hits, strict=True)]


def _kinds(given: object, where: str) -> tuple[Kind, ...]:
    words = [kind.value for kind in Kind]
    if not isinstance(given, list | tuple) or any(word not in words for word in given):
        raise InvalidError(f"{where}: a list of these is needed: {', '.join(words)}")
    return tuple(Kind(word) for word in given)


def _number(given: Mapping[str, object], name: str, where: str, least: int, most: int) -> int:
    value = given.get(name, least)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidError(f"{where}.{name}: a whole number from {least} to {most} is needed")
    return value
