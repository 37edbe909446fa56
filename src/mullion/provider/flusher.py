"""The thread that carries out the flushes of a disk's rings, so that the requests behind them are served meanwhile.

Those that wait while it flushes are done by the next flush, as one. It touches neither rings nor the guest's memory:
what became of a flush goes into a queue of the ring that asked, whose own thread is woken and answers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final

from mullion.provider.blk import OutOfSpace
from mullion.wire.vhost_user.virtio_blk import BlkStatus

log = logging.getLogger(__name__)

Outcome = tuple[int, BlkStatus | OutOfSpace]
"""Head of the request, and what it is to be answered with, or why it has to be tried again."""
_Asked = tuple[SimpleQueue[Outcome], int]

_ENDED: Final = None


class Flusher:
    """One disk's. `ask` is for one thread."""

    def __init__(self, flush: Callable[[], BlkStatus], wake: Callable[[], None], *, name: str) -> None:
        """`flush` may raise OutOfSpace; `wake` is called when something was done."""
        self._flush = flush
        self._wake = wake
        self._name = name
        self._asked: SimpleQueue[_Asked | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, outcomes: SimpleQueue[Outcome], head: int) -> bool:
        """Have it flushed; False when the host allows no thread for it."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        self._asked.put((outcomes, head))
        return True

    def stop(self) -> None:
        """End the thread, after what was asked for."""
        if self._thread is not None:
            self._asked.put(_ENDED)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (first := self._asked.get()) is not _ENDED:
            together = [first]
            is_ending = False
            while True:
                try:
                    another = self._asked.get_nowait()
                except Empty:
                    break
                if another is _ENDED:
                    is_ending = True
                    break
                together.append(another)
            outcome: BlkStatus | OutOfSpace
            try:
                outcome = self._flush()
            except OutOfSpace as shortage:
                outcome = shortage
            except Exception:  # the root of the thread: a fault of ours fails what was asked for, and is not quiet
                log.exception("a flush failed because of a fault in the provider")
                outcome = BlkStatus.IOERR
            for outcomes, head in together:
                outcomes.put((head, outcome))
            self._wake()
            if is_ending:
                return
