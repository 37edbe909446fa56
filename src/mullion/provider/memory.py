"""The guest's memory, mapped from the descriptors that QEMU hands over, and the way from an address to the bytes.

A guest's address is hostile: it is looked up with its whole length, and what is not inside one region (or adjoining
ones) is a `GuestFault`. The largest region, where nearly all requests point, is kept apart for the ring's fast path.

Not handled: a front-end that truncates its own memory file under us (the kernel then kills this process, and only the
partition that did it has no disk until its provider is started again).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Final, NamedTuple

from mullion.base.errors import MullionError
from mullion.wire.vhost_user import MemoryRegion

_PAGE_MASK: Final = mmap.ALLOCATIONGRANULARITY - 1


class GuestFault(MullionError):
    """A request or a ring of the guest points outside its memory, or contradicts the specification."""

    code = "guest-fault"
    http_status = 409
    exit_code = 4
    default_remedy = "Reset the partition: its driver, or what has taken its place, wrote nonsense into the ring."


class Region(NamedTuple):
    """A mapped range: addresses of the guest and of the front-end's process, and its bytes."""

    guest_address: int
    user_address: int
    view: memoryview


class GuestMemory:
    """All regions of one memory table."""

    def __init__(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> None:
        """Map the regions. The descriptors stay the caller's. Raises: GuestFault when one does not fit its file."""
        self._regions = sorted(
            (_map_region(region, fd) for region, fd in zip(regions, fds, strict=True)),
            key=lambda region: region.guest_address,
        )
        for below, above in zip(self._regions, self._regions[1:], strict=False):
            if below.guest_address + len(below.view) > above.guest_address:
                raise GuestFault(f"memory regions overlap at {above.guest_address:#x}")
        self.largest = max(self._regions, key=lambda region: len(region.view)) if self._regions else None

    def segments(self, address: int, length: int) -> list[memoryview]:
        """The bytes at a guest's address, in as many pieces as regions are touched.

        Raises: GuestFault when any of it is outside the memory.
        """
        found = []
        while length:
            for region in self._regions:
                start = address - region.guest_address
                if 0 <= start < len(region.view):
                    piece = region.view[start : start + length]
                    break
            else:
                raise GuestFault(f"address {address:#x}, {length} bytes: outside the guest's memory", address=address)
            found.append(piece)
            address += len(piece)
            length -= len(piece)
        return found

    def ring_part(self, user_address: int, length: int) -> memoryview:
        """A part of a vring, given by an address of the front-end's process; it must lie in one region.

        Raises: GuestFault.
        """
        for region in self._regions:
            start = user_address - region.user_address
            if start >= 0 and start + length <= len(region.view):
                return region.view[start : start + length]
        raise GuestFault(f"vring at {user_address:#x}, {length} bytes: outside the guest's memory")

    def guest_address(self, user_address: int) -> int:
        """The guest's address of what lies at one of the front-end's process. Raises: GuestFault."""
        for region in self._regions:
            if 0 <= user_address - region.user_address < len(region.view):
                return region.guest_address + user_address - region.user_address
        raise GuestFault(f"address {user_address:#x} of the front-end: outside the guest's memory")


def _map_region(region: MemoryRegion, fd: int) -> Region:
    slack = region.mmap_offset & _PAGE_MASK
    length = slack + region.size
    try:
        if os.fstat(fd).st_size < region.mmap_offset + region.size:
            raise GuestFault(f"memory region at {region.guest_address:#x} is larger than its file")
        mapped = mmap.mmap(fd, length, offset=region.mmap_offset - slack)
    except (ValueError, OverflowError, OSError) as error:
        raise GuestFault(f"memory region at {region.guest_address:#x} cannot be mapped: {error}") from error
    return Region(region.guest_address, region.user_address, memoryview(mapped)[slack:])
