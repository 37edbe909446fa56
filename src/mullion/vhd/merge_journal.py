"""The journal of a merge: what was begun, beside the disk at the top of the chain, until it is done.

The copying needs none, since it can be repeated whenever the layers are still in the chain. The journal says what a
chain that was already shortened cannot say: which files are left over, and which merge the next call has to finish.

File `.NAME.mullion-merge` (NAME: that of the top file): a line `mullion-merge 1 SHA256`, then JSON in UTF-8, of which
that is the digest:

    top       id of the top disk, hex
    into      {path, id} of the layer that is merged into
    layers    [{path, id, inode, file_bytes, mtime_ns}, ...] of the layers that are merged, top first
    keep      whether their files stay

Paths are relative to the journal's folder, so that a chain that is moved as a whole can be finished.

Invariants: a journal is at most 1 MiB and 1024 layers; one that is not exactly this is refused, and nothing is removed
because of it. It is believed as little as a disk: a file is removed on its word only when it is a VHD of that id which
nobody has touched since, in a folder where parents may lie.

Durability: written before the first change of a disk, whole or not at all; removed, after the last file, last.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Final

from mullion.vhd.errors import VhdDamagedError
from mullion.vhd.fileio import FileIO
from mullion.vhd.image import Image, open_file
from mullion.vhd.journal_fields import read_id, read_path
from mullion.vhd.parents import CHAIN_LIMIT, real_path
from mullion.vhd.publish import hidden_beside

JOURNAL_LIMIT: Final = 1 << 20

_MAGIC: Final = b"mullion-merge 1 "
_SUFFIX: Final = ".mullion-merge"


@dataclass(frozen=True, slots=True)
class Layer:
    """A file that is merged, as it was when the merge began."""

    path: str
    unique_id: bytes
    inode: int
    file_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, image: Image) -> Layer:
        status = os.fstat(image.fd)
        return cls(
            real_path(image.fd), image.footer.unique_id, status.st_ino, status.st_size, status.st_mtime_ns
        )  # fmt: skip

    def is_same(self, image: Image) -> bool:
        """Is that file the one that was merged, and unchanged since?"""
        now = Layer.of(image)
        return (now.unique_id, now.inode, now.file_bytes, now.mtime_ns) == (
            self.unique_id, self.inode, self.file_bytes, self.mtime_ns
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Journal:
    """A merge that was begun; paths are absolute."""

    top_id: bytes
    into_path: str
    into_id: bytes
    layers: tuple[Layer, ...]
    keep: bool


def journal_path(top_path: str) -> str:
    """Where the journal of a chain is: beside the file that the chain's top really is."""
    return hidden_beside(os.path.realpath(top_path), _SUFFIX)


def read_journal(path: str) -> Journal | None:
    """The journal of that path; None when there is none.

    Raises: VhdDamagedError when it cannot be believed; NotVhdError when it is not a regular file; OSError.
    """
    if not os.path.lexists(path):
        return None
    fd = open_file(path, follow=False)
    try:
        raw = os.pread(fd, JOURNAL_LIMIT + 1, 0)
    finally:
        os.close(fd)
    head, _, body = raw.partition(b"\n")
    if len(raw) > JOURNAL_LIMIT or head != _MAGIC + hashlib.sha256(body).hexdigest().encode():
        raise _refused(path, "its digest is not that of its content")
    try:
        return _decode(json.loads(body), os.path.dirname(path))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _refused(path, f"it lacks something: {error}") from error


def write_journal(path: str, journal: Journal, file_io: FileIO) -> None:
    """Write it, durable when this returns. Raises: OSError."""
    folder = os.path.dirname(path)

    def relative(target: str) -> str:
        return os.path.relpath(target, folder)

    fields = {
        "top": journal.top_id.hex(),
        "into": {"path": relative(journal.into_path), "id": journal.into_id.hex()},
        "layers": [
            {
                "path": relative(layer.path),
                "id": layer.unique_id.hex(),
                "inode": layer.inode,
                "file_bytes": layer.file_bytes,
                "mtime_ns": layer.mtime_ns,
            }
            for layer in journal.layers
        ],
        "keep": journal.keep,
    }
    body = json.dumps(fields, indent=1).encode()
    file_io.put_file(path, _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _decode(fields: object, folder: str) -> Journal:
    """Raises: ValueError, TypeError, KeyError."""
    if not isinstance(fields, dict) or not isinstance(fields["into"], dict) or not isinstance(fields["layers"], list):
        raise TypeError("no object")
    layers = fields["layers"]
    if not 0 < len(layers) < CHAIN_LIMIT:
        raise ValueError(f"{len(layers)} layers")
    return Journal(
        read_id(fields["top"]),
        read_path(fields["into"]["path"], folder),
        read_id(fields["into"]["id"]),
        tuple(
            Layer(
                read_path(layer["path"], folder),
                read_id(layer["id"]),
                _number(layer["inode"]),
                _number(layer["file_bytes"]),
                _number(layer["mtime_ns"]),
            )
            for layer in layers
        ),
        fields["keep"] is True,
    )


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError("a number is none")
    return value


def _refused(path: str, why: str) -> VhdDamagedError:
    return VhdDamagedError(
        f"{path}: this journal of a merge cannot be believed: {why}",
        path=path,
        structure="merge journal",
        remedy=f"Remove {path} and merge again: the layers that are in the chain still hold everything.",
    )
