"""The CHS geometry that a VHD's footer carries.

Spec: Virtual Hard Disk Image Format Specification 1.0, appendix "CHS Calculation". Floor division throughout. Nobody
should derive a size from it, yet some readers do; see `create` for what that means for the files we write. Whoever
wants what such a reader showed asks for it (`SizeFrom.CHS`).
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from mullion.base.units import SECTOR_BYTES

MAX_CYLINDERS = 65535


class SizeFrom(Enum):
    """Which of a footer's two sizes is the disk's."""

    FOOTER = "footer"
    """The current size."""
    CHS = "chs"
    """That of the geometry, as Virtual PC showed it to its guests and QEMU before 10.0 reads it."""


class Geometry(NamedTuple):
    """Cylinders, heads and sectors per track."""

    cylinders: int
    heads: int
    sectors_per_track: int

    @property
    def is_largest(self) -> bool:
        """Is it that of all disks which no geometry can describe? It says nothing about the size."""
        return self == (MAX_CYLINDERS, 16, 255)

    @property
    def size_bytes(self) -> int:
        return self.cylinders * self.heads * self.sectors_per_track * SECTOR_BYTES

    @classmethod
    def for_size(cls, size_bytes: int) -> Geometry:
        """The geometry that the specification prescribes for a disk of this size."""
        total = min(size_bytes // SECTOR_BYTES, MAX_CYLINDERS * 16 * 255)
        if total >= MAX_CYLINDERS * 16 * 63:
            return cls(total // 255 // 16, 16, 255)
        tracks = total // 17
        heads = max(4, (tracks + 1023) // 1024)
        if tracks < heads * 1024 and heads <= 16:
            return cls(tracks // heads, heads, 17)
        tracks = total // 31
        if tracks < 16 * 1024:
            return cls(tracks // 16, 16, 31)
        return cls(total // 63 // 16, 16, 63)
