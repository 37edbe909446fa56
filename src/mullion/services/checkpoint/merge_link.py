"""The parent's end of a merge worker: it is started through the zygote, adopted by the next parent, asked and told.

A worker (`mullion.provider.merger`) needs no parent. What leads back to it lies in a folder of its own, because it may
run while the partition does not: its identity, its control socket, and the result, which is empty until it has ended.
One worker of a partition at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mullion.base.errors import ConflictError, MullionError, OperationFailedError, UnavailableError
from mullion.base.paths import PartitionPaths
from mullion.base.pidfd import wait_process
from mullion.base.process import ProcessIdentity, read_identity
from mullion.provider.merge_spec import MergeSpec
from mullion.services.partition.provider_link import ProviderFleet, ProviderLink
from mullion.vhd.inspection import ChainInfo, inspect_chain
from mullion.vhd.layer_merge import check_only_child

log = logging.getLogger(__name__)

_RESULT_LIMIT_BYTES: Final = 1024 * 1024
_STOP_DEADLINE_S: Final = 60.0
"""A worker stops at once, but leaves the file well, which takes a sync."""


@dataclass(frozen=True, slots=True)
class MergeProgress:
    """What a worker says of itself."""

    state: str
    done_bytes: int
    total_bytes: int
    bytes_per_s: int
    """The limit; 0 is none."""
    speed_bytes_per_s: int
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class MergeResult:
    """How a worker ended that was not stopped by an error."""

    is_done: bool
    """False when it was told to stop."""
    copied_bytes: int = 0
    resumed_bytes: int = 0
    notes: tuple[str, ...] = ()


class MergeWorker:
    """The worker that merges one layer of a partition's disk into the one below it, or the want of one."""

    def __init__(self, name: str, paths: PartitionPaths, upper: str, lower: str) -> None:
        self._name = name
        self._paths = paths
        self._upper = upper
        self._lower = lower
        self._link: ProviderLink | None = None
        self._turn = asyncio.Lock()

    @property
    def _identity_file(self) -> str:
        return f"{self._paths.merge_dir}/pid"

    @property
    def _control_path(self) -> str:
        return f"{self._paths.merge_dir}/control"

    @property
    def _result_file(self) -> str:
        return f"{self._paths.merge_dir}/result"

    # -- beginning -----------------------------------------------------------------------------------------------------

    async def adopt(self) -> bool:
        """Is there a worker of an earlier parent for these layers, or the result of one? Then `wait` for it.

        One that merges other layers is stopped: nobody wants that any more, or it is started again.
        """
        identity = read_identity(self._identity_file)
        is_ours = False
        if identity is not None and identity.is_alive:
            try:
                status = await self._ask("status")
                is_ours = (status.get("upper"), status.get("lower")) == (self._upper, self._lower)
            except MullionError as error:
                log.warning("%s: a merge worker (pid %d) cannot be asked: %s", self._name, identity.pid, error)
            if not is_ours:
                await self.stop()
        return is_ours or self._read_result() is not None

    async def start(
        self,
        fleet: ProviderFleet,
        *,
        run_as: tuple[int, int] | None,
        bytes_per_s: int,
        inspect: Callable[[str], ChainInfo] = inspect_chain,
    ) -> None:
        """Start a worker, after `adopt` has found none; `inspect` finds the parents of the upper layer.

        Raises: what refuses the layers (ConflictError, DiskBusyError, VhdError); what `ProviderFleet.spawn` raises.
        """
        below_bytes = await asyncio.to_thread(self._prepare, inspect)
        uid, gid = run_as or (None, None)
        spec = MergeSpec(
            self._name,
            self._upper,
            self._lower,
            control=self._control_path,
            identity=self._identity_file,
            result=self._result_file,
            log=self._paths.merge_log,
            uid=uid,
            gid=gid,
            bytes_per_s=bytes_per_s,
            below_bytes=below_bytes,
        )
        await fleet.spawn_merge(spec.to_wire())

    def _prepare(self, inspect: Callable[[str], ChainInfo]) -> int:
        """The folder; and the size of the largest disk below the layers, which only their chain tells."""
        os.makedirs(self._paths.merge_dir, mode=0o750, exist_ok=True)
        os.makedirs(self._paths.data, mode=0o750, exist_ok=True)
        for path in (self._upper, self._lower):
            check_complete(path, self._paths.pending_dir)
        check_only_child(self._upper, self._lower)
        files = inspect(self._upper).files
        return max((file.size_bytes for file in files[2:]), default=0)

    # -- asking and telling --------------------------------------------------------------------------------------------

    async def status(self) -> MergeProgress | None:
        """How far it is; None when it cannot be asked: it has just ended, as a rule."""
        try:
            status = await self._ask("status")
        except MullionError:
            return None
        return MergeProgress(
            state=str(status["state"]),
            done_bytes=int(status["done_bytes"]),
            total_bytes=int(status["total_bytes"]),
            bytes_per_s=int(status["bytes_per_s"]),
            speed_bytes_per_s=int(status["speed_bytes_per_s"]),
            eta_s=status["eta_s"],
        )

    async def set_rate(self, bytes_per_s: int) -> None:
        """Another limit, at once; 0 is none. Raises: InvalidError; UnavailableError when it has ended."""
        await self._ask("rate", bytes_per_s=bytes_per_s)

    async def stop(self) -> None:
        """End the worker, whatever it merges; what it has done stays, and its result is removed."""
        identity = read_identity(self._identity_file)
        if identity is not None and identity.send_signal(signal.SIGTERM):
            await self._wait_or_kill(identity)
        await self.release()
        await asyncio.to_thread(self._forget_result)

    async def _wait_or_kill(self, identity: ProcessIdentity) -> None:
        try:
            async with asyncio.timeout(_STOP_DEADLINE_S):
                await wait_process(identity)
        except TimeoutError:
            log.error("%s: a merge worker did not end within %g s; killed", self._name, _STOP_DEADLINE_S)
            identity.send_signal(signal.SIGKILL)
            await wait_process(identity)

    async def wait(self) -> MergeResult:
        """Return when the worker has ended. Cancelled, it is let go of, and goes on.

        Raises: the error with which it ended; OperationFailedError when it was killed. Then the merge may be started
        again and goes on where it was.
        """
        try:
            identity = read_identity(self._identity_file)
            if identity is not None:
                await wait_process(identity)
        finally:
            await self.release()
        result = await asyncio.to_thread(self._take_result)
        if result is None:
            raise OperationFailedError(
                f"the worker that merges {self._upper} into {self._lower} ended before it was done",
                remedy=f"It goes on when it is started again. Read {self._paths.merge_log} if it ends so again.",
            )
        if "error" in result:
            raise MullionError.from_wire(result["error"])
        return MergeResult(
            is_done=result["state"] == "done",
            copied_bytes=int(result.get("copied_bytes", 0)),
            resumed_bytes=int(result.get("resumed_bytes", 0)),
            notes=tuple(map(str, result.get("notes", ()))),
        )

    async def release(self) -> None:
        """Let go of the connection; the worker goes on."""
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    async def _ask(self, command: str, **arguments: Any) -> Mapping[str, Any]:
        async with self._turn:
            if self._link is None:
                link = ProviderLink(self._control_path, lambda _event: None)
                await link.open()
                self._link = link
            try:
                return await self._link.request(command, **arguments)
            except UnavailableError:
                await self.release()
                raise

    # -- the result ----------------------------------------------------------------------------------------------------

    def _take_result(self) -> Mapping[str, Any] | None:
        """The result, once: a later merge of the same layers is another one."""
        result = self._read_result()
        self._forget_result()
        return result

    def _read_result(self) -> Mapping[str, Any] | None:
        """What the worker for these layers said at its end; None when it did not, or there was none."""
        try:
            with open(self._result_file, "rb") as file:
                result = json.loads(file.read(_RESULT_LIMIT_BYTES))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(result, dict) or (result.get("upper"), result.get("lower")) != (self._upper, self._lower):
            return None
        return result if isinstance(result.get("error"), dict) or isinstance(result.get("state"), str) else None

    def _forget_result(self) -> None:
        for path in (self._result_file, self._identity_file, self._control_path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def check_complete(path: str, pending_dir: str) -> None:
    """Is all that was acknowledged of a frozen layer in its file? Raises: ConflictError while a log says otherwise.

    A provider that was killed when a child had just been put on top leaves such a log; the next one carries it out.
    """
    status = os.stat(path)
    suffix = f"-{status.st_dev:x}-{status.st_ino:x}"  # vhd.pending.log_path
    try:
        logs = [name for name in os.listdir(pending_dir) if name.endswith(suffix)]
    except FileNotFoundError:
        return
    if logs:
        raise ConflictError(
            f"{path} lacks what a provider that was killed had acknowledged: {pending_dir}/{logs[0]} has it",
            remedy="It is carried out when the partition's provider starts again: start the partition.",
            path=path,
        )


async def end_worker(name: str, paths: PartitionPaths) -> None:
    """Stop whatever worker a partition has, and remove what leads to it: the partition is deleted."""
    await MergeWorker(name, paths, "", "").stop()
    await asyncio.to_thread(shutil.rmtree, paths.merge_dir, ignore_errors=True)
