"""One provider: the process that serves a partition's disks.

It starts with the rights of whoever forked it, gives them up (`startup`), opens the chains, offers each disk as
vhost-user-blk and as NBD, says that it is ready, and then answers its control socket until SIGTERM or `quit`. It needs
nobody: parent and zygote may die, the guest goes on.

Ready is one JSON line: `{"ready": true, "pid": n, "disks": [{"id", "size_bytes", "read_only", "warnings"}]}`, or
`{"error": {code, message, remedy, context, exit_code}, "pid": n}`, after which it exits with status 1.
Durability: at the end every ring finishes the request it is at, then every chain is flushed and closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from mullion import __version__
from mullion.base.errors import InvalidError, MullionError, NoSpaceError, OperationFailedError
from mullion.base.listener import bind_listener
from mullion.provider.backing import Homecoming
from mullion.provider.blk import BlkDevice
from mullion.provider.control import Action, Command, ControlServer, close_all
from mullion.provider.exchanging import Exchangeable, exchange_chains
from mullion.provider.front_end import FrontEnd
from mullion.provider.handover import HandOverError, Offer, OfferedDisk, TakeOver, give, not_taken
from mullion.provider.keeping import Keeping
from mullion.provider.layers.commands import Handler, LayerControl
from mullion.provider.resizing import HOLD_S, grow, wanted_size
from mullion.provider.served_disk import Offered, ServedDisk, load_chain, recover_files, written_files
from mullion.provider.space import Shortage, SpaceGate, is_no_space
from mullion.provider.spec import DiskSpec, ProviderSpec
from mullion.provider.startup import (
    PROCESS_NAME,
    drop_privileges,
    give_file,
    open_chain_files,
)
from mullion.provider.turnstile import HeldDevice, Turnstile, holding
from mullion.provider.vhost_export import VhostExport
from mullion.provider.working import begin_work
from mullion.vhd.pending import log_path
from mullion.wire.nbd import NbdExport

log = logging.getLogger(__name__)

_THREAD_STACK_BYTES: Final = 256 * 1024


class Provider:
    """The disks of one partition, and what the control socket says about them."""

    def __init__(self, spec: ProviderSpec) -> None:
        self._spec = spec
        self._started_s = time.monotonic()
        self._disks: list[ServedDisk] = []
        self._gate, self._layers = self._new_gates()
        self._quit_read_fd, self.quit_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._control: ControlServer | None = None
        self._keeping: Keeping | None = None
        self._is_handed_over = False
        self._hand_over_ms: float | None = None

    def _new_gates(self) -> tuple[SpaceGate, LayerControl]:
        """What is between rings and disks; nobody is behind it yet."""
        layers = LayerControl(allow_faults=self._spec.allow_faults)
        layers.limit_partition(self._spec.limits)
        return SpaceGate(self._space_changed), layers

    def open(self) -> None:
        """Open, bind, drop privileges, load the chains and start to serve. Raises: MullionError, OSError."""
        try:
            self._begin()
        except OSError as error:
            if not is_no_space(error):
                raise
            folders = " or ".join(sorted({os.path.dirname(disk.chain[0]) for disk in self._spec.disks}))
            what = f"no space left in {folders}: the provider cannot finish what it left unwritten"
            raise NoSpaceError(what) from error

    def _begin(self) -> None:
        offer = None
        if self._spec.takes_over:
            offer = self._take_over()
        else:
            self._open_anew()
        for served in self._disks:
            served.start()
        if offer is not None:
            self._hand_over_ms = round((time.monotonic() - offer.begun_s) * 1000, 3)

    def _open_anew(self) -> None:
        spec = self._spec
        files: list[list[int]] = []
        sockets: dict[str, socket.socket] = {}
        try:
            files.extend(open_chain_files(disk, spec.pending_dir) for disk in spec.disks)
            for path in _socket_paths(spec):
                sockets[path] = bind_listener(path, uid=spec.uid, gid=spec.gid)
            if spec.pending_dir is not None:
                _make_folder(spec.pending_dir, spec.uid, spec.gid)
            for disk, fds in zip(spec.disks, files, strict=True):
                for number in written_files(disk, spec.pending_dir, fds):
                    give_file(fds[number], disk.chain[number], spec.uid, spec.gid)
            drop_privileges(spec.uid, spec.gid)
            for disk in spec.disks:
                recover_files(disk, spec.pending_dir, files[0], holder=spec.partition)
                self._load(disk, files.pop(0))
            self._control = ControlServer(sockets.pop(spec.control), self._actions(), self._quit_read_fd)
            for served in self._disks:
                vhost_user, nbd = served.spec.vhost_user, served.spec.nbd
                first = None if vhost_user is None else sockets.pop(vhost_user)
                self._offer(served, Offered(first, None if nbd is None else sockets.pop(nbd)))
        except BaseException:
            self._close_chains()
            _close_files(files)
            _close_sockets(sockets)
            raise

    def _load(self, disk: DiskSpec, fds: list[int]) -> None:
        chain = load_chain(disk, self._spec.pending_dir, fds, holder=self._spec.partition)
        self._disks.append(ServedDisk(disk, chain, Turnstile(disk.id)))

    def _offer(self, served: ServedDisk, offered: Offered) -> None:
        """Make a disk's exports, which serve nothing before they are started."""
        disk, chain = served.spec, served.chain
        self._gate.register(disk.id, disk.chain[0])
        if disk.backing is not None:
            announce = partial(self._notify, "disk-home", disk.id, "")
            served.homecoming = Homecoming(disk.id, chain, disk.backing, self._spec.homecoming_rate, announce)
        self._layers.add(disk.id, chain, disk.limits, served.use)
        lane = self._layers.lane(disk.id)
        if offered.vhost_user is not None:
            blk = served.blk = BlkDevice(chain, disk.id, disk.serial or disk.id)
            served.vhost = VhostExport(offered.vhost_user, blk, self._gate, served.turnstile, self._notify, lane=lane)
            self._layers.add_waker(served.vhost.wake)
            if self._keeping is not None:  # its work was offered to another one, who did not take it
                served.vhost.keep(self._keeping)
            if offered.front_end is not None:
                served.vhost.adopt(offered.front_end)
        if offered.nbd is not None:
            assert disk.nbd is not None, "there is a socket for it"
            served.nbd = NbdExport(
                disk.nbd,
                HeldDevice(chain, served.turnstile),
                name=disk.id,
                read_only=disk.read_only,
                # It answers ENOSPC, and QEMU stops the guest itself. A request that we held would hang its `stop`.
                listener=offered.nbd,
                new_gate=lane.turn,
            )

    # Handing over (`handover`).

    def _take_over(self) -> Offer:
        """Go on where another process was: it serves until this has all that it needs, and never again after that."""
        spec = self._spec
        with TakeOver(spec.control) as other:
            drop_privileges(spec.uid, spec.gid)
            offer = other.offer()
            try:
                self._adopt(offer)
                other.take()
            except BaseException:
                self._close_chains()  # before it hears that it has to go on
                raise
        return offer

    def _adopt(self, offer: Offer) -> None:
        """Load all that is offered; the descriptors are ours then. Raises: HandOverError; MullionError; OSError."""
        offered = {disk.id: disk for disk in offer.disks}
        wanted = {disk.id: disk.chain for disk in self._spec.disks}
        if {id_: disk.chain for id_, disk in offered.items()} != wanted:
            raise HandOverError("the disks are not those that the present provider serves", remedy="Try again.")
        for disk in self._spec.disks:
            self._load(disk, offered[disk.id].files)
        control = socket.socket(fileno=offer.control)
        control.listen()  # so that the kernel says our pid to who connects
        if self._control is None:
            self._control = ControlServer(control, self._actions(), self._quit_read_fd)
        else:
            control.close()
            self._control.use(self._actions())
        for served in self._disks:
            one = offered[served.spec.id]
            vhost_user, nbd = (None if fd is None else socket.socket(fileno=fd) for fd in (one.vhost_user, one.nbd))
            self._offer(served, Offered(vhost_user, nbd, one.front_end))

    def _hand_over(self, command: Command) -> Mapping[str, object]:
        if len(command.fds) != 1:
            close_all(command.fds)
            raise InvalidError("hand-over: one descriptor is needed", remedy="Send an end of a socket pair along.")
        with socket.socket(fileno=command.fds[0]) as channel:
            for served in self._disks:
                served.check_may_hand_over()
            self._flush()  # most of it while requests go on
            offer = self._lay_down()
            self._is_handed_over = give(channel, offer)
        if not self._is_handed_over:
            self._go_on(offer)
            raise not_taken()
        offer.close()
        os.write(self.quit_fd, b"\0")
        return {"handed_over": True}

    def _lay_down(self) -> Offer:
        """Stop serving, with nothing in flight and all files closed cleanly; what there is then is the offer.

        Raises: the first error; the process ends then, and what was begun is as after a kill.
        """
        assert self._control is not None, "it has brought the command"
        spec = self._spec
        limits = {disk.id: self._layers.limits(disk.id) for disk in spec.disks}
        self._spec = replace(
            spec,
            disks=tuple(replace(served.spec, limits=limits[served.spec.id]) for served in self._disks),
            limits=self._layers.limits(None),
        )
        offer = Offer(self._control.share_listener())
        try:
            self._layers.open()  # what has been asked for is finished, without waiting
            self._gate, self._layers = self._new_gates()
            for served in self._disks:
                offer.disks.append(OfferedDisk(served.spec.id, served.chain.paths, []))
                served.lay_down(offer.disks[-1])
        except BaseException:
            log.exception("%s: it cannot be handed over, nor served any more", spec.partition)
            offer.close()
            os.write(self.quit_fd, b"\0")
            raise
        self._disks = []
        return offer

    def _go_on(self, offer: Offer) -> None:
        """Nobody has taken it: serve again, with the caps of before."""
        log.warning("%s: the new provider did not take over: going on", self._spec.partition)
        try:
            self._adopt(offer)
        except BaseException:
            log.exception("%s: it cannot be served any more", self._spec.partition)
            self._close_chains()
            self._disks = []
            os.write(self.quit_fd, b"\0")
            raise
        for served in self._disks:
            served.start()

    def ready(self) -> Mapping[str, object]:
        """What is told to whoever waits for the start, beside that."""
        return {
            "disks": [
                {
                    "id": served.spec.id,
                    "size_bytes": served.chain.size_bytes,
                    "read_only": served.chain.read_only,
                    "warnings": served.chain.warnings,
                }
                for served in self._disks
            ],
        }

    def run(self) -> None:
        """Answer the control socket until `quit`, or until a byte is written to `quit_fd`."""
        assert self._control is not None, "opened before it is run"
        self._control.run()

    def close(self) -> None:
        """Stop serving, flush and close. Raises: the first error of a disk that could not be flushed.

        OperationFailedError while requests wait for a backup that is out of reach, which nobody can finish: then
        nothing is done, and whoever asked asks the next provider again, as after a kill.
        """
        for served in self._disks:
            if served.homecoming is not None and served.homecoming.is_waited_for:
                raise OperationFailedError(
                    f"disk {served.spec.id}: requests wait for its backup", remedy="They are served again later."
                )
        errors = self._stop_exports()
        errors += self._close_chains()
        if self._control is not None:
            self._control.close()
        for path in () if self._is_handed_over else _socket_paths(self._spec):
            with contextlib.suppress(FileNotFoundError, PermissionError):  # the folder may be the parent's alone
                os.unlink(path)
        os.close(self._quit_read_fd)
        os.close(self.quit_fd)
        if errors:
            raise errors[0]

    def _stop_exports(self) -> list[Exception]:
        errors: list[Exception] = []
        self._layers.open()  # what has been asked for is finished, without waiting
        for served in self._disks:
            for export in (served.vhost, served.nbd):
                if export is not None:
                    try:
                        export.stop()
                    except MullionError as error:
                        errors.append(error)
            if served.homecoming is not None:  # after the requests that it answers
                try:
                    served.homecoming.stop()
                except OSError as error:
                    errors.append(error)
        return errors

    def _close_chains(self) -> list[Exception]:
        errors: list[Exception] = []
        for served in self._disks:
            try:
                served.chain.close()
            except (OSError, MullionError) as error:
                log.error("disk %s could not be closed cleanly: %s", served.spec.id, error)
                errors.append(error)
        return errors

    # What the control socket asks.

    def _actions(self) -> Mapping[str, Action]:
        plain = {"status": self.status, "flush": self._flush, "retry": self._retry}
        return {name: partial(_without_fds, action) for name, action in plain.items()} | {
            "switch": self._switch,
            "hand-over": self._hand_over,
            "keep": self._keep,
            "adopt": self._adopt_front_end,
            "resize": partial(_with_fields, self._resize),
            "release-backing": partial(_with_fields, self._release_backing),
            **{name: partial(_with_fields, handler) for name, handler in self._layers.handlers().items()},
        }

    def status(self) -> Mapping[str, object]:
        """The provider and its disks as JSON values."""
        return {
            "partition": self._spec.partition,
            "pid": os.getpid(),
            "version": __version__,
            "uptime_s": round(time.monotonic() - self._started_s, 3),
            "hand_over_ms": self._hand_over_ms,
            **self._layers.partition_status(),
            "disks": [served.status(self._gate.shortage(served.spec.id), self._layers) for served in self._disks],
        }

    def _flush(self) -> Mapping[str, object]:
        for served in self._disks:
            served.flush()
        return {"flushed": [served.spec.id for served in self._disks]}

    def _keep(self, command: Command) -> Mapping[str, object]:
        """Say from now on what becomes of front-ends' connections (`keeping`)."""
        exports = {served.spec.id: served.vhost for served in self._disks if served.vhost is not None}
        self._keeping = Keeping(command.fds, tuple(exports))
        for vhost in exports.values():
            vhost.keep(self._keeping)
        return {"kept": list(exports)}

    def _adopt_front_end(self, command: Command) -> Mapping[str, object]:
        """Go on with the connection that a provider had which was killed."""
        try:
            served = self._named(command.fields, "adopt")
            if served.vhost is None:
                raise InvalidError(f"adopt: disk {served.spec.id} has no front-end", remedy="See its `status`.")
            left = iter(command.fds)
            try:
                front_end = FrontEnd.from_wire(command.fields.get("front_end"), left)
            except (ValueError, TypeError, StopIteration, RuntimeError) as error:
                raise InvalidError(f"adopt: {error!r}", remedy="Send what the disk's last provider said.") from error
        except InvalidError:
            close_all(command.fds)
            raise
        close_all(left)
        served.vhost.adopt_later(front_end)
        return {"disk": served.spec.id}

    def _switch(self, command: Command) -> Mapping[str, object]:
        spec = self._spec
        disks = {
            served.spec.id: Exchangeable(
                served.spec.id,
                served.chain,
                served.turnstile,
                None if spec.pending_dir is None else partial(log_path, spec.pending_dir, served.spec.id),
                spec.partition,
            )
            for served in self._disks
        }
        try:
            stall_ms = exchange_chains(disks, command)
        finally:
            for served in self._disks:
                served.follow_chain()
                self._gate.register(served.spec.id, served.spec.chain[0])
        return {
            "stall_ms": round(stall_ms, 3),
            "disks": [{"id": served.spec.id, "chain": list(served.spec.chain)} for served in self._disks],
        }

    def _resize(self, fields: Mapping[str, object]) -> Mapping[str, object]:
        served = self._named(fields, "resize")
        old_bytes = served.chain.size_bytes
        size_bytes = wanted_size(served.chain, fields)
        stall_ms = grow(served.chain, served.turnstile, size_bytes)
        if served.vhost is not None:
            served.vhost.announce_config()
        if served.nbd is not None and size_bytes != old_bytes:
            served.nbd.hang_up()
        is_announced = served.vhost is not None and served.vhost.is_connected
        return {
            "disk": served.spec.id,
            "old_bytes": old_bytes,
            "size_bytes": size_bytes,
            "stall_ms": round(stall_ms, 3),
            "announced": is_announced,
        }

    def _release_backing(self, fields: Mapping[str, object]) -> Mapping[str, object]:
        """All is home: read without the backing from now on. May be repeated."""
        served = self._named(fields, "release-backing")
        if served.homecoming is not None:
            with holding([served.turnstile], HOLD_S):
                served.homecoming.release()
            served.homecoming = None
        return {"disk": served.spec.id}

    def _named(self, fields: Mapping[str, object], command: str) -> ServedDisk:
        """The disk that a command names. Raises: InvalidError."""
        served = next((served for served in self._disks if served.spec.id == fields.get("disk")), None)
        if served is None:
            raise InvalidError(
                f"{command}: {fields.get('disk')!r} is no disk of this provider", remedy="See its `status`."
            )
        return served

    def _retry(self) -> Mapping[str, object]:
        self._gate.retry()
        return {"retrying": True}

    def _space_changed(self, event: str, disk: str, shortage: Shortage | None) -> None:
        if shortage is None:
            log.info("disk %s: writing again", disk)
            self._publish({"event": event, "disk": disk})
            return
        log.warning("disk %s: no space left on %s: writes wait", disk, shortage.filesystem)
        self._publish({"event": event, "disk": disk, "reason": shortage.reason, "filesystem": shortage.filesystem})

    def _notify(self, event: str, disk: str, reason: str) -> None:
        self._publish({"event": event, "disk": disk, "reason": reason} if reason else {"event": event, "disk": disk})

    def _publish(self, event: Mapping[str, object]) -> None:
        if self._control is not None:
            self._control.publish(event)


