"""Waiting in the event loop for a process that need not be our child.

Source: pidfd_open(2): the descriptor becomes readable when the process ends, also for a stranger's child. It tells that
the process has ended, not how; only a parent learns the status.
"""

from __future__ import annotations

import asyncio
import os

from mullion.base.process import ProcessIdentity


async def wait_process(identity: ProcessIdentity) -> None:
    """Return when exactly this process has ended; at once when it has ended already, or its pid is another's now."""
    pidfd = identity.open_pidfd()
    if pidfd is None:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
