"""Front-ends' connections, kept by the parent for the case that a provider is killed.

QEMU would notice that its back end is gone, wait for a second, connect anew and say everything once more; before 9.1 it
may even lose the back end for good, if it is not running its guest just then. So the parent has a copy of each
connection, and hands it to the next provider (`adopt`): QEMU notices nothing, and requests wait for milliseconds.

    parent      `keep`, with one end of a socket pair (SOCK_SEQPACKET) and a page that both map
    provider    before it reads what a front-end says: makes the disk's number in the page odd
                after: a message with the connection as it is now, then the number even: that of the message
    parent      when the provider has been killed: a copy is good if its number is the page's; all others are hung up,
                and QEMU comes back by itself

A message is JSON, `{"disk": id, "number": n, "front_end": null or as of `FrontEnd.to_wire`}`, and its descriptors. A
number is a u64, little-endian, at 8 n for disk n.

Invariants: nobody uses a connection that another process may use: a copy is handed on only when its provider has ended.
Who hangs up a connection shuts it down, because copies of it may be open elsewhere. A provider never waits for its
parent: what cannot be sent leaves an older copy, whose number is not the page's, until the channel has room again. Nor
does a parent wait for a provider, which may be its guest's by now: it takes some messages at a time, has descriptors
closed aside, never looks into them, and nobody can make the page smaller.
"""

from __future__ import annotations

import array
import fcntl
import json
import mmap
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

from mullion.base.closer import Closer
from mullion.base.errors import InvalidError
from mullion.provider.control import close_all
from mullion.provider.control_client import FDS_LIMIT, descriptors_of
from mullion.provider.front_end import FrontEnd

_MESSAGE_LIMIT_BYTES: Final = 64 * 1024
_MESSAGES_AT_ONCE: Final = 16
"""The parent has more to do than to listen to one provider."""
_MESSAGES_WAITING: Final = 1024
"""More than a channel holds."""
_NUMBER_BYTES: Final = 8
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(FDS_LIMIT * array.array("i").itemsize)


class Keeping:
    """A provider's end, for all of its disks. Their threads use it, each its own disk."""

    def __init__(self, fds: Sequence[int], disks: Sequence[str]) -> None:
        """The descriptors are ours from now on: the channel and the page. Raises: InvalidError."""
        self.disks = tuple(disks)
        self._left: set[str] = set()
        try:
            channel, page = fds
            self._channel = socket.socket(fileno=channel)
        except (ValueError, OSError) as error:
            close_all(fds)
            raise _not_kept(error) from error
        try:
            self._page = mmap.mmap(page, max(len(disks), 1) * _NUMBER_BYTES)
        except (ValueError, OSError) as error:
            self._channel.close()
            raise _not_kept(error) from error
        finally:
            os.close(page)
        self._channel.setblocking(False)
        self._numbers = memoryview(self._page).cast("Q")

    def changes(self, disk: str) -> None:
        """What was said of a connection is not true any more."""
        self._numbers[self.disks.index(disk)] |= 1

    def is_now(self, disk: str, front_end: FrontEnd | None) -> bool:
        """The connection as it is; the descriptors stay the caller's. False when it has to be said again later."""
        slot = self.disks.index(disk)
        number = (self._numbers[slot] | 1) + 1
        fields = {"disk": disk, "number": number, "front_end": None if front_end is None else front_end.to_wire()}
        try:
            socket.send_fds(self._channel, [json.dumps(fields).encode()], [] if front_end is None else front_end.fds)
        except BlockingIOError:  # the parent is slow
            return False
        except OSError:  # it is gone, and asks anew when it is back
            return True
        self._numbers[slot] = number
        return True

    @property
    def channel(self) -> int:
        """Writable when more can be said."""
        return self._channel.fileno()

    def leave(self, disk: str) -> None:
        """Nothing more is said of a disk, and what was said counts no more. After the last one all is closed."""
        self.changes(disk)
        self._left.add(disk)
        if len(self._left) == len(self.disks):
            self._numbers.release()
            self._page.close()
            self._channel.close()


