"""REST of files inside disks: `/1.0/partitions/NAME/files`.

    files/volumes   the volumes of all disks                                           JSON
    files/list      what is at a path, then what is in it: one object a line           application/x-ndjson
    files/content   a file, byte by byte                                               application/octet-stream
    files/tree      a file or a folder with everything in it, holes and all            application/vnd.mullion.files

Those of a backup are at `/1.0/backups/ID/files/…`: `volumes`, and as frames `list`, `file` and `tree`.

All are of a checkpoint (`checkpoint=NAME`) or of the partition as it is at this instant. What fails before the first
byte is an error with its status; what fails later ends a list with `{"error": …}`, a tree with its frame of an error
(`media.confined.channel` has the frames), and the connection of a content before its end. The header `mullion-notes`
says, as JSON, what people should know of the filesystem.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Final, Literal

import msgspec
from litestar import get
from litestar.params import PathParameter, QueryParameter
from litestar.response import Stream

from mullion.base.errors import MullionError
from mullion.base.units import MIB
from mullion.media.confined import channel
from mullion.media.files_worker import BackupSource
from mullion.media.filesystems.entries import public_fields, unpack_entry
from mullion.model.views import FileVolumeView
from mullion.parent.api import PathName, Service
from mullion.services.backup.controller import BackupController
from mullion.services.files.controller import FilesAnswer, FilesController, FilesRequest

FRAMES_TYPE: Final = "application/vnd.mullion.files"
NOTES_HEADER: Final = "mullion-notes"
_TAGS: Final = ["files"]
_BATCH_BYTES: Final = 64 << 10

_Path = Annotated[str, QueryParameter(description="the path from the root of the volume", max_length=32_768)]
_Checkpoint = Annotated[str, QueryParameter(description="a checkpoint's name or id; without: now", max_length=64)]
_Disk = Annotated[str | None, QueryParameter(description="the disk's id, where there are several", max_length=64)]
_Volume = Annotated[int | None, QueryParameter(ge=0, le=9999, description="the volume's number; 0 is the whole disk")]
_Backup = Annotated[str, PathParameter(description="a backup's id, or its beginning", max_length=64)]
_What = Annotated[Literal["list", "file", "tree"], PathParameter(description="what of the files is wanted")]
_Repository = Annotated[str | None, QueryParameter(description="a repository; not needed when only one is known")]
_Consistent = Annotated[bool, QueryParameter(description="freeze the guest's filesystems for that instant")]


@get("/1.0/partitions/{name:str}/files/volumes", tags=_TAGS)
async def list_volumes(
    files: Service[FilesController],
    name: PathName,
    *,
    checkpoint: _Checkpoint = "",
    disk: _Disk = None,
    consistent: _Consistent = False,
) -> list[FileVolumeView]:
    """The volumes of a partition's disks and what they hold."""
    request = FilesRequest(name, checkpoint, "volumes", disk=disk, consistent=consistent)
    return list(await files.volumes(request))


@get("/1.0/partitions/{name:str}/files/list", tags=_TAGS)
async def list_files(
    files: Service[FilesController],
    name: PathName,
    *,
    path: _Path = "/",
    checkpoint: _Checkpoint = "",
    disk: _Disk = None,
    volume: _Volume = None,
    recursive: bool = False,
    consistent: _Consistent = False,
    form: Literal["lines", "frames"] = "lines",
) -> Stream:
    """What is at a path and, when that is a folder, in it: one JSON object a line, or frames."""
    answer = await files.begin(
        FilesRequest(name, checkpoint, "list", path, disk, volume, recursive, consistent=consistent)
    )
    if form == "frames":
        return _stream(answer, _frames(answer), FRAMES_TYPE)
    return _stream(answer, _lines(answer), "application/x-ndjson")


@get("/1.0/partitions/{name:str}/files/content", tags=_TAGS)
async def read_file(
    files: Service[FilesController],
    name: PathName,
    *,
    path: _Path,
    checkpoint: _Checkpoint = "",
    disk: _Disk = None,
    volume: _Volume = None,
    consistent: _Consistent = False,
) -> Stream:
    """A file's bytes; of NTFS also a stream's, as `FILE:STREAM`."""
    answer = await files.begin(FilesRequest(name, checkpoint, "read", path, disk, volume, consistent=consistent))
    return _stream(answer, _content(answer), "application/octet-stream")


