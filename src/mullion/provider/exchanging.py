"""The command `switch`: other files beneath some disks, all of them at one instant, while the guest uses them.

    {"command": "switch", "fds": n, "disks": [{"id", "chain": [paths, top first], "new": [paths], "set_parent": false,
     "collapse": false, "limit_bytes": n or null}]}

The descriptors are those of the `new` files, in order, open for writing, of files that the partition's user may write.
What the kinds of exchange are, and what is durable when, says `mullion.vhd.switching`. The answer has, beside the
chains, `stall_ms`: how long the disks' requests had to wait.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import InvalidError, MullionError, NoSpaceError, OperationFailedError
from mullion.provider.control import Command, close_all
from mullion.provider.space import is_no_space
from mullion.provider.turnstile import Turnstile, holding
from mullion.vhd import Chain
from mullion.vhd.parents import CHAIN_LIMIT
from mullion.vhd.switching import Exchange, Switch, prepare_switch

log = logging.getLogger(__name__)

_HOLD_S: Final = 20.0
"""A request that does not end within this time is one that the storage has lost."""


@dataclass(frozen=True, slots=True)
class Exchangeable:
    """A disk whose files can be exchanged."""

    id: str
    chain: Chain
    turnstile: Turnstile
    pending_path: Callable[[int], str] | None
    holder: str


def exchange_chains(disks: Mapping[str, Exchangeable], command: Command) -> float:
    """Carry out a `switch`; the milliseconds for which requests waited. All or nothing, up to the exchange itself.

    Raises: InvalidError, DiskBusyError, LayerTooLargeError, DeadlineError, VhdError, NoSpaceError,
    OperationFailedError.
    """
    try:
        wanted = _parse(disks, command)
    except MullionError:
        close_all(command.fds)
        raise
    prepared: list[Switch] = []
    with _explained(), contextlib.ExitStack() as undone:
        for number, (disk, exchange) in enumerate(wanted):
            try:
                switch = prepare_switch(disk.chain, exchange, pending_path=disk.pending_path, holder=disk.holder)
            except BaseException:
                for _, later in wanted[number + 1 :]:
                    close_all(later.new.values())
                raise
            prepared.append(switch)
            undone.callback(_cancel, disk, switch)
        begun_s = time.monotonic()
        with holding([disk.turnstile for disk, _ in wanted], _HOLD_S):
            for switch in prepared:
                switch.settle()
            undone.pop_all()
            _exchange(wanted, prepared)
            stall_ms = (time.monotonic() - begun_s) * 1000
        _finish(prepared)
    log.info("switched %s in %.1f ms", ", ".join(disk.id for disk, _ in wanted), stall_ms)
    return stall_ms


def _exchange(wanted: Sequence[tuple[Exchangeable, Exchange]], prepared: Sequence[Switch]) -> None:
    for number, switch in enumerate(prepared):
        try:
            switch.exchange()
        except OSError:
            for (disk, _), other in zip(wanted[number:], prepared[number:], strict=True):
                _cancel(disk, other)
            _finish(prepared[:number])
            raise


def _finish(switches: Sequence[Switch]) -> None:
    """All of them, whatever one of them raises: files that are in no chain are to be closed. Raises: OSError."""
    with contextlib.ExitStack() as left:
        for switch in reversed(switches):
            left.callback(switch.finish)


def _cancel(disk: Exchangeable, switch: Switch) -> None:
    try:
        switch.cancel()
    except (OSError, MullionError) as error:  # what led here is the one to tell
        log.error("disk %s: the exchange could not be undone cleanly: %s", disk.id, error)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"the disks' files cannot be exchanged: {error.strerror or error}"
        if is_no_space(error):
            raise NoSpaceError(what) from error
        raise OperationFailedError(what, remedy="Look after the storage below, then try again.") from error


def _parse(disks: Mapping[str, Exchangeable], command: Command) -> list[tuple[Exchangeable, Exchange]]:
    listed = command.fields.get("disks")
    if not isinstance(listed, list) or not listed:
        raise _wrong("disks: a list of disks is needed")
    fds = list(command.fds)
    found: dict[str, tuple[Exchangeable, Exchange]] = {}
    for number, fields in enumerate(listed):
        where = f"disks[{number}]"
        if not isinstance(fields, dict):
            raise _wrong(f"{where}: an object is needed")
        disk = disks.get(fields["id"]) if isinstance(fields.get("id"), str) else None
        if disk is None or disk.id in found:
            raise _wrong(f"{where}.id: {fields.get('id')!r} is no disk of this provider, or named twice")
        new = _paths(fields, "new", where, least=0)
        if len(new) > len(fds):
            raise _wrong(f"{where}.new: {len(new)} files, and {len(fds)} descriptors are left of those that came")
        own, fds = fds[: len(new)], fds[len(new) :]
        found[disk.id] = (disk, _exchange_of(fields, where, dict(zip(new, own, strict=True))))
    if fds:
        raise _wrong(f"{len(fds)} descriptors belong to no file of `new`")
    return list(found.values())


def _exchange_of(fields: Mapping[str, object], where: str, new: Mapping[str, int]) -> Exchange:
    flags = {name: fields.get(name, False) for name in ("set_parent", "collapse")}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise _wrong(f"{where}.{name}: true or false is needed")
    limit = fields.get("limit_bytes")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
        raise _wrong(f"{where}.limit_bytes: a number of bytes is needed")
    return Exchange(
        paths=_paths(fields, "chain", where, least=1),
        new=new,
        set_parent=bool(flags["set_parent"]),
        collapse=bool(flags["collapse"]),
        limit_bytes=limit,
    )


def _paths(fields: Mapping[str, object], name: str, where: str, *, least: int) -> tuple[str, ...]:
    paths = fields.get(name, [])
    if not isinstance(paths, list) or not least <= len(paths) <= CHAIN_LIMIT or len(set(map(str, paths))) != len(paths):
        raise _wrong(f"{where}.{name}: a list of {least} to {CHAIN_LIMIT} paths is needed, each once")
    for path in paths:
        if not isinstance(path, str) or not path.startswith("/") or "\0" in path or len(path) > 4096:
            raise _wrong(f"{where}.{name}: {path!r} is not an absolute path")
    return tuple(paths)


def _wrong(what: str) -> InvalidError:
    return InvalidError(f"switch: {what}", remedy="Correct the command; nothing was changed.")
