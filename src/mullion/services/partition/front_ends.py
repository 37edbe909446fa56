"""What the parent keeps of QEMU's connections to a provider, from one that was killed to the next (`provider.keeping`).

While a connection has no provider, QEMU may stand still in the midst of a word to it: it is hung up when no provider
begins, or none within `ORPHANED_S`. QEMU comes back by itself then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final

from mullion.base.closer import Closer
from mullion.base.errors import InvalidError, MullionError, UnavailableError
from mullion.provider.front_end import FrontEnd
from mullion.provider.keeping import Keeper, hang_up
from mullion.services.partition.provider_link import ProviderLink

log = logging.getLogger(__name__)

ORPHANED_S: Final = 5.0


class KeptFrontEnds:
    """Those of one partition. Used by the event loop."""

    def __init__(self, partition: str) -> None:
        self._partition = partition
        self._closer = Closer()
        self._keeper: Keeper | None = None
        self._orphans: dict[str, FrontEnd] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._ends = 0  # of providers

    async def link(self, link: ProviderLink, status: Mapping[str, Any]) -> None:
        """A provider can be spoken to: it keeps us informed, and goes on with what its predecessor left.

        Raises: what `ProviderLink.request` raises; OSError. What was left stays for the next one then, as long as that
        can be; and QEMU comes back by itself whenever this provider ends.
        """
        disks = [disk["id"] for disk in status.get("disks", ()) if disk.get("vhost_user") is not None]
        if not disks:
            self.drop()
            return
        ends = self._ends
        orphans = {disk: front_end for disk, front_end in self._orphans.items() if disk in disks}
        keeper = Keeper(disks, closer=self._closer)
        try:
            await link.request("keep", fds=keeper.fds, deadline_s=ORPHANED_S)
            if self._ends != ends:
                raise UnavailableError("the provider ended as soon as it had answered")
        except BaseException:
            keeper.close()
            raise
        keeper.given()
        adopted = {disk: orphan for disk, orphan in orphans.items() if self._orphans.pop(disk, None) is orphan}
        keeper.expect(adopted)
        self.drop()
        self._keeper = keeper
        asyncio.get_running_loop().add_reader(keeper.channel, self._hear, keeper)
        for disk, front_end in adopted.items():
            await self._give(link, keeper, disk, front_end)

    async def _give(self, link: ProviderLink, keeper: Keeper, disk: str, front_end: FrontEnd) -> None:
        """Have the provider adopt it. What is sent is ours alone: the keeper may close its own while we wait."""
        if keeper.copy_of(disk) is not front_end:
            return
        try:
            sent = front_end.copy()
            try:
                said = sent.to_wire()
                await link.request("adopt", fds=sent.fds, deadline_s=ORPHANED_S, disk=disk, front_end=said)
            finally:
                self._closer.close(sent.fds)
        except (MullionError, OSError) as error:
            log.warning("%s: the provider does not go on with the connection of %s: %s", self._partition, disk, error)
            keeper.refused(disk, front_end)

    def _hear(self, keeper: Keeper) -> None:
        try:
            if not keeper.receive():
                asyncio.get_running_loop().remove_reader(keeper.channel)
        except InvalidError as error:
            log.error("%s: %s", self._partition, error)
            self.drop()

    def orphan(self) -> None:
        """The provider has ended, and the next one is about to begin."""
        self._ends += 1
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
            hang_up(front_end, self._closer)

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
