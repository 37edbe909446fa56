"""Files inside disks, as the service streams them: of partitions, checkpoints and backups."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import click

if TYPE_CHECKING:
    from mullion.cli.face import Face
    from mullion.client.transport import Body
    from mullion.media.filesystems.entries import FileEntry, Piece

_FORCE_HELP: Final = "Take the place of existing files; folders are never replaced."
_NOTES_HEADER: Final = "mullion-notes"
_Command = TypeVar("_Command", bound=Callable[..., object])


def volume_options(command: _Command) -> _Command:
    """Which volume of which disk."""
    disk = click.option("--disk", metavar="ID", help="The disk, where several have files.")
    volume = click.option(
        "--volume",
        type=click.IntRange(min=0, max=9999),
        metavar="N",
        help="The volume, where several besides the EFI system partition have files; 0 is the whole disk.",
    )
    return disk(volume(command))


def list_options(command: _Command) -> _Command:
    """How a list looks, of files in a disk of any kind."""
    long = click.option("-l", "long", is_flag=True, help="With permissions, sizes and times.")
    recursive = click.option("-R", "recursive", is_flag=True, help="With everything below.")
    volumes = click.option(
        "--volumes", "shows_volumes", is_flag=True, help="The volumes of the disks and what they hold."
    )
    return long(recursive(volumes(command)))


def get_options(command: _Command) -> _Command:
    """How files are copied out, of a disk of any kind."""
    force = click.option("--force", is_flag=True, help=_FORCE_HELP)
    links = click.option("--links", is_flag=True, help="Make symbolic links; otherwise they are left out.")
    skip = click.option("--skip", is_flag=True, help="Leave out what cannot be read, instead of making nothing.")
    return force(links(skip(command)))


class Ask(Protocol):
    """Asks the service for the `list` of what is at a path, for a `file`, or for the `tree` from there on."""

    def __call__(self, what: str, path: str, *, recursive: bool = False) -> Body: ...


class FileSource:
    """The files of a volume."""

    def __init__(self, face: Face, ask: Ask) -> None:
        self._face = face
        self._ask = ask

    def list(self, path: str, *, recursive: bool) -> Iterator[FileEntry]:
        from mullion.media.filesystems.entries import FileEntry

        return (
            piece
            for piece in self._pieces(self._ask("list", path, recursive=recursive))
            if isinstance(piece, FileEntry)
        )

    def read(self, path: str) -> Generator[Piece, None, None]:
        """A file: its entry, then its bytes."""
        return self._pieces(self._ask("file", path))

    def tree(self, path: str) -> Generator[Piece, None, None]:
        """A file or a folder with everything in it."""
        return self._pieces(self._ask("tree", path))

    def _pieces(self, body: Body) -> Generator[Piece, None, None]:
        from mullion.media.filesystems.frames import read_pieces

        with contextlib.closing(body):
            for note in json.loads(body.header(_NOTES_HEADER) or "[]"):
                self._face.note(str(note))
            yield from read_pieces(body.read_exactly)
