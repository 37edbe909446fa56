"""What a disk file and its parents say about themselves, without locking or changing anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from mullion.vhd.image import Image, load_image, open_file
from mullion.vhd.layer_journal import check_marks
from mullion.vhd.layout import DiskType
from mullion.vhd.parents import CHAIN_LIMIT, open_parents


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file of a chain."""

    path: str
    type: DiskType
    size_bytes: int
    file_bytes: int
    unique_id: bytes
    block_bytes: int | None
    allocated_bytes: int
    warnings: tuple[str, ...]
    """Everything odd about it; what also keeps it from being written is in `damage`."""
    damage: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChainInfo:
    """A chain, top first."""

    files: tuple[FileInfo, ...]

    @property
    def size_bytes(self) -> int:
        return self.files[0].size_bytes

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(file.path for file in self.files)


def inspect_chain(path: str, *, allowed_dirs: Sequence[str] | None = None, limit: int = CHAIN_LIMIT) -> ChainInfo:
    """Read a disk's structures and its parents'. It may be in use: what is said may be a moment old.

    Raises: NotFoundError, DeniedError; VhdError for what is wrong with a file; OSError.
    """
    fd = open_file(path)
    images: list[Image] = []
    try:
        images = open_parents(load_image(fd, path), allowed_dirs=allowed_dirs, limit=limit)
        check_marks(images)
        return ChainInfo(tuple(_describe(image) for image in images))
    finally:
        for image in images[1:]:
            image.close()
        os.close(fd)


def _describe(image: Image) -> FileInfo:
    return FileInfo(
        path=image.path,
        type=image.kind,
        size_bytes=image.size_bytes,
        file_bytes=image.file_bytes,
        unique_id=image.footer.unique_id,
        block_bytes=image.header.block_bytes if image.header else None,
        allocated_bytes=image.allocated_bytes,
        warnings=tuple(image.warnings),
        damage=tuple(image.damage),
    )
