"""A thread that flushes for those who have more to do than to wait for it.

Those who ask while it flushes share the next flush. What became of it goes into a queue of whoever asked, whose own
thread is woken and answers: the thread here touches nothing of theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
Outcomes = SimpleQueue[tuple[int, T]]
"""For each flush that was asked for, the number that was given with it, and what `flush` has returned."""


class Flusher(Generic[T]):
    """`ask` and `stop` are for one thread."""

    def __init__(self, flush: Callable[[], T], wake: Callable[[], None], *, name: str) -> None:
        """`flush` does not raise; `wake` is called when something was done. The thread begins when it is needed."""
        self._flush = flush
        self._wake = wake
        self._name = name
        self._asked: SimpleQueue[tuple[Outcomes[T], int] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, outcomes: Outcomes[T], number: int) -> bool:
        """Have all flushed that was written before this call; False when the host allows no thread for it."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        self._asked.put((outcomes, number))
        return True

    def stop(self) -> None:
        """End the thread, after what was asked for."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (first := self._asked.get()) is not None:
            together = [first, *self._take_waiting()]
            outcome = self._flush()
            for outcomes, number in together:
                outcomes.put((number, outcome))
            self._wake()

    def _take_waiting(self) -> list[tuple[Outcomes[T], int]]:
        waiting: list[tuple[Outcomes[T], int]] = []
        while True:
            try:
                another = self._asked.get_nowait()
            except Empty:
                return waiting
            if another is None:  # the end: for the next turn
                self._asked.put(None)
                return waiting
            waiting.append(another)
