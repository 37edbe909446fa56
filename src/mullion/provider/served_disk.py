"""One disk of a provider: its chain, and the exports that serve it.

Durability: `load_chain` finishes what a killed writer left in its pending log; `lay_down` leaves the files closed
cleanly, as at a provider's end.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mullion.base.errors import NoSpaceError, OperationFailedError
from mullion.provider.backing import Homecoming
from mullion.provider.blk import BlkDevice
from mullion.provider.device import DirectDevice
from mullion.provider.front_end import FrontEnd
from mullion.provider.handover import HandOverError, OfferedDisk
from mullion.provider.layers.commands import LayerControl
from mullion.provider.space import Shortage, is_no_space
from mullion.provider.spec import DiskSpec
from mullion.provider.startup import has_log
from mullion.provider.turnstile import HeldDevice, Turnstile
from mullion.provider.vhost_export import Served, VhostExport
from mullion.vhd import Chain
from mullion.vhd.pending import log_path
from mullion.vhd.recovery import recover_layer
from mullion.wire.nbd import NbdExport

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Offered:
    """The sockets that a disk is offered on; with the connection that another process had on the first."""

    vhost_user: socket.socket | None
    nbd: socket.socket | None
    front_end: FrontEnd | None = None


@dataclass(slots=True)
class ServedDisk:
    """A disk that is served, from `start` on."""

    spec: DiskSpec
    chain: Chain
    turnstile: Turnstile
    blk: BlkDevice | None = None
    vhost: VhostExport | None = None
    nbd: NbdExport | None = None
    homecoming: Homecoming | None = None

    def start(self) -> None:
        """Serve from now on."""
        for part in (self.homecoming, self.vhost, self.nbd):
            if part is not None:
                part.start()

    def use(self, device: DirectDevice) -> None:
        """Have the exports serve another device: the chain, or layers over it."""
        if self.blk is not None:
            self.blk.device = device
        if self.nbd is not None:
            self.nbd.use(HeldDevice(device, self.turnstile))

    def flush(self) -> None:
        """For the control: whatever it raises, the guest's next flush raises too.

        Raises: NoSpaceError; OperationFailedError.
        """
        try:
            self.chain.flush_ahead()
        except OSError as error:
            where = f"disk {self.spec.id} cannot be flushed: {error.strerror or error}"
            if is_no_space(error):
                raise NoSpaceError(where, disk=self.spec.id) from error
            raise OperationFailedError(where, remedy="Look after the storage below it.") from error

    def follow_chain(self) -> None:
        """Other files may lie beneath the disk since."""
        self.spec = replace(self.spec, chain=self.chain.paths)

    def check_may_hand_over(self) -> None:
        """Raises: HandOverError while something goes on that another process cannot take up."""
        if self.homecoming is not None:
            raise HandOverError(f"disk {self.spec.id}: its blocks are coming home")
        if self.vhost is not None and self.vhost.broken_reason is not None:
            raise HandOverError(f"disk {self.spec.id} is broken: {self.vhost.broken_reason}")

    def lay_down(self, offered: OfferedDisk) -> None:
        """Stop serving, with nothing in flight and all files closed cleanly; what there is then is put into the offer.

        Raises: DeadlineError, OSError, MullionError: then the offer holds what had been given up before.
        """
        if (vhost := self.vhost) is not None:
            self.vhost = None
            offered.vhost_user, offered.front_end = vhost.hand_over()
        if (nbd := self.nbd) is not None:
            self.nbd = None
            offered.nbd = nbd.hand_over()
        offered.files = [os.dup(image.fd) for image in self.chain.images]
        self.chain.close()

    def status(self, shortage: Shortage | None, layers: LayerControl) -> Mapping[str, object]:
        """The disk as JSON values."""
        disk, vhost, nbd = self.spec, self.vhost, self.nbd
        state, reason, filesystem = Served.OK, None, None
        if vhost is not None and vhost.broken_reason is not None:
            state, reason = Served.BROKEN, vhost.broken_reason
        elif shortage is not None:
            state, reason, filesystem = Served.NO_SPACE, shortage.reason, shortage.filesystem
        fields: dict[str, object] = {
            "id": disk.id,
            "state": state.value,
            "reason": reason,
            "filesystem": filesystem,
            "size_bytes": self.chain.size_bytes,
            "read_only": self.chain.read_only,
            "path": disk.chain[0],
            "chain": list(self.chain.paths),
            "chain_files": len(disk.chain),
            **layers.disk_status(disk.id),
            "vhost_user": None,
            "nbd": None,
            "backing": None if self.homecoming is None else self.homecoming.status(),
        }
        if vhost is not None:
            counters = vhost.counters
            fields["vhost_user"] = {
                "path": disk.vhost_user,
                "connected": vhost.is_connected,
                "requests": counters.requests,
                "bytes": counters.bytes,
            }
        if nbd is not None:
            fields["nbd"] = {"path": disk.nbd, **nbd.counters._asdict()}
        return fields


def written_files(disk: DiskSpec, pending_dir: str | None, fds: Sequence[int]) -> list[int]:
    """Which files of a chain are written: the top, and a layer that a provider was killed on top of."""
    if disk.read_only:
        return []
    return [number for number, fd in enumerate(fds) if not number or has_log(pending_dir, disk.id, fd)]


def recover_files(disk: DiskSpec, pending_dir: str | None, fds: Sequence[int], *, holder: str) -> None:
    """Finish the layers whose writer was killed before it knew of the files that are above them now."""
    for number in reversed(written_files(disk, pending_dir, fds)[1:]):
        pending = log_path(str(pending_dir), disk.id, fds[number])
        for said in recover_layer(fds[number], disk.chain[number], pending_path=pending, holder=holder):
            log.warning("disk %s: %s", disk.id, said)


def load_chain(disk: DiskSpec, pending_dir: str | None, fds: list[int], *, holder: str) -> Chain:
    """The chain of files that are open; the descriptors are its own then. Raises: as `Chain.from_descriptors`."""
    pending = None if pending_dir is None or disk.read_only else log_path(pending_dir, disk.id, fds[0])
    chain = Chain.from_descriptors(
        fds, disk.chain, read_only=disk.read_only, pending_path=pending, holder=holder, fills_cells=True
    )
    for warning in chain.warnings:
        log.warning("disk %s: %s", disk.id, warning)
    return chain
