"""`mullion files`: files out of partitions and their checkpoints, by the service."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import click

from mullion.base.units import format_size
from mullion.cli import complete
from mullion.cli.face import Face, pass_face
from mullion.cli.file_views import fetch, show_content, show_fetched, show_list, targets
from mullion.cli.lazy import Group
from mullion.cli.tables import table

if TYPE_CHECKING:
    from mullion.client.transport import Body
    from mullion.media.filesystems.entries import FileEntry, Piece

_NOTES_HEADER: Final = "mullion-notes"
_Callback = TypeVar("_Callback", bound=Callable[..., object])


class Place(NamedTuple):
    """`PARTITION[@CHECKPOINT][:PATH]`."""

    partition: str
    checkpoint: str
    path: str


class PlaceType(click.ParamType[Place]):
    """Reads a place; neither partitions nor checkpoints have `@` or `:` in their names."""

    name = "place"

    def __init__(self, *, needs_path: bool) -> None:
        self._needs_path = needs_path

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        if isinstance(value, Place):
            return value
        head, colon, path = str(value).partition(":")
        partition, at, checkpoint = head.partition("@")
        if not partition or (at and not checkpoint):
            self.fail(f"{value!r} is not PARTITION[@CHECKPOINT]:/PATH", param, ctx)
        if self._needs_path and not (colon and path):
            self.fail(f"{value!r} names no path: write {head}:/PATH", param, ctx)
        return Place(partition, checkpoint, path or "/")


class _Choice(NamedTuple):
    """Which volume is meant, and of which instant."""

    disk: str | None
    volume: int | None
    consistent: bool


def _choice_options(command: _Callback) -> _Callback:
    """Which volume, and how the instant is taken."""
    disk = click.option("--disk", metavar="ID", help="The disk, where several have files.")
    volume = click.option(
        "--volume",
        type=click.IntRange(min=0, max=9999),
        metavar="N",
        help="The volume, where the disk has several; 0 is the whole disk.",
    )
    consistent = click.option(
        "--consistent", is_flag=True, help="Of now: freeze the guest's filesystems for that instant, by its agent."
    )
    return disk(volume(consistent(command)))


@click.group(cls=Group, short_help="List and fetch files inside partitions, running or not.")
def files() -> None:
    """List and fetch files inside partitions, running or not.

    PARTITION@CHECKPOINT is a checkpoint; PARTITION alone is what its disks hold at this instant, also while it runs:
    the guest needs no agent and notices nothing. NTFS, FAT, exFAT, ext2, ext3, ext4 and ISO 9660 are read.
    """


@files.command("ls")
@click.argument("place", metavar="PARTITION[@CHECKPOINT][:/PATH]", type=PlaceType(needs_path=False),
                shell_complete=complete.partitions)  # fmt: skip
@click.option("-l", "long", is_flag=True, help="With permissions, sizes and times.")
@click.option("-R", "recursive", is_flag=True, help="With everything below.")
@click.option("--volumes", "shows_volumes", is_flag=True, help="The volumes of the disks and what they hold.")
@_choice_options
@pass_face
def list_files(
    face: Face,
    *,
    place: Place,
    long: bool,
    recursive: bool,
    shows_volumes: bool,
    disk: str | None,
    volume: int | None,
    consistent: bool,
) -> None:
    """List the files inside a partition's disks, or their volumes.

    \b
    Examples:
      mullion files ls web:/etc
      mullion files ls -l web@before-upgrade:/var/log
      mullion files ls --volumes web
    """
    if shows_volumes:
        _list_volumes(face, place, disk, consistent=consistent)
        return
    source = _Source(face, place, _Choice(disk, volume, consistent))
    show_list(face, source.list(place.path, recursive=recursive), long=long, recursive=recursive)


@files.command("cat")
@click.argument("place", metavar="PARTITION[@CHECKPOINT]:/PATH", type=PlaceType(needs_path=True),
                shell_complete=complete.partitions)  # fmt: skip
@_choice_options
@pass_face
def print_file(face: Face, *, place: Place, disk: str | None, volume: int | None, consistent: bool) -> None:
    """Print a file inside a partition, byte by byte as it is; of NTFS also a stream, as FILE:STREAM.

    \b
    Examples:
      mullion files cat web:/etc/hostname
      mullion files cat web@before-upgrade:/etc/fstab
    """
    show_content(_Source(face, place, _Choice(disk, volume, consistent)).read(place.path))


@files.command("get")
@click.argument("place", metavar="PARTITION[@CHECKPOINT]:/PATH", type=PlaceType(needs_path=True),
                shell_complete=complete.partitions)  # fmt: skip
@click.argument("destination", type=click.Path(path_type=str), metavar="DEST")
@click.option("--force", is_flag=True, help="Take the place of existing files; folders are never replaced.")
@click.option("--links", is_flag=True, help="Make symbolic links; otherwise they are left out.")
@click.option("--skip", is_flag=True, help="Leave out what cannot be read, instead of making nothing.")
@_choice_options
@pass_face
def get_files(
    face: Face,
    *,
    place: Place,
    destination: str,
    force: bool,
    links: bool,
    skip: bool,
    disk: str | None,
    volume: int | None,
    consistent: bool,
) -> None:
    """Copy a file or a whole folder out of a partition: whole under its name, or not there.

    Into DEST when that is a folder, else under that name. Times and permissions are kept, zeros become holes; devices,
    and symbolic links without --links, are left out. Of NTFS also a stream, as FILE:STREAM.

    \b
    Examples:
      mullion files get web:/etc/hostname .
      mullion files get web@before-upgrade:/var/log copy-of-log
    """
    from mullion.cli.vhd.meter import metered

    wanted = targets([place.path], destination, place.partition)
    source = _Source(face, place, _Choice(disk, volume, consistent))
    with metered(face, "get", after="What was finished is there; nothing else is.") as progress:
        done = [
            fetch(source, path, target, force=force, links=links, skip=skip, progress=progress)
            for path, target in wanted
        ]
    show_fetched(face, wanted, done)


class _Source:
    """The files of a volume, as the service gives them."""

    def __init__(self, face: Face, place: Place, choice: _Choice) -> None:
        self._face = face
        self._place = place
        self._choice = choice

    def list(self, path: str, *, recursive: bool) -> Iterator[FileEntry]:
        from mullion.media.filesystems.entries import FileEntry

        body = self._face.client.file_list(
            self._place.partition, self._place.checkpoint, path, recursive=recursive, **self._choice._asdict()
        )
        return (piece for piece in self._pieces(body) if isinstance(piece, FileEntry))

    def read(self, path: str) -> Generator[Piece, None, None]:
        """A file: its entry, then its bytes."""
        return self._pieces(self._frames(path, only_file=True))

    def tree(self, path: str) -> Generator[Piece, None, None]:
        """A file or a folder with everything in it."""
        return self._pieces(self._frames(path, only_file=False))

    def _frames(self, path: str, *, only_file: bool) -> Body:
        return self._face.client.file_frames(
            self._place.partition, self._place.checkpoint, path, only_file=only_file, **self._choice._asdict()
        )

    def _pieces(self, body: Body) -> Generator[Piece, None, None]:
        from mullion.media.filesystems.frames import read_pieces

        with contextlib.closing(body):
            for note in json.loads(body.header(_NOTES_HEADER) or "[]"):
                self._face.note(str(note))
            yield from read_pieces(body.read_exactly)


def _list_volumes(face: Face, place: Place, disk: str | None, *, consistent: bool) -> None:
    views = face.client.file_volumes(place.partition, place.checkpoint, disk=disk, consistent=consistent)
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
