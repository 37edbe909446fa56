"""`mullion vhd ls`, `cat` and `get`: the files inside a disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import click

from mullion.base.errors import InvalidError
from mullion.base.units import MIB, format_size, format_time
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command
from mullion.cli.tables import printable, table
from mullion.cli.vhd.meter import metered
from mullion.cli.vhd.options import DISK, allow_option, allowed_dirs, disk_option, size_from_option

if TYPE_CHECKING:
    from mullion.media.filesystems.reader import FileEntry, Hole, VolumeReader
    from mullion.media.filesystems.volumes import Volume

_Command = TypeVar("_Command", bound=Callable[..., object])
_NUMBERED: Final = re.compile(r"(.+):(\d{1,4})")
_MARKS: Final = {"folder": "d", "link": "l", "file": "-", "other": "?"}
_SUFFIXES: Final = {"folder": "/", "link": "@"}


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
@click.option("-l", "long", is_flag=True, help="With permissions, sizes and times.")
@click.option("-R", "recursive", is_flag=True, help="With everything below.")
@click.option("--volumes", "shows_volumes", is_flag=True, help="The volumes of the disk and what they hold.")
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
        answer = reader.list(path, recursive=recursive)
        first = next(answer)
        entries = list(answer) if first.type == "folder" and not recursive else answer
        if first.type != "folder":
            entries = iter([first])
        elif isinstance(entries, list):
            entries.sort(key=lambda entry: entry.name)
        if face.is_json:
            _print_json(entries)
        else:
            _print_entries(face, entries, long=long, recursive=recursive)


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
    from mullion.vhd.storage import storage_explained

    with _opened(face, disk, volume, member, allow, size_source=size_source) as reader:
        for item in reader.read(path):
            with storage_explained("standard output"):
                for part in _parts(item):
                    sys.stdout.buffer.write(part)
        with storage_explained("standard output"):
            sys.stdout.buffer.flush()


@click.command("get", cls=Command, short_help="Copy files and folders out of a disk.")
@click.argument("disk", type=DISK)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.argument("destination", type=click.Path(path_type=str), metavar="DEST")
@click.option("--force", is_flag=True, help="Take the place of existing files; folders are never replaced.")
@click.option("--links", is_flag=True, help="Make symbolic links; otherwise they are left out.")
@click.option("--skip", is_flag=True, help="Leave out what cannot be read, instead of making nothing.")
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
    from mullion.media.filesystems.extract import extract
    from mullion.vhd.storage import storage_explained

    if len(paths) > 1 and not os.path.isdir(destination):
        raise InvalidError(f"{destination} is no folder", remedy="Several files go into a folder that exists.")
    results = []
    with (
        metered(face, "get", after="What was finished is there; nothing else is.") as progress,
        _opened(face, disk, volume, member, allow, size_source=size_source) as reader,
    ):
        for path in paths:
            target = os.path.join(destination, _target_name(disk, path)) if os.path.isdir(destination) else destination
            with storage_explained(target):
                done = extract(reader, path, target, force=force, links=links, skip=skip, progress=progress)
            results.append((path, target, done))
    for path, target, done in results:
        if face.is_json:
            continue
        for text in done.left_out:
            face.note(f"left out: {text}")
        counted = f"{done.files} file{'s' if done.files != 1 else ''}, {format_size(done.content_bytes)}"
        face.note(f"{printable(path)} → {target}: {counted}")
    if face.is_json:
        face.emit_json(
            [
                {
                    "path": path,
                    "target": target,
                    "files": done.files,
                    "folders": done.folders,
                    "links": done.links,
                    "content_bytes": done.content_bytes,
                    "left_out": done.left_out,
                }
                for path, target, done in results
            ]
        )


def _parts(item: FileEntry | bytes | Hole) -> Iterator[bytes]:
    """The bytes of an answer's piece: a hole is as many zeros, in parts."""
    if isinstance(item, bytes):
        yield item
    elif isinstance(item, tuple):
        for start in range(0, item.length, MIB):
            yield bytes(min(MIB, item.length - start))


def _target_name(disk: str, path: str) -> str:
    """What a path's last part is called on the host: never a way out of the folder."""
    name = path.rstrip("/").rpartition("/")[2]
    if name in ("", ".", ".."):
        name = os.path.splitext(os.path.basename(disk))[0] or "disk"
    return name


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
        if chosen.holds.warning:
            face.note(f"{path}: {chosen.holds.title}: {chosen.holds.warning}")
        with open_volume(source.device, chosen, path) as reader:
            yield reader


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


def _print_entries(face: Face, entries: Iterator[FileEntry] | list[FileEntry], *, long: bool, recursive: bool) -> None:
    rows = []
    for entry in entries:
        name = printable((entry.path if recursive and entry.path else entry.name) or "/")
        if not long:
            face.say(_harmless(f"{name}{_SUFFIXES.get(entry.type, '')}"))
            continue
        if entry.target is not None:
            name += f" -> {printable(entry.target)}"
        row = (
            _MARKS[entry.type] + stat.filemode(entry.mode)[1:],
            str(entry.size_bytes),
            format_time(entry.modified_ns)[:19].replace("T", " ") if entry.modified_ns is not None else "-",
            _harmless(name),
        )
        if recursive:  # may be millions: not kept until the end
            face.say(f"{row[0]}  {row[1]:>14}  {row[2]:<19}  {row[3]}")
        else:
            rows.append(row)
            rows += [(*row[:1], str(size), row[2], _harmless(f"{name}:{stream}")) for stream, size in entry.streams]
    if rows:
        face.say(table(("MODE", "SIZE", "MODIFIED (UTC)", "NAME"), rows, right=(1,)))


def _print_json(entries: Iterator[FileEntry] | list[FileEntry]) -> None:
    """One list, written as it comes: it may be long."""
    separator = "["
    for entry in entries:
        fields = {
            "path": entry.path or entry.name,
            "name": entry.name,
            "type": entry.type,
            "size_bytes": entry.size_bytes,
            "modified": None if entry.modified_ns is None else format_time(entry.modified_ns),
            "created": None if entry.created_ns is None else format_time(entry.created_ns),
            "accessed": None if entry.accessed_ns is None else format_time(entry.accessed_ns),
            "mode": f"{entry.mode:04o}",
            "target": entry.target,
            "streams": [{"name": name, "size_bytes": size} for name, size in entry.streams],
            "unreadable": entry.unreadable,
        }
        click.echo(f"{separator}\n  {json.dumps(fields)}", nl=False)
        separator = ","
    click.echo("[]" if separator == "[" else "\n]")


def _harmless(text: str) -> str:
    """A name that is not UTF-8 can still be printed."""
    return text.encode("utf-8", "backslashreplace").decode()
