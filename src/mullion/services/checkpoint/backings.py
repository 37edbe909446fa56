"""Who reads blocks of a partition's disks that only a backup has (`services.backup.instant`), and where.

A frozen layer of a disk that is coming home can be read as any other, through a server of the backup. Whoever reads it
has that server kept: until he has ended, also when all is home meanwhile, for what he opened does not know of that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from mullion.services.partition.exchange import awaited_backup
from mullion.services.partition.partition import Partition

_LOOK_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class ReadableDisk:
    """A disk that stays as it is: its files, top first, and the NBD socket with what none of them has."""

    files: tuple[str, ...]
    backing: str | None = None


class Backings:
    """The readers of all partitions. `serve` has a server started, and says where it serves which disk."""

    def __init__(self) -> None:
        self._users: Counter[str] = Counter()
        self.serve: Callable[[Partition], Awaitable[Mapping[str, str]]] | None = None

    def is_used(self, partition: str) -> bool:
        """Whether somebody reads what only the backup has."""
        return self._users[partition] > 0

    def hold(self, partition: str) -> None:
        """Somebody reads it, until `release`."""
        self._users[partition] += 1

    def release(self, partition: str) -> None:
        self._users[partition] -= 1

    @contextlib.asynccontextmanager
    async def using(self, partition: Partition) -> AsyncIterator[Mapping[str, str]]:
        """By disk, where to read what no file has, inside the block; empty when the files have everything.

        Raises: what keeps the server from starting.
        """
        if self.serve is None or not partition.record.coming_home:
            yield {}
            return
        self.hold(partition.name)
        try:
            yield await self.serve(partition)
        finally:
            self.release(partition.name)


async def until_answered(partition: Partition, say: Callable[[str], None]) -> None:
    """Wait while requests of the guest wait for the backup: the disks cannot be frozen before they have ended."""
    while (why := await awaited_backup(partition)) is not None:
        say(f"waiting until the guest's reads of blocks that only the backup has are answered: {why}")
        await asyncio.sleep(_LOOK_S)
