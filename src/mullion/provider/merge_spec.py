"""What a merge worker is told to do: made by the parent, passed as JSON, checked here.

JSON: `{"partition": name, "upper": file, "lower": file, "control": socket path, "identity": file, "result": file,
"log": file, "uid": number or null, "gid": number or null, "bytes_per_s": number, "below_bytes": number or null}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Self

from mullion.base.errors import InvalidError
from mullion.base.paths import SOCKET_PATH_LIMIT
from mullion.vhd.pacing import DEFAULT_RATE, checked_rate

_PATHS: Final = ("upper", "lower", "control", "identity", "result", "log")
_NUMBERS: Final = ("uid", "gid", "bytes_per_s", "below_bytes")
_PATH_LIMIT: Final = 4096


@dataclass(frozen=True, slots=True)
class MergeSpec:
    """One merge: which layer goes into which, where the worker is controlled, and as whom it runs."""

    partition: str
    upper: str
    lower: str
    control: str
    identity: str
    """The file that gets the worker's process identity, by which the next parent finds it."""
    result: str
    """The file that says at last how it ended; empty until then."""
    log: str
    uid: int | None = None
    gid: int | None = None
    bytes_per_s: int = DEFAULT_RATE
    """0 is without a limit."""
    below_bytes: int | None = None
    """The size of the largest disk below the lower layer; see `vhd.layer_merge.merge_layer`."""

    @classmethod
    def from_fields(cls, given: Mapping[str, object]) -> Self:
        """Raises: InvalidError that names the field."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(given.keys() - known):
            raise InvalidError(f"merge: unknown field {unknown[0]!r}", remedy=f"Known are: {', '.join(sorted(known))}.")
        for name in _PATHS:
            _check_path(name, given.get(name))
        for name in _NUMBERS:
            _check_number(name, given.get(name, 0), is_optional=name != "bytes_per_s")
        partition = given.get("partition")
        if not isinstance(partition, str) or not 0 < len(partition) <= _PATH_LIMIT:
            raise InvalidError("merge.partition: a text is needed")
        values: dict[str, Any] = dict(given)
        spec = cls(**values)
        checked_rate(spec.bytes_per_s)
        return spec

    def to_wire(self) -> dict[str, object]:
        """As JSON's values."""
        return asdict(self)


def _check_path(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value or len(value) > _PATH_LIMIT:
        raise InvalidError(f"merge.{name}: an absolute path is needed")
    if name == "control" and len(value.encode(errors="surrogateescape")) > SOCKET_PATH_LIMIT:
        raise InvalidError(
            f"merge.control: the socket's path is longer than {SOCKET_PATH_LIMIT} bytes: {value}",
            remedy="Choose a shorter run folder (setting run_dir).",
        )


def _check_number(name: str, value: object, *, is_optional: bool) -> None:
    if value is None and is_optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise InvalidError(f"merge.{name}: a number is needed")
