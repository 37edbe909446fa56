"""How long work tells its caller how far it is, without knowing who listens.

The work calls the function now and then, in the thread that called it: often enough to look alive, at most some
hundred times in all. Whoever listens may raise, which ends the work as any other error would: so it is cancelled.
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""The stage in a few words, what is done and what there is in all, in bytes of the disk's content."""


def no_progress(_stage: str, _done_bytes: int, _total_bytes: int) -> None:
    """For callers that do not listen."""
