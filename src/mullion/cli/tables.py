"""Aligned columns without boxes, and the small words that go into them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final

from mullion.cli.face import Face

NOTHING: Final = "-"
STATE_COLORS: Final = {
    "running": "green",
    "succeeded": "green",
    "ok": "green",
    "paused": "yellow",
    "saved": "yellow",
    "starting": "yellow",
    "stopping": "yellow",
    "note": "yellow",
    "pending": "yellow",
    "failed": "red",
    "missing": "red",
    "cancelled": "red",
}
_ESCAPE: Final = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_GAP: Final = "  "


def width_of(text: str) -> int:
    """Columns that a text takes on a terminal: colours none, wide characters two, combining ones none."""
    plain = _ESCAPE.sub("", text)
    if plain.isascii():
        return len(plain)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in plain
    )


def printable(text: str) -> str:
    """The text without control characters, which could otherwise drive the reader's terminal."""
    return _CONTROL.sub("?", text)


def state_word(face: Face, word: str) -> str:
    color = STATE_COLORS.get(word)
    return face.style(word, color) if color else word


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Rows under headings, each column as wide as its widest cell; `right` names the columns aligned to the right."""
    lines = [tuple(headings), *(tuple(row) for row in rows)]
    widths = [max(width_of(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(_line(line, widths, frozenset(right)) for line in lines)


def fields(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values, one a line; a value of several lines is indented below its name's column."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((width_of(name) for name, _ in shown), default=0)
    indent = "\n" + " " * (width + len(_GAP))
    return "\n".join(
        f"{name}{' ' * (width - width_of(name))}{_GAP}{indent.join(value.split(chr(10)))}" for name, value in shown
    )


def _line(cells: Sequence[str], widths: Sequence[int], right: frozenset[int]) -> str:
    padded = []
    for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        space = " " * (width - width_of(cell))
        padded.append(space + cell if column in right else cell + space)
    return _GAP.join(padded).rstrip()
