"""`mullion files`: files out of partitions and their checkpoints, by the service."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click

from mullion.cli import complete
from mullion.cli.face import Face, pass_face
from mullion.cli.file_source import FileSource, get_options, list_options, volume_options
from mullion.cli.file_views import fetch_into, show_content, show_list, show_volumes
from mullion.cli.lazy import Group

if TYPE_CHECKING:
    from mullion.client.transport import Body

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
    consistent = click.option(
        "--consistent", is_flag=True, help="Of now: freeze the guest's filesystems for that instant, by its agent."
    )
    return volume_options(consistent(command))


@click.group(cls=Group, short_help="List and fetch files inside partitions, running or not.")
def files() -> None:
    """List and fetch files inside partitions, running or not.

    PARTITION@CHECKPOINT is a checkpoint; PARTITION alone is what its disks hold at this instant, also while it runs:
    the guest needs no agent and notices nothing. NTFS, FAT, exFAT, ext2, ext3, ext4 and ISO 9660 are read.
    """


@files.command("ls")
@click.argument("place", metavar="PARTITION[@CHECKPOINT][:/PATH]", type=PlaceType(needs_path=False),
                shell_complete=complete.partitions)  # fmt: skip
@list_options
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
        views = face.client.file_volumes(place.partition, place.checkpoint, disk=disk, consistent=consistent)
        show_volumes(face, views)
        return
    source = _source(face, place, _Choice(disk, volume, consistent))
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
    show_content(_source(face, place, _Choice(disk, volume, consistent)).read(place.path))


@files.command("get")
@click.argument("place", metavar="PARTITION[@CHECKPOINT]:/PATH", type=PlaceType(needs_path=True),
                shell_complete=complete.partitions)  # fmt: skip
@click.argument("destination", type=click.Path(path_type=str), metavar="DEST")
@get_options
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
    source = _source(face, place, _Choice(disk, volume, consistent))
    fetch_into(face, source, place.path, destination, place.partition, force=force, links=links, skip=skip)


def _source(face: Face, place: Place, choice: _Choice) -> FileSource:
    """The files of a volume, as the service gives them."""

    def body(what: str, path: str, *, recursive: bool = False) -> Body:
        return face.client.partition_files(
            place.partition, what, checkpoint=place.checkpoint, path=path, recursive=recursive, **choice._asdict()
        )

    return FileSource(face, body)
