"""Options and small rules that several commands of `mullion vhd` share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import click

from mullion.base.errors import InvalidError
from mullion.base.units import SECTOR_BYTES, format_size
from mullion.cli.face import Face
from mullion.cli.values import SizeType

_Command = TypeVar("_Command", bound=Callable[..., object])

DISK: Final = click.Path(dir_okay=True, readable=False, path_type=str)
"""A path as it was typed; what is wrong with it is the engine's to say."""

FORMATS: Final = ("vhd", "raw", "vhdx", "vmdk", "qcow2", "qcow", "qed", "vdi", "parallels", "ova")
"""Those of `media.foreign.FORMATS` that a person may name, repeated here because importing them takes time."""


def allow_option(command: _Command) -> _Command:
    """Where parents may lie, beside the folder of the disk itself."""
    return click.option(
        "--allow",
        "allow",
        multiple=True,
        metavar="FOLDER",
        type=click.Path(exists=True, file_okay=False, path_type=str),
        help="A folder in which parents may lie, beside the disk's own and those its maker named. May be repeated.",
    )(command)


def size_from_option(command: _Command) -> _Command:
    """Which of a VHD's two sizes counts, by `size_from`: reading only."""
    return click.option(
        "--size-from",
        "size_source",
        type=click.Choice(("footer", "chs")),
        default="footer",
        help="chs: as large as the geometry says, as Virtual PC and QEMU before 10.0 show it. For reading. "
        "Default: footer, the current size.",
    )(command)


def align_option(command: _Command) -> _Command:
    """What a size is rounded up to, by `aligned`."""
    return click.option(
        "--align",
        type=SizeType(),
        metavar="SIZE",
        default="1M",
        show_default=True,
        help="The size is rounded up to a multiple of this; Azure wants 1M. 512 is the least.",
    )(command)


def from_option(command: _Command) -> _Command:
    """What the source is, for the rare file whose content does not say it."""
    return click.option(
        "--from",
        "source_format",
        metavar="FORMAT",
        type=click.Choice(FORMATS),
        help="The format of the file; default: what its content says. A raw disk may begin with anything.",
    )(command)


def disk_option(command: _Command) -> _Command:
    """Which of the disks in an OVA."""
    return click.option(
        "--disk", "member", metavar="N", help="Of an OVA with several disks: which one, by its number or name."
    )(command)


def allowed_dirs(path: str, allow: Sequence[str]) -> list[str] | None:
    """The folders for `open_chain`: None is its own rule."""
    if not allow:
        return None
    return [os.path.dirname(os.path.realpath(path)), *allow]


def check_name(path: str) -> None:
    """Refuse the name of another format for a file that will be a VHD or raw: whoever meets it would be misled.

    Raises: InvalidError.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix.removeprefix(".") in FORMATS and suffix not in (".vhd", ".raw"):
        raise InvalidError(
            f"{path} has the name of a {suffix[1:].upper()} file, and a VHD or a raw file is what can be made here",
            remedy=f"Name it {os.path.basename(path)[: -len(suffix)]}.vhd, or .img for a raw file.",
            path=path,
        )


def aligned(face: Face, size_bytes: int, align_bytes: int) -> int:
    """The size, rounded up to the alignment, which is said: a disk is never silently larger than it was asked for."""
    if align_bytes < SECTOR_BYTES or align_bytes % SECTOR_BYTES:
        raise InvalidError(f"sizes cannot be multiples of {align_bytes} bytes", remedy="Give --align 512, 4K or 1M.")
    rounded = -(-size_bytes // align_bytes) * align_bytes
    if rounded != size_bytes:
        hint = " (--align 512 keeps odd sizes)" if rounded - size_bytes >= SECTOR_BYTES else ""
        face.note(f"{size_bytes} bytes are not a multiple of {format_size(align_bytes)}: rounded up to {rounded}{hint}")
    return rounded