def run(spec: ProviderSpec, report_fd: int) -> int:
    """Be a provider until the end; the exit status. `report_fd` gets the line that says ready or why not."""
    threading.stack_size(_THREAD_STACK_BYTES)
    provider = Provider(spec)
    if not begin_work(
        provider, spec, what="provider", process_name=PROCESS_NAME, report_fd=report_fd, about=provider.ready
    ):
        return 1
    provider.run()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    log.info("%s: ending", spec.partition)
    try:
        provider.close()
    except (MullionError, OSError) as error:
        log.error("%s: ended with unflushed data: %s", spec.partition, error)
        return 1
    return 0


def _without_fds(action: Callable[[], Mapping[str, object]], command: Command) -> Mapping[str, object]:
    close_all(command.fds)
    return action()


def _with_fields(handler: Handler, command: Command) -> Mapping[str, object]:
    close_all(command.fds)
    return handler(command.fields)


def _socket_paths(spec: ProviderSpec) -> list[str]:
    offered = [path for disk in spec.disks for path in (disk.vhost_user, disk.nbd) if path is not None]
    return [spec.control, *offered]


def _close_files(files: Sequence[Sequence[int]]) -> None:
    for fds in files:
        close_all(fds)


def _close_sockets(sockets: Mapping[str, socket.socket]) -> None:
    for path, listener in sockets.items():
        listener.close()
        with contextlib.suppress(OSError):
            os.unlink(path)


def _make_folder(path: str, uid: int | None, gid: int | None) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
        os.chown(path, -1 if uid is None else uid, -1 if gid is None else gid)


def main() -> int:
    """`python -m mullion.provider.main SPEC.json`: a provider by hand, in the foreground, ready line on stdout."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = ProviderSpec.from_json(file.read())
    return run(spec, os.dup(1))


if __name__ == "__main__":
    sys.exit(main())