class Keeper:
    """The parent's end: what a provider has said of its disks."""

    def __init__(self, disks: Sequence[str], closer: Closer | None = None) -> None:
        """Raises: OSError."""
        self._disks = tuple(disks)
        self._closer = Closer() if closer is None else closer
        self._copies: dict[str, tuple[int, FrontEnd]] = {}
        self._page_fd = _sealed_page(max(len(disks), 1) * _NUMBER_BYTES)
        try:
            self._channel, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            os.close(self._page_fd)
            raise
        self._channel.setblocking(False)

    def expect(self, copies: Mapping[str, FrontEnd]) -> None:
        """The provider is going to adopt these, which are ours from now on; before anything is received from it."""
        self._copies = {disk: (0, front_end) for disk, front_end in copies.items()}

    @property
    def fds(self) -> tuple[int, int]:
        """What a provider needs."""
        return self._theirs.fileno(), self._page_fd

    @property
    def channel(self) -> int:
        """Readable when the provider has said something."""
        return self._channel.fileno()

    def given(self) -> None:
        """The provider has its end, and our channel ends with it."""
        self._theirs.close()

    def receive(self, limit: int = _MESSAGES_AT_ONCE) -> bool:
        """Take some of what has been said so far; False when nothing comes any more.

        Raises: InvalidError for what no provider says: nothing that it has said counts then.
        """
        for _ in range(limit):
            if self._closer.is_behind:
                raise InvalidError("a provider sends descriptors that cannot be closed")
            try:
                data, ancillary, flags, _ = self._channel.recvmsg(
                    _MESSAGE_LIMIT_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return True
            except OSError:
                return False
            fds = descriptors_of(ancillary)
            if not data:
                self._closer.close(fds)
                return False
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                self._closer.close(fds)
                raise InvalidError("a provider says more of a connection than one has")
            self._take_in(data, fds)
        return True

    def _take_in(self, data: bytes, fds: list[int]) -> None:
        try:
            fields = json.loads(data)
            disk, number, said = fields["disk"], fields["number"], fields["front_end"]
            if disk not in self._disks or type(number) is not int:
                raise ValueError(f"disk {disk!r} or number {number!r} is unknown")
            left = iter(fds)
            front_end = None if said is None else FrontEnd.from_wire(said, left)
            if next(left, None) is not None:
                raise ValueError("more descriptors than it says")
        except (ValueError, KeyError, TypeError, StopIteration, RuntimeError, RecursionError) as error:
            self._closer.close(fds)
            raise InvalidError(f"what a provider says of a connection cannot be read: {error!r}") from error
        _, old = self._copies.pop(disk, (0, None))
        if old is not None:
            self._closer.close(old.fds)
        if front_end is not None:
            self._copies[disk] = number, front_end

    def take(self) -> dict[str, FrontEnd]:
        """The connections that the next provider can go on with; for when this one has ended. Others are hung up."""
        try:
            self.receive(_MESSAGES_WAITING)
        except InvalidError:
            self.hang_up()
            return {}
        numbers = memoryview(os.pread(self._page_fd, len(self._disks) * _NUMBER_BYTES, 0)).cast("Q")
        good: dict[str, FrontEnd] = {}
        for disk, (number, front_end) in self._copies.items():
            if number == numbers[self._disks.index(disk)]:
                good[disk] = front_end
            else:
                hang_up(front_end, self._closer)
        self._copies = {}
        return good

    def copy_of(self, disk: str) -> FrontEnd | None:
        """What is kept of a disk; its descriptors are the keeper's."""
        return self._copies.get(disk, (0, None))[1]

    def refused(self, disk: str, front_end: FrontEnd) -> None:
        """The provider did not adopt it: it is hung up, if it is what is kept."""
        if self.copy_of(disk) is front_end:
            del self._copies[disk]
            hang_up(front_end, self._closer)

    def hang_up(self) -> None:
        """Nobody goes on with what is kept."""
        for _, front_end in self._copies.values():
            hang_up(front_end, self._closer)
        self._copies = {}

    def close(self) -> None:
        """Let go; connections live on where somebody else has them."""
        for _, front_end in self._copies.values():
            self._closer.close(front_end.fds)
        self._copies = {}
        self._channel.close()
        self._theirs.close()
        if self._page_fd >= 0:
            os.close(self._page_fd)
            self._page_fd = -1


def _not_kept(error: Exception) -> InvalidError:
    return InvalidError(f"keep: {error}", remedy="Send a socket and a page with a number for each disk along.")


def _sealed_page(size_bytes: int) -> int:
    """A memory file that nobody makes smaller. Raises: OSError."""
    fd = os.memfd_create("mullion-keeper", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


def hang_up(front_end: FrontEnd, closer: Closer) -> None:
    """End a connection for all who have it: the front-end comes back by itself. Its descriptors are closed soon."""
    with suppress(OSError):  # it may have ended already, or be no socket, if that is what a provider has sent
        connection = socket.socket(fileno=front_end.connection)
        try:
            connection.shutdown(socket.SHUT_RDWR)
        finally:
            connection.detach()
    closer.close(front_end.fds)
