"""What changed between two points of a chain, and where two disks differ.

Between two points of a chain nothing is compared: what the layers above the older point hold is what may have changed,
exact to the sector of their bitmaps. A sector that was written again with the same content counts as changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mullion.base.errors import InvalidError
from mullion.base.progress import Progress, no_progress
from mullion.vhd.chain import Chain, open_chain
from mullion.vhd.compare import Comparison
from mullion.vhd.held import HeldSectors
from mullion.vhd.image import Image
from mullion.vhd.mapping import NOWHERE
from mullion.vhd.zeros import next_data, next_hole


class Change(NamedTuple):
    """A range of the disk, in bytes; `zero` when it is known, without reading it, to read as zeros now."""

    offset: int
    length: int
    zero: bool


def changed(path: str, *, since: str | None = None, allowed_dirs: Sequence[str] | None = None) -> Iterator[Change]:
    """What the layers above `since` hold, a file of the chain of `path`; by default what the top file alone holds.

    Ascending, as long as they are, inside the size of `path`. Raises: InvalidError when `since` is not below `path`;
    what opening raises; VhdDamagedError; OSError.
    """
    with open_chain(path, read_only=True, allowed_dirs=allowed_dirs) as chain:
        upper = 1 if since is None else _depth_of(chain, since)
        yield from _joined(_changes(chain, chain.images[:upper], chain.images[upper : upper + 1]))


def differences(
    one: str, two: str, *, allowed_dirs: Sequence[str] | None = None, progress: Progress = no_progress
) -> Iterator[Change]:
    """Where the contents of two disks differ; `zero` says that the second is known to read as zeros there.

    Ascending; past the end of the shorter disk it reads as zeros. Raises: what opening raises; VhdError; OSError.
    """
    with (
        open_chain(one, read_only=True, allowed_dirs=allowed_dirs) as first,
        open_chain(two, read_only=True, allowed_dirs=allowed_dirs) as second,
    ):
        size = max(first.size_bytes, second.size_bytes)
        for offset, length in Comparison(first, second).differing(0, size, progress):
            yield from _joined(_with_zeros(second, offset, length))


def _depth_of(chain: Chain, since: str) -> int:
    """How many layers lie above this file."""
    try:
        status = os.stat(since)
    except OSError:
        status = None
    for depth, image in enumerate(chain.images):
        own = os.fstat(image.fd)
        if status is not None and (own.st_dev, own.st_ino) == (status.st_dev, status.st_ino):
            return depth
    raise InvalidError(
        f"{since} is not in the chain of {chain.paths[0]}",
        remedy=f"Name one of its files: {', '.join(chain.paths)}.",
        path=since,
    )


def _changes(chain: Chain, upper: list[Image], below: list[Image]) -> Iterator[Change]:
    if upper and upper[-1].header is None:
        yield from _data_of_fixed(upper[-1], chain)
        return
    held = HeldSectors(upper, below[0] if below else None, chain.size_bytes)
    for begin, end in held.ranges(0, chain.size_bytes):
        yield from _with_zeros(chain, begin, end - begin)


def _data_of_fixed(image: Image, chain: Chain) -> Iterator[Change]:
    """A fixed disk holds everything: data, and holes that read as zeros."""
    offset = 0
    for part, is_zero in _parts(image.fd, 0, min(image.size_bytes, chain.size_bytes)):
        yield Change(offset, part, is_zero)
        offset += part


def _with_zeros(chain: Chain, offset: int, length: int) -> Iterator[Change]:
    """A range, with the parts told apart that no file has, or that are holes in the file that has them."""
    end = offset + length
    inside = max(offset, min(end, chain.size_bytes))
    for fd, at, count in chain.segments(offset, inside - offset) if inside > offset else ():
        for part, is_zero in _parts(fd, at, count):
            yield Change(offset, part, is_zero)
            offset += part
    if offset < end:
        yield Change(offset, end - offset, True)


def _parts(fd: int, at: int, length: int) -> Iterator[tuple[int, bool]]:
    """A range of a file divided into holes and data: (length, whether it is known to be zeros)."""
    end = at + length
    while at < end:
        data = next_data(fd, at, end) if fd != NOWHERE else end
        if data > at:
            yield data - at, True
        at = next_hole(fd, data, end) if data < end else end
        if at > data:
            yield at - data, False


def _joined(changes: Iterator[Change]) -> Iterator[Change]:
    """Neighbours of one kind as one."""
    last: Change | None = None
    for change in changes:
        if last is not None and last.offset + last.length == change.offset and last.zero is change.zero:
            last = Change(last.offset, last.length + change.length, last.zero)
            continue
        if last is not None:
            yield last
        last = change
    if last is not None:
        yield last
