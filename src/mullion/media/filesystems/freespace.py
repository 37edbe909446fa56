"""What of a disk no filesystem uses, so that it need not be kept: for `mullion vhd compact --free-space`.

A range is given only when everything about its filesystem says so; one doubt, and the whole volume counts as used: a
volume that was not unmounted, structures that disagree, features that are not known here. Partition tables, gaps
between partitions and whatever cannot be read count as used always.

`free_allocation` has the formats; here are the disk and what all have in common.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from mullion.base.block import BlockDevice
from mullion.media.filesystems.free_allocation import Bytes, DoubtError, exfat, ext, fat, ntfs
from mullion.media.filesystems.volumes import Volume, list_volumes

_BY_KIND = {"ntfs": ntfs, "fat": fat, "exfat": exfat, "ext": ext}


def _ignore(_doubt: str) -> None:
    """For callers who do not ask why something counts as used."""


def free_extents(
    path: str, allow: Sequence[str] | None = None, *, doubt: Callable[[str], None] = _ignore
) -> Iterator[tuple[int, int]]:
    """The free ranges of a disk in a file: (offset, length) in bytes, ascending, never touching each other.

    `allow` are the folders in which parents may lie (default: `open_chain`'s). `doubt` is told why a volume counts as
    used. The disk is opened for reading; who has it open for writing calls `free_extents_of`.
    Raises: what opening and reading the disk raises.
    """
    from mullion.media.source import open_source

    with open_source(path, allowed_dirs=allow) as source:
        yield from free_extents_of(source.device, doubt=doubt)


def free_extents_of(device: BlockDevice, *, doubt: Callable[[str], None] = _ignore) -> Iterator[tuple[int, int]]:
    """The same of a disk that is open. It must not be written to meanwhile, other than to drop what was given."""
    volumes, problems = list_volumes(device)
    volumes.sort(key=lambda volume: volume.offset)
    if problems:
        doubt(f"the partition table: {'; '.join(problems)}")
        return
    for first, second in itertools.pairwise(volumes):
        if first.offset + first.length > second.offset:
            doubt(f"the volumes {first.number} and {second.number} overlap")
            return
    for volume in volumes:
        reader = _BY_KIND.get(volume.holds.kind or "")
        if reader is None:
            doubt(f"volume {volume}: its free space is not known")
            continue
        try:
            yield from _joined(reader(Bytes(device, volume.offset, volume.length)), volume)
        except DoubtError as error:
            doubt(f"volume {volume}: {error}")


def _joined(ranges: Iterator[tuple[int, int]], volume: Volume) -> Iterator[tuple[int, int]]:
    """Ranges of a volume as ranges of the disk; neighbours become one."""
    start = end = -1
    for offset, length in ranges:
        assert 0 <= offset < offset + length <= volume.length
        if offset == end:
            end += length
            continue
        if end > start:
            yield volume.offset + start, end - start
        start, end = offset, offset + length
    if end > start:
        yield volume.offset + start, end - start
