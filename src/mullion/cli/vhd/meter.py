"""How far long work on a file is: a line that is redrawn on a terminal, with rate and time left; nothing elsewhere.

^C ends the work where it is; what it leaves behind is the work's own promise, which the command passes on as `after`.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Final

from mullion.base.progress import Progress
from mullion.base.units import format_duration, format_size
from mullion.cli.face import Face
from mullion.cli.progress import InterruptedFault

_BAR_CELLS: Final = 10
_CLEAR_LINE: Final = "\r\x1b[K"
_REDRAW_S: Final = 0.1


class Meter:
    """Draws the progress of one piece of work."""

    def __init__(self, face: Face, title: str) -> None:
        self._title = title
        self._redraws = not face.quiet and not face.is_json and sys.stderr.isatty()
        self._drawn_s = 0.0
        self._stage = ""
        self._begun_s = time.monotonic()

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        if stage != self._stage:
            self._stage, self._begun_s = stage, now_s
        elif now_s - self._drawn_s < _REDRAW_S:
            return
        self._drawn_s = now_s
        if self._redraws:
            width = shutil.get_terminal_size().columns - 1
            text = meter_line(self._title, stage, done_bytes, total_bytes, now_s - self._begun_s, width=width)
            sys.stderr.write(_CLEAR_LINE + text)
            sys.stderr.flush()

    def clear(self) -> None:
        """Leave a clean line to whoever prints next."""
        if self._redraws:
            sys.stderr.write(_CLEAR_LINE)
            sys.stderr.flush()


def meter_line(title: str, stage: str, done_bytes: int, total_bytes: int, elapsed_s: float, *, width: int) -> str:
    """`convert  [###.......]  25%  1.2 GiB of 4.8 GiB  310 MiB/s  11.6 s left  copying`, as far as there is room.

    On 80 columns the stage may go, rate and time left stay. Work whose size is not known is its stage alone.
    """
    if not total_bytes:
        return f"{title}  {stage}".rstrip()[:width]
    share = min(done_bytes / total_bytes, 1.0)
    filled = int(share * _BAR_CELLS)
    parts = [title, f"[{'#' * filled}{'.' * (_BAR_CELLS - filled)}] {share:4.0%}"]
    parts.append(f"{format_size(done_bytes)} of {format_size(total_bytes)}")
    if elapsed_s > 0.5 and done_bytes:
        rate = done_bytes / elapsed_s
        parts.append(f"{format_size(int(rate))}/s")
        parts.append(f"{format_duration(max(0, total_bytes - done_bytes) / rate)} left")
    line = "  ".join(parts)
    return f"{line}  {stage}".rstrip() if len(line) + 2 + len(stage) <= width else line[:width]


@contextlib.contextmanager
def metered(face: Face, title: str, *, after: str) -> Iterator[Progress]:
    """Show progress while the block runs. ^C becomes an InterruptedFault that says `after`: what is there now."""
    meter = Meter(face, title)
    try:
        yield meter
    except KeyboardInterrupt:
        raise InterruptedFault(f"{title} was interrupted", remedy=after) from None
    finally:
        meter.clear()
