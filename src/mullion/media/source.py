"""The disk that somebody named, whatever its format: a VHD with its parents by the engine.

Invariant: what is written is a VHD, whose engine knows how to write it safely.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from mullion.base.block import BlockDevice
from mullion.base.errors import InvalidError
from mullion.vhd import open_chain
from mullion.vhd.geometry import SizeFrom
from mullion.vhd.rawfile import RawFile

_NAMES: Final = {".vhd": "vhd", ".vhdx": "vhdx", ".vmdk": "vmdk", ".qcow2": "qcow2", ".vdi": "vdi", ".ova": "ova"}


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A disk that is open for reading."""

    device: BlockDevice
    format: str
    """One of `foreign.FORMATS`."""
    paths: tuple[str, ...]
    """Its files, as far as they are known."""
    warnings: list[str] = field(default_factory=list)


@contextlib.contextmanager
def open_source(
    path: str,
    *,
    source_format: str | None = None,
    allowed_dirs: Sequence[str] | None = None,
    disk: str | None = None,
    size_from: SizeFrom = SizeFrom.FOOTER,
) -> Iterator[OpenSource]:
    """Open a disk of any format for reading: a VHD with its parents, a raw file, or what `foreign` reads.

    `disk` chooses one of several in an OVA, by number or name; `size_from` is for a VHD.

    Without `source_format` the content says what it is, never the name. But where the content says nothing, which means
    raw, and the name does, the file is refused: a damaged disk must not be taken for the content of one.
    Raises: what `open_chain`, `RawFile` and `open_foreign` raise; InvalidError.
    """
    from mullion.media.foreign import detect_format, open_foreign, open_ova

    kind = source_format or detect_format(path)
    if disk is not None and kind != "ova":
        raise InvalidError(
            f"{path} is one disk, not a package of several", remedy="Leave --disk out: it chooses among an OVA's disks."
        )
    if size_from is not SizeFrom.FOOTER and kind != "vhd":
        raise InvalidError(
            f"{path} is no VHD: it has no CHS size", remedy="Leave --size-from out: it is for VHD files.", path=path
        )
    if kind == "ova":
        with open_ova(path, disk) as device:
            yield OpenSource(device, kind, (path,))
    elif kind == "vhd":
        with open_chain(path, read_only=True, allowed_dirs=allowed_dirs, size_from=size_from) as chain:
            yield OpenSource(chain, kind, chain.paths, chain.warnings)
    elif kind == "raw":
        claimed = _NAMES.get(os.path.splitext(path)[1].lower())
        if source_format is None and claimed is not None:
            raise InvalidError(
                f"{path} has the name of a {claimed} disk, but nothing in it says so",
                remedy=(
                    f"If it holds a raw disk: mullion vhd convert {shlex.quote(path)} NEW.vhd --from raw; "
                    f"else restore the file from a backup."
                ),
                path=path,
            )
        with RawFile(path) as raw:
            yield OpenSource(raw, kind, raw.paths)
    else:
        with open_foreign(path, kind) as device:
            yield OpenSource(device, kind, (path,))


@contextlib.contextmanager
def open_disk(
    path: str,
    *,
    writable: bool,
    purpose: str,
    allowed_dirs: Sequence[str] | None = None,
    size_from: SizeFrom = SizeFrom.FOOTER,
) -> Iterator[OpenSource]:
    """Open a disk for other programs: of any format for reading, a VHD for writing.

    `purpose` is shown to whoever finds the disk busy. Raises: what `open_source` and `open_chain` raise.
    """
    if not writable:
        with open_source(path, allowed_dirs=allowed_dirs, size_from=size_from) as source:
            yield source
        return
    holder = f"mullion {purpose} (pid {os.getpid()})"
    with open_chain(path, allowed_dirs=allowed_dirs, holder=holder, size_from=size_from) as chain:
        yield OpenSource(chain, "vhd", chain.paths, chain.warnings)
