"""How files inside disks look in print, and how they get onto this host: for `mullion vhd` and `mullion files`."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import click

from mullion.base.errors import InvalidError
from mullion.base.progress import Progress
from mullion.base.units import MIB, format_size, format_time
from mullion.cli.face import Face
from mullion.cli.tables import printable, table

if TYPE_CHECKING:
    from mullion.media.filesystems.entries import FileEntry, Piece
    from mullion.media.filesystems.extract import Extracted, TreeSource
    from mullion.model.views import FileVolumeView

_MARKS: Final = {"folder": "d", "link": "l", "file": "-", "other": "?"}
_SUFFIXES: Final = {"folder": "/", "link": "@"}


def show_list(face: Face, answer: Iterator[FileEntry], *, long: bool, recursive: bool) -> None:
    """Print a file, or what is in a folder: by name, or with everything below in the order of the disk."""
    first = next(answer)
    entries: Iterable[FileEntry] = [first]
    if first.type == "folder" and recursive:
        entries = answer
    elif first.type == "folder":
        entries = sorted(answer, key=lambda entry: entry.name)
    if face.is_json:
        _print_json(entries)
    else:
        _print_entries(face, entries, long=long, recursive=recursive)


def show_volumes(face: Face, views: Sequence[FileVolumeView]) -> None:
    """One line for each volume."""
    if face.is_json:
        face.emit_json(views)
        return
    rows = [
        (
            view.disk,
            str(view.number),
            view.type,
            view.filesystem,
            view.label or "-",
            format_size(view.size_bytes),
            "yes" if view.readable else "no",
        )
        for view in views
    ]
    face.say(table(("DISK", "NUMBER", "TYPE", "HOLDS", "LABEL", "SIZE", "READABLE"), rows, right=(1, 5)))


def show_content(answer: Iterable[Piece]) -> None:
    """Write a file's bytes to standard output, byte by byte as they are. Raises: what writing raises, explained."""
    from mullion.vhd.storage import storage_explained

    for item in answer:
        with storage_explained("standard output"):
            for part in _parts(item):
                sys.stdout.buffer.write(part)
    with storage_explained("standard output"):
        sys.stdout.buffer.flush()


def targets(paths: Sequence[str], destination: str, default: str) -> list[tuple[str, str]]:
    """What is fetched, and the name that it gets: in the destination, when that is a folder, else just that.

    `default` is what the root of a volume is called. Raises: InvalidError.
    """
    is_folder = os.path.isdir(destination)
    if len(paths) > 1 and not is_folder:
        raise InvalidError(f"{destination} is no folder", remedy="Several files go into a folder that exists.")
    return [
        (path, os.path.join(destination, _target_name(path, default)) if is_folder else destination) for path in paths
    ]


def fetch(
    source: TreeSource, path: str, target: str, *, force: bool, links: bool, skip: bool, progress: Progress
) -> Extracted:
    """Bring a file or a folder onto this host. Raises: as `media.filesystems.extract.extract`, explained."""
    from mullion.media.filesystems.extract import extract
    from mullion.vhd.storage import storage_explained

    with storage_explained(target):
        return extract(source, path, target, force=force, links=links, skip=skip, progress=progress)


def fetch_into(face: Face, source: TreeSource, path: str, destination: str, default: str, **how: bool) -> None:
    """Bring a file or a folder into a destination, and say so; `how` are the flags of `fetch`."""
    from mullion.cli.vhd.meter import metered

    wanted = targets([path], destination, default)
    with metered(face, "get", after="What was finished is there; nothing else is.") as progress:
        done = [fetch(source, one, target, **how, progress=progress) for one, target in wanted]
    show_fetched(face, wanted, done)


def show_fetched(face: Face, wanted: Sequence[tuple[str, str]], results: Sequence[Extracted]) -> None:
    """Say what was fetched and what was left out."""
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
                for (path, target), done in zip(wanted, results, strict=True)
            ]
        )
        return
    for (path, target), done in zip(wanted, results, strict=True):
        for text in done.left_out:
            face.note(f"left out: {text}")
        counted = f"{done.files} file{'s' if done.files != 1 else ''}, {format_size(done.content_bytes)}"
        face.note(f"{printable(path)} → {target}: {counted}")


def _parts(item: Piece) -> Iterator[bytes]:
    """The bytes of an answer's piece: a hole is as many zeros, in parts."""
    if isinstance(item, bytes):
        yield item
    elif isinstance(item, tuple):
        for start in range(0, item.length, MIB):
            yield bytes(min(MIB, item.length - start))


def _target_name(path: str, default: str) -> str:
    """What a path's last part is called on the host: never a way out of the folder."""
    name = path.rstrip("/").rpartition("/")[2]
    return default if name in ("", ".", "..") else name


def _print_entries(face: Face, entries: Iterable[FileEntry], *, long: bool, recursive: bool) -> None:
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


def _print_json(entries: Iterable[FileEntry]) -> None:
    """One list, written as it comes: it may be long."""
    from mullion.media.filesystems.entries import public_fields

    separator = "["
    for entry in entries:
        click.echo(f"{separator}\n  {json.dumps(public_fields(entry))}", nl=False)
        separator = ","
    click.echo("[]" if separator == "[" else "\n]")


def _harmless(text: str) -> str:
    """A name that is not UTF-8 can still be printed."""
    return text.encode("utf-8", "backslashreplace").decode()
