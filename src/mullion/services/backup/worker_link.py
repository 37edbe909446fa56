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
from mullion.base.process import Spawned, spawn
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
    process, reader, writer = await _begin(request, log_path)
    try:
        answer = await _answer(reader, on_progress)
    finally:
        writer.close()
        status = await asyncio.shield(asyncio.to_thread(process.wait))
    if answer is None:
        raise _died(f"ended with status {status} before it was done", log_path)
    return answer


async def start_server(request: Mapping[str, Any], log_path: str) -> Spawned:
    """Have a worker serve a backup's disks from now on, also without us; returns when it does.

    Raises: as `run_worker`.
    """
    process, reader, writer = await _begin(request, log_path)
    try:
        if await _answer(reader, lambda *_: None) is None:
            raise _died("ended before it served anything", log_path)
    except BaseException:
        writer.close()
        await asyncio.shield(asyncio.to_thread(process.wait))
        raise
    writer.close()
    return process


async def _begin(
    request: Mapping[str, Any], log_path: str
) -> tuple[Spawned, asyncio.StreamReader, asyncio.StreamWriter]:
    """Start a worker and give it a request: it goes by the socket, for it has secrets."""
    ours, theirs = socket.socketpair()
    with theirs:
        argv = (sys.executable, "-P", "-m", _WORKER, "--fd", str(theirs.fileno()))
        process = spawn(argv, log_path=log_path, pass_fds=(theirs.fileno(),), env=_environment())
    ours.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=ours, limit=_LINE_LIMIT_BYTES)
    writer.write(json.dumps(request).encode() + b"\n")
    return process, reader, writer


async def _answer(reader: asyncio.StreamReader, on_progress: OnProgress) -> Mapping[str, Any] | None:
    """What a worker ends with; None when it dies. Raises: the error that it says."""
    try:
        while line := await reader.readline():
            message = json.loads(line)
            if "result" in message:
                return dict(message["result"])
            if "error" in message:
                raise MullionError.from_wire(message["error"])
            on_progress(message["stage"], message["done"], message["total"])
    except ConnectionError as error:
        log.warning("a repository worker hung up: %s", error)
    return None


def _died(how: str, log_path: str) -> OperationFailedError:
    return OperationFailedError(
        f"the process that works on the repository {how}",
        remedy=f"Read {log_path}. The repository is whole; what was stored is used by the next try.",
    )


def _environment() -> dict[str, str]:
    """Ours, without what would let others' settings reach the libraries that open connections."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "BOTO"))}
