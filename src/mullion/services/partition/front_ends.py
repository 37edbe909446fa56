"""What the parent keeps of QEMU's connections to a provider, from one that was killed to the next (`provider.keeping`).

While a connection has no provider, QEMU may stand still in the midst of a word to it: it is hung up when no provider
begins, or none within `ORPHANED_S`. QEMU comes back by itself then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final

from mullion.base.errors import InvalidError, MullionError
from mullion.provider.front_end import FrontEnd
from mullion.provider.keeping import Keeper, hang_up
from mullion.services.partition.provider_link import ProviderLink

log = logging.getLogger(__name__)

ORPHANED_S: Final = 5.0


class KeptFrontEnds:
    """Those of one partition. Used by the event loop."""

    def __init__(self, partition: str) -> None:
        self._partition = partition
        self._keeper: Keeper | None = None
        self._orphans: dict[str, FrontEnd] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def link(self, link: ProviderLink, status: Mapping[str, Any]) -> None:
        """A provider can be spoken to: it keeps us informed, and goes on with what its predecessor left.

        Raises: what `ProviderLink.request` raises; then QEMU comes back by itself, now and whenever a provider ends.
        """
        disks = [disk["id"] for disk in status.get("disks", ()) if disk.get("vhost_user") is not None]
        orphans = self._take_orphans()
        keeper = Keeper(disks, {disk: orphans.pop(disk) for disk in disks if disk in orphans})
        try:
            for front_end in orphans.values():  # of disks that there are no more
                hang_up(front_end)
            if disks:
                await link.request("keep", fds=keeper.fds)
        except BaseException:
            keeper.hang_up()
            keeper.close()
            raise
        keeper.given()
        self.drop()
        self._keeper = keeper
        asyncio.get_running_loop().add_reader(keeper.channel, self._hear, keeper)
        for disk in disks:
            await self._give(link, keeper, disk)

    async def _give(self, link: ProviderLink, keeper: Keeper, disk: str) -> None:
        front_end = keeper.copy_of(disk)
        if front_end is None:
            return
        try:
            await link.request("adopt", fds=front_end.fds, disk=disk, front_end=front_end.to_wire())
        except MullionError as error:
            log.warning("%s: the provider does not go on with the connection of %s: %s", self._partition, disk, error)
            keeper.refused(disk)

    def _hear(self, keeper: Keeper) -> None:
        try:
            if not keeper.receive():
                asyncio.get_running_loop().remove_reader(keeper.channel)
        except InvalidError as error:
            log.error("%s: %s", self._partition, error)
            self.drop()

    def orphan(self) -> None:
        """The provider has ended, and the next one is about to begin."""
        keeper = self._forget_keeper()
        if keeper is None:
            return
        self._orphans = keeper.take()
        keeper.close()
        if self._orphans:
            self._timer = asyncio.get_running_loop().call_later(ORPHANED_S, self.hang_up)

    def hang_up(self) -> None:
        """No provider goes on."""
        for disk, front_end in self._take_orphans().items():
            log.info("%s: the connection of %s is hung up: no provider goes on with it", self._partition, disk)
            hang_up(front_end)

    def drop(self) -> None:
        """Let go of everything; what a provider serves it goes on with."""
        if (keeper := self._forget_keeper()) is not None:
            keeper.close()
        self.hang_up()

    def _take_orphans(self) -> dict[str, FrontEnd]:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        orphans, self._orphans = self._orphans, {}
        return orphans

    def _forget_keeper(self) -> Keeper | None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            asyncio.get_running_loop().remove_reader(keeper.channel)
        return keeper
