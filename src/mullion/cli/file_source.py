"""Files inside disks, as the service streams them: of partitions, checkpoints and backups."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Final, TypeVar

import click

if TYPE_CHECKING:
    from mullion.cli.face import Face
    from mullion.client.transport import Body
    from mullion.media.filesystems.entries import FileEntry, Piece

_NOTES_HEADER: Final = "mullion-notes"
_Command = TypeVar("_Command", bound=Callable[..., object])


def volume_options(command: _Command) -> _Command:
    """Which volume of which disk."""
    disk = click.option("--disk", metavar="ID", help="The disk, where several have files.")
    volume = click.option(
        "--volume",
        type=click.IntRange(min=0, max=9999),
        metavar="N",
        help="The volume, where the disk has several; 0 is the whole disk.",
    )
    return disk(volume(command))


class FileSource:
    """The files of a volume.

    `list_body` asks for what is at a path (and below: the flag), `content_body` for a file or, without the flag, for
    whatever is there.
    """

    def __init__(
        self, face: Face, list_body: Callable[[str, bool], Body], content_body: Callable[[str, bool], Body]
    ) -> None:
        self._face = face
        self._list_body = list_body
        self._content_body = content_body

    def list(self, path: str, *, recursive: bool) -> Iterator[FileEntry]:
        from mullion.media.filesystems.entries import FileEntry

        return (piece for piece in self._pieces(self._list_body(path, recursive)) if isinstance(piece, FileEntry))

    def read(self, path: str) -> Generator[Piece, None, None]:
        """A file: its entry, then its bytes."""
        return self._pieces(self._content_body(path, True))

    def tree(self, path: str) -> Generator[Piece, None, None]:
        """A file or a folder with everything in it."""
        return self._pieces(self._content_body(path, False))

    def _pieces(self, body: Body) -> Generator[Piece, None, None]:
        from mullion.media.filesystems.frames import read_pieces

        with contextlib.closing(body):
            for note in json.loads(body.header(_NOTES_HEADER) or "[]"):
                self._face.note(str(note))
            yield from read_pieces(body.read_exactly)
