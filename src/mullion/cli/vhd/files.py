"""`mullion vhd ls`, `cat` and `get`: the files inside a disk."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import click

from mullion.base.errors import InvalidError
from mullion.base.units import format_size
from mullion.cli.face import Face, pass_face
from mullion.cli.file_source import get_options, list_options
from mullion.cli.file_views import fetch, show_content, show_fetched, show_list, targets
from mullion.cli.lazy import Command
from mullion.cli.tables import table
from mullion.cli.vhd.meter import metered
from mullion.cli.vhd.options import DISK, allow_option, allowed_dirs, disk_option, size_from_option

if TYPE_CHECKING:
    from mullion.media.filesystems.reader import VolumeReader
    from mullion.media.filesystems.volumes import Volume

_Command = TypeVar("_Command", bound=Callable[..., object])
_NUMBERED: Final = re.compile(r"(.+):(\d{1,4})")


def _volume_options(command: _Command) -> _Command:
    """Which volume, and where the disk's parents may lie."""
    number = click.option(
        "--volume",
        type=click.IntRange(min=0),
        metavar="N",
        help="The volume, where the disk has several; 0 is the whole disk.",
    )
    return number(disk_option(size_from_option(allow_option(command))))


@click.command("ls", cls=Command, short_help="List the files inside a disk, or its volumes.")
@click.argument("disk", type=DISK)
@click.argument("path", default="/")
@list_options
@_volume_options
@pass_face
def ls(
    face: Face,
    *,
    disk: str,
    path: str,
    long: bool,
    recursive: bool,
    shows_volumes: bool,
    volume: int | None,
    member: str | None,
    size_source: str,
    allow: Sequence[str],
) -> None:
    """List the files inside a disk: NTFS, FAT, exFAT, ext2, ext3, ext4, ISO 9660.

    DISK is a VHD with its parents, a raw disk, or one in another format; DISK:N is its volume N. Nothing is mounted,
    nothing is written, and no rights are needed beyond reading the file. Deleted files are not shown.

    \b
    Examples:
      mullion vhd ls files.vhd
      mullion vhd ls -l files.vhd /etc
      mullion vhd ls --volumes base.vhd
    """
    if shows_volumes:
        _list_volumes(face, disk, member, size_source, allow)
        return
    with _opened(face, disk, volume, member, allow, size_source=size_source) as reader:
        show_list(face, reader.list(path, recursive=recursive), long=long, recursive=recursive)


@click.command("cat", cls=Command, short_help="Print a file inside a disk.")
@click.argument("disk", type=DISK)
@click.argument("path")
@_volume_options
@pass_face
def cat(
    face: Face,
    *,
    disk: str,
    path: str,
    volume: int | None,
    member: str | None,
    size_source: str,
    allow: Sequence[str],
) -> None:
    """Print a file inside a disk, byte by byte as it is; of NTFS also a stream, as FILE:STREAM.

    \b
    Examples:
      mullion vhd cat files.vhd /etc/hostname
    """
    with _opened(face, disk, volume, member, allow, size_source=size_source) as reader:
        show_content(reader.read(path))


@click.command("get", cls=Command, short_help="Copy files and folders out of a disk.")
@click.argument("disk", type=DISK)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.argument("destination", type=click.Path(path_type=str), metavar="DEST")
@get_options
@_volume_options
@pass_face
def get(
    face: Face,
    *,
    disk: str,
    paths: tuple[str, ...],
    destination: str,
    force: bool,
    links: bool,
    skip: bool,
    volume: int | None,
    member: str | None,
    size_source: str,
    allow: Sequence[str],
) -> None:
    """Copy files and whole folders out of a disk: each whole under its name, or not there.

    Into DEST when that is a folder, else under that name. Times and permissions are kept, zeros become holes; devices,
    and symbolic links without --links, are left out. Of NTFS also a stream, as FILE:STREAM.

    \b
    Examples:
      mullion vhd get files.vhd /etc/hostname .
      mullion vhd get files.vhd /etc copy-of-etc
    """
    wanted = targets(paths, destination, os.path.splitext(os.path.basename(disk))[0] or "disk")
    with (
        metered(face, "get", after="What was finished is there; nothing else is.") as progress,
        _opened(face, disk, volume, member, allow, size_source=size_source) as reader,
    ):
        done = [
            fetch(reader, path, target, force=force, links=links, skip=skip, progress=progress)
            for path, target in wanted
        ]
    show_fetched(face, wanted, done)


@contextlib.contextmanager
def _opened(
    face: Face, disk: str, volume: int | None, member: str | None, allow: Sequence[str], *, size_source: str
) -> Iterator[VolumeReader]:
    """The files of the volume that was meant."""
    from mullion.media.filesystems.reader import open_volume
    from mullion.media.filesystems.volumes import choose_volume, list_volumes
    from mullion.media.source import open_source
    from mullion.vhd.geometry import SizeFrom

    path, number = _split(disk, volume)
    folders, size_from = allowed_dirs(path, allow), SizeFrom(size_source)
    with open_source(path, allowed_dirs=folders, disk=member, size_from=size_from) as source:
        volumes, problems = list_volumes(source.device)
        for problem in problems:
            face.note(f"{path}: partition table: {problem}")
        chosen = choose_volume(path, volumes, number)
        with open_volume(source.device, chosen, path) as reader:
            yield reader
            for note in reader.notes:
                face.note(f"{path}: {note}")


def _split(disk: str, volume: int | None) -> tuple[str, int | None]:
    """`DISK:N`, unless there is a file of that whole name."""
    match = None if os.path.lexists(disk) else _NUMBERED.fullmatch(disk)
    if match is None:
        return disk, volume
    if volume is not None and volume != int(match[2]):
        raise InvalidError(f"{disk} and --volume {volume} are two volumes", remedy="Say one of them.")
    return match[1], int(match[2])


def _list_volumes(face: Face, disk: str, member: str | None, size_source: str, allow: Sequence[str]) -> None:
    from mullion.media.filesystems.volumes import list_volumes
    from mullion.media.source import open_source
    from mullion.vhd.geometry import SizeFrom

    path, _ = _split(disk, None)
    folders, size_from = allowed_dirs(path, allow), SizeFrom(size_source)
    with open_source(path, allowed_dirs=folders, disk=member, size_from=size_from) as source:
        volumes, problems = list_volumes(source.device)
    for problem in problems:
        face.note(f"{path}: partition table: {problem}")
    if face.is_json:
        face.emit_json([_volume_fields(volume) for volume in volumes])
        return
    rows = [
        (
            str(volume.number),
            volume.kind,
            volume.holds.title,
            volume.name or volume.holds.label or "-",
            format_size(volume.length),
            "yes" if volume.holds.kind else "no",
        )
        for volume in volumes
    ]
    face.say(table(("NUMBER", "TYPE", "HOLDS", "LABEL", "SIZE", "READABLE"), rows, right=(0, 4)))


def _volume_fields(volume: Volume) -> dict[str, object]:
    return {
        "number": volume.number,
        "type": volume.kind,
        "filesystem": volume.holds.title,
        "label": volume.name or volume.holds.label,
        "offset": volume.offset,
        "size_bytes": volume.length,
        "readable": volume.holds.kind is not None,
        "remedy": volume.holds.remedy,
    }
