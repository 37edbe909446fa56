"""The service's end of a repository worker: start it, follow it, take its answer."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from mullion.base.errors import MullionError, OperationFailedError
from mullion.base.process import spawn
from mullion.base.units import MIB

log = logging.getLogger(__name__)

_LINE_LIMIT_BYTES: Final = 64 * MIB
_WORKER: Final = "mullion.services.backup.worker"

OnProgress = Callable[[str, int, int], None]


async def run_worker(
    request: Mapping[str, Any], log_path: str, on_progress: OnProgress = lambda *_: None
) -> Mapping[str, Any]:
    """Have a worker carry out a request. Cancelled, it is ended at once.

    Raises: the error that it ends with; OperationFailedError when it dies.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        argv = (sys.executable, "-P", "-m", _WORKER, "--fd", str(theirs.fileno()))
        process = spawn(argv, log_path=log_path, pass_fds=(theirs.fileno(),), env=_environment())
    ours.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=ours, limit=_LINE_LIMIT_BYTES)
    try:
        writer.write(json.dumps(request).encode() + b"\n")
        await writer.drain()
        while line := await reader.readline():
            message = json.loads(line)
            if "result" in message:
                return dict(message["result"])
            if "error" in message:
                raise MullionError.from_wire(message["error"])
            on_progress(message["stage"], message["done"], message["total"])
    except ConnectionError as error:
        log.warning("a repository worker hung up: %s", error)
    finally:
        writer.close()
        status = await asyncio.shield(asyncio.to_thread(process.wait))
    raise OperationFailedError(
        f"the process that works on the repository ended with status {status} before it was done",
        remedy=f"Read {log_path}. The repository is whole; what was stored is used by the next try.",
    )


def _environment() -> dict[str, str]:
    """Ours, without what would let others' settings reach the libraries that open connections."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "BOTO"))}