@get("/1.0/partitions/{name:str}/files/tree", tags=_TAGS)
async def read_tree(
    files: Service[FilesController],
    name: PathName,
    *,
    path: _Path,
    checkpoint: _Checkpoint = "",
    disk: _Disk = None,
    volume: _Volume = None,
    consistent: _Consistent = False,
    only: Literal["file", "any"] = "any",
) -> Stream:
    """A file, or a folder with everything in it, as frames; with `only=file` a folder is refused."""
    operation = "read" if only == "file" else "tree"
    answer = await files.begin(FilesRequest(name, checkpoint, operation, path, disk, volume, consistent=consistent))
    return _stream(answer, _frames(answer), FRAMES_TYPE)


@get("/1.0/backups/{backup:str}/files/volumes", tags=_TAGS)
async def list_backup_volumes(
    files: Service[FilesController],
    backups: Service[BackupController],
    backup: _Backup,
    repository: _Repository = None,
    disk: _Disk = None,
) -> list[FileVolumeView]:
    """The volumes of a backup's disks and what they hold."""
    source = BackupSource(*backups.repositories.source(repository), backup)
    return list(await files.volumes(FilesRequest(backup, "", "volumes", disk=disk, backup=source)))


@get("/1.0/backups/{backup:str}/files/{what:str}", tags=_TAGS)
async def read_backup(
    files: Service[FilesController],
    backups: Service[BackupController],
    backup: _Backup,
    what: _What,
    *,
    repository: _Repository = None,
    path: _Path = "/",
    disk: _Disk = None,
    volume: _Volume = None,
    recursive: bool = False,
) -> Stream:
    """Files of a backup: what is at a path (`list`), a `file`, or a file or folder with everything in it (`tree`)."""
    source = BackupSource(*backups.repositories.source(repository), backup)
    operation = "read" if what == "file" else what
    answer = await files.begin(FilesRequest(backup, "", operation, path, disk, volume, recursive, backup=source))
    return _stream(answer, _frames(answer), FRAMES_TYPE)


ROUTES: Final = (list_volumes, list_files, read_file, read_tree, list_backup_volumes, read_backup)


def _stream(answer: FilesAnswer, content: AsyncIterator[bytes], media_type: str) -> Stream:
    headers = {NOTES_HEADER: json.dumps(answer.notes)} if answer.notes else {}
    return Stream(content, media_type=media_type, headers=headers)


async def _frames(answer: FilesAnswer) -> AsyncIterator[bytes]:
    """The frames as they are, small ones together."""
    waiting = bytearray()
    async for kind, payload in answer.frames():
        waiting += channel.HEAD.pack(kind, len(payload))
        is_large = len(payload) >= _BATCH_BYTES
        if not is_large:
            waiting += payload
        if is_large or len(waiting) >= _BATCH_BYTES:
            yield bytes(waiting)
            waiting.clear()
        if is_large:
            yield payload  # as it came, without a copy
    yield bytes(waiting)


async def _lines(answer: FilesAnswer) -> AsyncIterator[bytes]:
    waiting = bytearray()
    async for kind, payload in answer.frames():
        if kind == channel.ENTRY:
            waiting += json.dumps(public_fields(unpack_entry(payload))).encode() + b"\n"
        elif kind == channel.END and payload:
            waiting += b'{"error": ' + payload + b"}\n"
        if len(waiting) >= _BATCH_BYTES:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)


async def _content(answer: FilesAnswer) -> AsyncIterator[bytes]:
    """Raises: what ended the reading before its end."""
    async for kind, payload in answer.frames():
        if kind == channel.CONTENT:
            yield payload
        elif kind == channel.HOLE:
            (left,) = channel.HOLE_BYTES.unpack(payload)
            while left:
                yield bytes(min(left, MIB))
                left -= min(left, MIB)
        elif kind == channel.END and payload:
            raise MullionError.from_wire(msgspec.json.decode(payload, type=dict[str, object]))
