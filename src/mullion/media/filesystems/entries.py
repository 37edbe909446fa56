"""What is said of a file inside a disk, and how it travels: an object of JSON, then its content in frames.

Whoever reads an entry believes nothing of it: fields are checked to be of their kinds, names when they are used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, NamedTuple

from mullion.base.units import format_time

_KINDS: Final = ("file", "folder", "link", "other")
_SHOWN_LIMIT: Final = 500


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file, folder or link inside a volume; times in nanoseconds since 1970, None where there is none."""

    path: str
    """Below what was asked for; empty for that itself."""
    name: str
    type: str
    size_bytes: int
    mode: int
    modified_ns: int | None
    created_ns: int | None
    accessed_ns: int | None
    target: str | None
    streams: tuple[tuple[str, int], ...]
    unreadable: str | None
    """Why its content cannot be had, where it cannot."""


class Hole(NamedTuple):
    """So many zeros of a file's content that the disk does not hold."""

    length: int


Piece = FileEntry | bytes | Hole
"""What an answer consists of: an entry, and after that of a file its content."""


def pack_entry(entry: FileEntry) -> bytes:
    """An entry as JSON, for `unpack_entry`; names that are not UTF-8 keep their bytes."""
    return json.dumps(
        {
            "path": entry.path,
            "name": entry.name,
            "type": entry.type,
            "size_bytes": entry.size_bytes,
            "mode": entry.mode,
            "modified_ns": entry.modified_ns,
            "created_ns": entry.created_ns,
            "accessed_ns": entry.accessed_ns,
            "target": entry.target,
            "streams": [{"name": name, "size_bytes": size} for name, size in entry.streams],
            "unreadable": entry.unreadable,
        }
    ).encode()


def unpack_entry(payload: bytes) -> FileEntry:
    """An entry from JSON. Raises: ValueError that says what came instead."""
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ValueError("what is not JSON") from error
    if not isinstance(fields, dict):
        raise ValueError("what is no object")
    try:
        entry = FileEntry(
            path=_text(fields["path"]),
            name=_text(fields["name"]),
            type=_text(fields["type"]),
            size_bytes=_number(fields["size_bytes"]),
            mode=_number(fields["mode"]) & 0o7777,
            modified_ns=_time(fields["modified_ns"]),
            created_ns=_time(fields["created_ns"]),
            accessed_ns=_time(fields["accessed_ns"]),
            target=None if fields["target"] is None else _text(fields["target"]),
            streams=_streams(fields["streams"]),
            unreadable=None if fields["unreadable"] is None else shown(_text(fields["unreadable"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("an entry that is none") from error
    if entry.type not in _KINDS or entry.size_bytes < 0:
        raise ValueError("an entry that is none")
    return entry


def public_fields(entry: FileEntry) -> dict[str, object]:
    """An entry as commands and the API show it: times as RFC 3339, the mode in octal."""
    return {
        "path": entry.path or entry.name,
        "name": entry.name,
        "type": entry.type,
        "size_bytes": entry.size_bytes,
        "modified": _shown_time(entry.modified_ns),
        "created": _shown_time(entry.created_ns),
        "accessed": _shown_time(entry.accessed_ns),
        "mode": f"{entry.mode:04o}",
        "target": entry.target,
        "streams": [{"name": name, "size_bytes": size} for name, size in entry.streams],
        "unreadable": entry.unreadable,
    }


def _shown_time(time_ns: int | None) -> str | None:
    return None if time_ns is None else format_time(time_ns)


def shown(text: str) -> str:
    """Foreign words, harmless for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)[:_SHOWN_LIMIT]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(value)
    return value


def _time(value: object) -> int | None:
    """A time that the host can set; others are as good as none."""
    if value is None:
        return None
    number = _number(value)
    return number if 0 <= number < 1 << 62 else None


def _streams(value: object) -> tuple[tuple[str, int], ...]:
    if not isinstance(value, list):
        raise TypeError(value)
    return tuple((_text(stream["name"]), _number(stream["size_bytes"])) for stream in value)
