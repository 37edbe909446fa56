"""Another parent for a differencing disk: the same disk at another path, or another disk.

The same disk (its id tells): only names change. Another disk, safely: the sectors in which the old and the new parents
differ, and which the child has not itself, are copied into the child; then the header names the new parent. Until that
instant the child over its old parent reads as before, afterwards over the new one: so there is no journal, and an
interrupted rebase goes on when it is run again. Unsafely: the header alone.

Durability: the copies are ordinary writes, durable before the header changes (`Chain.flush`); the header changes in one
instant (`header_switch`).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from mullion.base.errors import InvalidError
from mullion.base.progress import Progress, no_progress
from mullion.base.units import MIB, SECTOR_BYTES
from mullion.vhd import bat as bat_table
from mullion.vhd import bitmap
from mullion.vhd.chain import Chain, open_chain
from mullion.vhd.compare import Comparison
from mullion.vhd.errors import ChainCycleError, ParentNotFoundError
from mullion.vhd.fileio import SYSTEM, FileIO
from mullion.vhd.image import Image, load_image, open_file
from mullion.vhd.layout import DiskType
from mullion.vhd.offline import open_for_change
from mullion.vhd.parent_header import set_parent

_COPY_BYTES: Final = MIB
_STRETCH_BYTES: Final = 64 * MIB
"""How much is compared at once where the child has nothing; the differences of that much are kept."""


@dataclass(frozen=True, slots=True)
class Rebased:
    """What a rebase did: `is_same_disk` when only names changed, `copied_bytes` into the child otherwise."""

    path: str
    parent: str
    is_same_disk: bool
    copied_bytes: int


def rebase(
    path: str,
    parent: str,
    *,
    unsafe: bool = False,
    allowed_dirs: Sequence[str] | None = None,
    progress: Progress = no_progress,
    file_io: FileIO = SYSTEM,
) -> Rebased:
    """Put a differencing disk on the parent at that path; what it reads does not change, unless `unsafe`.

    Its folder is trusted from then on (`parents.trust_folder`). Raises: InvalidError when the disk has no parent;
    ChainCycleError; ParentNotFoundError when the old parent is needed and is not there; what opening raises; OSError.
    """
    child = _peek(path, parent)
    assert child.header is not None
    beside = None if allowed_dirs is None else [*allowed_dirs, os.path.dirname(os.path.realpath(parent))]
    with open_chain(parent, read_only=True, allowed_dirs=beside) as new:
        _check_cycle(path, new)
        is_same = child.header.parent_unique_id == new.unique_id
        needs_old = not is_same and not unsafe
        try:
            with open_for_change(
                path, holder="mullion vhd rebase", file_io=file_io, with_parents=needs_old, allowed_dirs=allowed_dirs
            ) as chain:
                copied = _copy_differences(chain, new, progress) if needs_old else 0
                chain.settle()
                set_parent(chain.images[0], parent, new.unique_id, file_io)
        except (ParentNotFoundError, ChainCycleError) as error:
            error.remedy = (
                f"{error.remedy} If it is gone for good, and {parent} has the same content: --unsafe, which changes "
                f"the name alone."
            )
            raise
        return Rebased(path, parent, is_same, copied)


def _peek(path: str, parent: str) -> Image:
    """The structures of the child, which must be one; the image is closed."""
    fd = open_file(path)
    try:
        child = load_image(fd, path)
    finally:
        os.close(fd)
    if child.kind is not DiskType.DIFFERENCING:
        raise InvalidError(
            f"{path} is {child.kind.word}: it has no parent",
            remedy=f"Make a child of the new parent: mullion vhd create CHILD --parent {shlex.quote(parent)}",
            path=path,
        )
    return child


def _check_cycle(path: str, new: Chain) -> None:
    own = os.stat(path)
    for image in new.images:
        status = os.fstat(image.fd)
        if (status.st_dev, status.st_ino) == (own.st_dev, own.st_ino):
            raise ChainCycleError(
                f"{path} cannot have {new.paths[0]} for a parent: that is the disk itself, or its child",
                path=path,
                structure="chain",
                remedy="Choose a disk that does not depend on this one.",
            )


def _copy_differences(chain: Chain, new: Chain, progress: Progress) -> int:
    """Put into the child what it reads from its old parents and would not read from the new one; returns the bytes."""
    comparison = Comparison(chain, new)
    copied = 0
    for offset, length in _missing(chain):
        progress("comparing parents", offset, chain.size_bytes)
        for at, count in list(comparison.differing(offset, length)):
            for start in range(at, at + count, _COPY_BYTES):
                content = bytearray(min(_COPY_BYTES, at + count - start))
                chain.pread(start, content)
                chain.pwrite(start, content)
            copied += count
    return copied


def _missing(chain: Chain) -> Iterator[tuple[int, int]]:
    """What the child has not itself, in the order of the disk, in parts of a bounded length."""
    child = chain.images[0]
    per_block = child.block_bytes // SECTOR_BYTES
    everything = bitmap.mask(0, per_block, per_block)
    block, blocks = 0, len(child.bat)
    while block < blocks:
        offset = block * child.block_bytes
        start = child.block_start(block)
        if start is None:
            most = min(blocks, block + max(1, _STRETCH_BYTES // child.block_bytes))
            following = min(most, bat_table.next_allocated(child.bat, block))
            block = following
            yield offset, min(following * child.block_bytes, chain.size_bytes) - offset
            continue
        block += 1
        own = child.read_bits(start, 0, per_block)
        for first, count in bitmap.set_runs(everything & ~own, per_block):
            at = offset + first * SECTOR_BYTES
            length = min(count * SECTOR_BYTES, chain.size_bytes - at)
            if length > 0:
                yield at, length
