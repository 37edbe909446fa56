"""Bringing home what a chain's backing has, into the file at its bottom, while the chain is used.

The bottom is a dynamic disk that was made empty for that. A block of it is home as a whole or not at all: its BAT entry
says so. What lies above hides what it has written, and reads the rest here or, as long as it is not here, from the
backing: the same. So nobody who reads or writes the chain sees any of it, whatever lies on the bottom: layers that are
frozen, or several heads that were made of them.

Locks: other processes may have the bottom open below other layers, and read what they lack from the same backing. As in
a merge (`locking.lock_for_merge`) only those are kept out who would read or write it by itself.

Durability: the order is that of `top`; what a crash takes away comes again, so that there is no pending log. The system
tells of data that it could not write once: after a flush that failed, all blocks that it was for are brought again
before anything is made durable, for the BAT says for ever that they are home.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from mullion.base.block import Buffer
from mullion.base.errors import InvalidError
from mullion.vhd.chain import Backing, Chain
from mullion.vhd.layout import DiskType
from mullion.vhd.locking import lock_for_merge, unlock_merge
from mullion.vhd.recovery import end_top, open_top


class Filling:
    """What comes home to one chain. One thread fills; others may use and exchange the chain meanwhile."""

    def __init__(self, chain: Chain, backing: Backing, *, holder: str = "") -> None:
        """From now on the chain reads the backing where no file has anything; nobody reads or writes it yet.

        The bottom must be open for writing. Raises: InvalidError when it cannot be filled; DiskBusyError;
        VhdDamagedError; OSError.
        """
        image = chain.images[-1]
        if image.kind is not DiskType.DYNAMIC or image is chain.images[0]:
            raise InvalidError(
                f"{image.path}: blocks can only come home to a dynamic disk that is not the top of its chain",
                remedy="Restore the disk as a whole: mullion backup restore without --instant.",
                path=image.path,
            )
        lock_for_merge(image.fd, image.path)
        writer, _ = open_top(image, pending_path=None, holder=holder, file_io=chain.file_io)
        assert writer is not None, "a dynamic disk has one"
        self._chain = chain
        self._image = image
        self._writer = writer
        self._is_ended = False
        self._unflushed: set[int] = set()
        self._doubtful: set[int] = set()
        """Blocks that a flush was for that failed."""
        chain.filled = image
        chain.backing = backing

    @property
    def block_bytes(self) -> int:
        return self._image.block_bytes

    @property
    def size_bytes(self) -> int:
        """What can be filled: the disk may be larger by now."""
        return self._image.size_bytes

    def lacks(self, block: int) -> bool:
        """Whether a block is not home, or has to be brought again."""
        return block in self._doubtful or self._writer.data_offset(block) is None

    @property
    def is_doubtful(self) -> bool:
        """Whether blocks have to be brought again before any can be made durable."""
        return bool(self._doubtful)

    def fill(self, block: int, runs: Sequence[tuple[int, Buffer]]) -> None:
        """Bring a block home: what the backing has there, as (offset in the block, content), zeros elsewhere.

        Durable after `flush`. Raises: OSError, with nothing changed, and it may be called again.
        """
        if not self.lacks(block):
            return
        pieces = [(within, (content,)) for within, content in runs]
        if block in self._doubtful:
            self._writer.write_runs_again(block, pieces)
            self._doubtful.discard(block)
            return
        if self._writer.is_full:
            self.flush()
        self._writer.write_runs(block, pieces)
        self._unflushed.add(block)
        self._chain.look_again(block * self.block_bytes, self.block_bytes)

    def flush(self) -> None:
        """Make what was filled durable, and visible to whoever opens the file.

        Raises: OSError: then, and until all that `lacks` names has been filled again, it cannot be made durable.
        """
        if self._doubtful:
            raise OSError(errno.EIO, "what was written may be lost, and has to come from the backup again")
        try:
            self._writer.flush()
        except OSError:
            self._doubtful |= self._unflushed
            raise
        self._unflushed.clear()

    def end(self) -> None:
        """Leave the bottom as every writer does, and others may write it. The chain still reads the backing.

        Durable when this returns. May be repeated after an error, and when it was ended. Raises: OSError.
        """
        if not self._is_ended:
            self.flush()
            end_top(self._image, self._writer, self._chain.file_io)
            unlock_merge(self._image.fd)
            self._chain.filled = None
            self._is_ended = True
