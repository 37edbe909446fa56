"""The dirty log: which pages of the guest's memory the device has written to, for whoever copies that memory meanwhile.

Spec: QEMU, "Vhost-user Protocol", "Migration". One bit a page of 4 KiB of guest addresses, bit 0 of byte 0 first.

Invariants: the log is shared by all devices of the guest, and Python has no atomic OR. So a whole byte of ones is
stored, for eight pages: a bit of another device is never lost, and a few pages too many are copied.
A request's pages are marked after they were written, and before it is announced; those of the used ring when the ring
has been drained: before a message of the front-end is taken, such as the one that stops the ring.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

from mullion.provider.memory import GuestFault
from mullion.wire.vhost_user import Log

_SHIFT: Final = 12 + 3  # of an address, to the byte of its page
_PAGE_MASK: Final = mmap.ALLOCATIONGRANULARITY - 1


class DirtyLog:
    """The log as the front-end handed it over."""

    def __init__(self, log: Log, fd: int) -> None:
        """Map it. The descriptor stays the caller's. Raises: GuestFault."""
        slack = log.mmap_offset & _PAGE_MASK
        try:
            if not log.mmap_size or os.fstat(fd).st_size < log.mmap_offset + log.mmap_size:
                raise GuestFault("the dirty log is larger than its file, or empty")
            mapped = mmap.mmap(fd, slack + log.mmap_size, offset=log.mmap_offset - slack)
        except (ValueError, OverflowError, OSError) as error:
            raise GuestFault(f"the dirty log cannot be mapped: {error}") from error
        self._view = memoryview(mapped)[slack:]

    def mark(self, guest_address: int, length: int) -> None:
        """A range was written to. Raises: GuestFault when the log does not reach that far."""
        if length:
            first, end = guest_address >> _SHIFT, (guest_address + length - 1 >> _SHIFT) + 1
            if end > len(self._view):
                raise GuestFault(f"address {guest_address:#x}, {length} bytes: outside the dirty log")
            self._view[first:end] = b"\xff" * (end - first)
