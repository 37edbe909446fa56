"""Who runs a flush, when several want one at the same time or nobody has asked.

Whoever asks while a flush runs needs another one, for it may have written since that one began; all who ask meanwhile
share the next. The system tells of data that it could not write once. Where nobody who was promised anything hears of
it, as in a flush ahead of an exchange of files, the error is kept for the next flush that is a promise. And metadata
that waits for a flush must not wait until a request finds no room for more: somewhat before, a flush is made behind the
requests (`top`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mullion.base.block import raised_again
from mullion.vhd.storage import is_full

if TYPE_CHECKING:
    from mullion.vhd.top import TopWriter


class SharedFlush:
    """The flushes of one disk, one at a time. Used by any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while a flush runs."""
        self._begun = 0
        self._ended = 0
        self._failed = 0
        self._failure: OSError | None = None
        self._untold: OSError | None = None

    def run(self, flush: Callable[[], None], *, is_ahead: bool = False) -> None:
        """Return when a flush has ended that began after this call. Raises: what it raised, for all who shared it.

        Who repeats the flush may hear that all is well. `is_ahead` says that nobody was promised this one: what it
        raises, the next that is a promise raises as well.
        """
        wanted = self._begun + 1
        with self.lock:
            if self._ended >= wanted:
                if self._failure is not None and self._failed >= wanted:
                    if not is_ahead:
                        self._untold = None
                    raise raised_again(self._failure) from self._failure
                return
            self._begun += 1
            try:
                if is_ahead:
                    with self.told_later():
                        flush()
                else:
                    self._tell()
                    flush()
                    self._tell()  # what was met beside it, by an exchange
            except OSError as error:
                self._failed, self._failure, self._ended = self._begun, error, self._begun
                raise
            self._ended = self._begun

    @contextlib.contextmanager
    def told_later(self) -> Iterator[None]:
        """What is made durable in the block was promised to nobody yet: its error is the next promise's as well.

        But for a lack of space: what met that is kept, and written when there is some (`top`). A sync has no such error
        (`FileIO.sync_file`).
        """
        try:
            yield
        except OSError as error:
            if not is_full(error):
                self._untold = error
            raise

    def _tell(self) -> None:
        untold, self._untold = self._untold, None
        if untold is not None:
            raise raised_again(untold) from untold


class FlushBehind:
    """A thread that flushes a top now and then, while requests go on."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def start(self, writer: TopWriter) -> None:
        """Begin, unless it is being done or has failed. The caller sees to it that nobody else calls this meanwhile."""
        if writer.has_failed or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=_flush_behind, args=(writer,), name="flush", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the host allows no more threads: a request flushes when there is no room left
            self._thread = None

    def join(self) -> None:
        """Wait until nothing is done any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _flush_behind(writer: TopWriter) -> None:
    try:
        writer.flush_behind()
    except OSError:
        return  # the writer keeps it for the next flush
