"""`mullion backup ls`, `cat` and `get`: files out of backups, by the service."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click

from mullion.cli.backup_options import repository_option
from mullion.cli.face import Face, pass_face
from mullion.cli.file_source import FileSource, get_options, list_options, volume_options
from mullion.cli.file_views import fetch_into, show_content, show_list, show_volumes
from mullion.cli.lazy import Command

if TYPE_CHECKING:
    from mullion.client.transport import Body

_Callback = TypeVar("_Callback", bound=Callable[..., object])


class BackupPlace(NamedTuple):
    """`BACKUP[:PATH]`."""

    backup: str
    path: str


class _PlaceType(click.ParamType[BackupPlace]):
    """Reads a place; backups have no `:` in their ids."""

    name = "place"

    def __init__(self, *, needs_path: bool) -> None:
        self._needs_path = needs_path

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> BackupPlace:
        if isinstance(value, BackupPlace):
            return value
        backup, _, path = str(value).partition(":")
        if not backup or (self._needs_path and not path):
            self.fail(f"{value!r} is not BACKUP:/PATH", param, ctx)
        return BackupPlace(backup, path or "/")


def _options(command: _Callback) -> _Callback:
    """Which volume of which repository."""
    return repository_option(volume_options(command))


def _source(face: Face, backup: str, repository: str | None, disk: str | None, volume: int | None) -> FileSource:
    def body(what: str, path: str, *, recursive: bool = False) -> Body:
        return face.client.backup_files(
            backup, what, repository=repository, path=path, disk=disk, volume=volume, recursive=recursive
        )

    return FileSource(face, body)


@click.command("ls", cls=Command)
@click.argument("place", metavar="BACKUP[:/PATH]", type=_PlaceType(needs_path=False))
@list_options
@_options
@pass_face
def list_files(
    face: Face,
    place: BackupPlace,
    *,
    long: bool,
    recursive: bool,
    shows_volumes: bool,
    repository: str | None,
    disk: str | None,
    volume: int | None,
) -> None:
    """List the files inside a backup, or its volumes.

    \b
    Examples:
      mullion backup ls -l 4f2a91c0:/etc
      mullion backup ls --volumes 4f2a91c0
    """
    if shows_volumes:
        show_volumes(face, face.client.backup_volumes(place.backup, repository=repository, disk=disk))
        return
    source = _source(face, place.backup, repository, disk, volume)
    show_list(face, source.list(place.path, recursive=recursive), long=long, recursive=recursive)


@click.command("cat", cls=Command)
@click.argument("place", metavar="BACKUP:/PATH", type=_PlaceType(needs_path=True))
@_options
@pass_face
def print_file(face: Face, place: BackupPlace, *, repository: str | None, disk: str | None, volume: int | None) -> None:
    """Print a file inside a backup, byte by byte as it is.

    \b
    Examples:
      mullion backup cat 4f2a91c0:/etc/fstab
    """
    show_content(_source(face, place.backup, repository, disk, volume).read(place.path))


@click.command("get", cls=Command)
@click.argument("place", metavar="BACKUP:/PATH", type=_PlaceType(needs_path=True))
@click.argument("destination", type=click.Path(path_type=str), metavar="DEST")
@get_options
@_options
@pass_face
def get_files(
    face: Face,
    place: BackupPlace,
    destination: str,
    *,
    force: bool,
    links: bool,
    skip: bool,
    repository: str | None,
    disk: str | None,
    volume: int | None,
) -> None:
    """Copy a file or a whole folder out of a backup: whole under its name, or not there.

    As `mullion files get` does it from partitions.

    \b
    Examples:
      mullion backup get 4f2a91c0:/var/log copy-of-log
    """
    source = _source(face, place.backup, repository, disk, volume)
    fetch_into(face, source, place.path, destination, place.backup, force=force, links=links, skip=skip)
