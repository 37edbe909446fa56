"""The guest's filesystems frozen for a moment, and thawed whatever happens to us.

A guest whose filesystems stay frozen is a guest that hangs. So the agent is asked by a process of its own, the guard,
which thaws when it is told to, when its deadline has come, and when whoever started it is gone.

    parent                         guard (`python -m mullion.hypervisor.freeze`)          agent
    lends it the agent's socket ─► guest-fsfreeze-freeze ──────────────────────────────► frozen
                                ◄─ {"frozen": filesystems}
    takes the checkpoint           waits: for a line, for the end of the line, for its deadline
    "thaw" ─────────────────────► guest-fsfreeze-thaw, again until the agent obeys ────► thawed
                                ◄─ {"thawed": filesystems, "late": false}

Not handled: a host that kills guard and parent at the same time; the next parent asks the agent for its state.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import DeadlineError, MullionError
from mullion.base.process import spawn
from mullion.hypervisor.agent import GuestAgent
from mullion.hypervisor.errors import AgentError, AgentRefusedError

FREEZE_DEADLINE_S: Final = 10.0
"""So long may filesystems be frozen; the guest's own services complain after more."""
_FREEZE_S: Final = 20.0
"""Freezing writes back what is dirty first."""
_THAW_RETRY_S: Final = 0.5
_THAW_S: Final = 120.0
_SPARE_S: Final = 5.0


@dataclass(slots=True)
class Frozen:
    """How a freeze went. `is_late` is known when the block has ended: the deadline came first."""

    filesystems: int
    is_late: bool = False


@contextlib.asynccontextmanager
async def frozen_filesystems(
    agent: GuestAgent, log_path: str, *, deadline_s: float = FREEZE_DEADLINE_S
) -> AsyncIterator[Frozen]:
    """The guest's filesystems are frozen inside this block, for `deadline_s` at the longest.

    Raises: AgentError when no agent answers; AgentRefusedError when the guest cannot freeze; DeadlineError from the
    block's end when they were thawed before it came: what was done meanwhile is not consistent.
    """
    async with agent.lend():
        ours, theirs = socket.socketpair()
        with theirs:
            argv = (
                sys.executable,
                "-m",
                __name__,
                agent.path,
                "--fd",
                str(theirs.fileno()),
                "--deadline",
                str(deadline_s),
            )
            guard = spawn(argv, log_path=log_path, pass_fds=(theirs.fileno(),))
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            frozen = Frozen(int(_answer(await _line(reader, _FREEZE_S + _SPARE_S))["frozen"]))
            try:
                yield frozen
            finally:
                writer.write(b"thaw\n")
                frozen.is_late = bool(_answer(await _line(reader, _THAW_S + _SPARE_S)).get("late"))
            if frozen.is_late:
                raise DeadlineError(
                    f"the guest's filesystems were thawed after {deadline_s:g} s, before all was done",
                    remedy="Try again when host and guest have less to do, or without freezing.",
                )
        finally:
            writer.close()
            await asyncio.to_thread(guard.wait)


async def _line(reader: asyncio.StreamReader, deadline_s: float) -> bytes:
    try:
        async with asyncio.timeout(deadline_s):
            return await reader.readline()
    except TimeoutError as error:
        raise AgentError("the process that freezes the guest's filesystems does not answer") from error


def _answer(line: bytes) -> dict[str, int | bool]:
    if not line:
        raise AgentError("the process that freezes the guest's filesystems has died; it thaws when it can")
    answer = json.loads(line)
    if "error" in answer:
        raise MullionError.from_wire(answer["error"])
    return dict(answer)


# -- the guard ---------------------------------------------------------------------------------------------------------


async def _guard(path: str, fd: int, deadline_s: float) -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd))

    async def tell(message: object) -> None:
        with contextlib.suppress(OSError):
            writer.write(json.dumps(message).encode() + b"\n")
            await writer.drain()

    agent = GuestAgent(path)
    try:
        count = await agent.command("guest-fsfreeze-freeze", timeout_s=_FREEZE_S)
    except MullionError as error:
        if not isinstance(error, AgentRefusedError):
            await _thaw(agent)  # it may have frozen and only its answer is missing
        await tell({"error": error.to_wire()})
        return
    await tell({"frozen": count})
    is_late = False
    try:
        async with asyncio.timeout(deadline_s):
            await reader.readline()
    except TimeoutError:
        is_late = True
    await tell({"thawed": await _thaw(agent), "late": is_late})


async def _thaw(agent: GuestAgent) -> int:
    """Thaw, again and again until the agent obeys; the filesystems that were. Raises: AgentError after two minutes."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + _THAW_S
    while True:
        try:
            count = await agent.command("guest-fsfreeze-thaw")
        except AgentError:
            if loop.time() > until_s:
                raise
            await asyncio.sleep(_THAW_RETRY_S)
            continue
        return count if isinstance(count, int) else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="mullion.hypervisor.freeze")
    parser.add_argument("socket")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    given = parser.parse_args()
    asyncio.run(_guard(given.socket, given.fd, given.deadline))
    return 0


if __name__ == "__main__":
    sys.exit(main())
