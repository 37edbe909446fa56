"""The confined process that reads a filesystem with The Sleuth Kit: one for each volume, started by `VolumeReader`.

It shuts itself in (`jail.confine`) before it sees the first byte of the disk, and sees the disk only through `channel`.
Whatever the library does with hostile bytes, it can do here: there is nothing to reach.

Never shown: deleted names, the library's own virtual entries, the metadata files of NTFS.
"""

from __future__ import annotations

import bisect
import codecs
import json
import os
import struct
import sys
from collections.abc import Iterator
from typing import Any, Final

import pytsk3

from mullion.base.units import MIB
from mullion.media.confined import channel, jail, journal
from mullion.media.confined.places import (
    DATA_ATTRIBUTE,
    Extent,
    StoredRange,
    exfat_written_bytes,
    find_plain_end,
    stored_ranges,
)

DEPTH_LIMIT: Final = 256
ENTRY_LIMIT: Final = 5_000_000
FILE_LIMIT_BYTES: Final = 1 << 44
LIMITS: Final = jail.Limits(memory_bytes=1024 * MIB, cpu_s=600, file_bytes=0, descriptors=16)
_PIECE_BYTES: Final = MIB
_TYPES: Final = {
    "ntfs": pytsk3.TSK_FS_TYPE_NTFS,
    "fat": pytsk3.TSK_FS_TYPE_FAT_DETECT,
    "exfat": pytsk3.TSK_FS_TYPE_EXFAT,
    "ext": pytsk3.TSK_FS_TYPE_EXT_DETECT,
    "iso": pytsk3.TSK_FS_TYPE_ISO9660,
}
_IGNORES_CASE: Final = ("ntfs", "fat", "exfat", "iso")
_NTFS_FIRST_USER_INODE: Final = 24
_NTFS_ROOT_INODE: Final = 5
_EXFAT_TABLES: Final = (b"$ALLOC_BITMAP", b"$UPCASE_TABLE", b"$VOLUME_GUID", b"$TEX_FAT", b"$ACT")
_EXT_SUPERBLOCK: Final = 1024
_EXT_RECOVER: Final = 0x4
_LABEL_SUFFIX: Final = b" (Volume Label Entry)"

_REPARSE_ATTRIBUTE: Final = 0xC0
_SYMLINK_TAG: Final = 0xA000000C
_MOUNT_POINT_TAG: Final = 0xA0000003
_REPARSE_NAMES: Final = {
    0x80000017: "it is compressed by Windows (compact /exe)",
    0x80000013: "it is deduplicated by Windows",
}
_ENCRYPTED_FLAG: Final = int(pytsk3.TSK_FS_ATTR_ENC)


Entry = dict[str, Any]


class RefusedError(Exception):
    """A request that cannot be answered: code for the other side, and why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Image(pytsk3.Img_Info):  # type: ignore[misc]
    """The volume as the library sees it: bytes that the other side reads for us."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self._size_bytes = size_bytes
        super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

    def close(self) -> None:
        """The descriptor is not ours to close."""

    def get_size(self) -> int:
        return self._size_bytes

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        while size > 0:
            count = min(size, channel.READ_LIMIT_BYTES)
            channel.send(self._fd, channel.WANT, channel.READ.pack(offset, count))
            kind, length = channel.HEAD.unpack(channel.receive_exactly(self._fd, channel.HEAD.size))
            if kind != channel.DATA:
                os._exit(2)
            part = channel.receive_exactly(self._fd, length)
            parts.append(part)
            if length < count:
                break
            offset, size = offset + count, size - count
        return b"".join(parts)


class _Replayed(_Image):
    """The volume as it is once the journal has been replayed; nothing is written."""

    def __init__(self, fd: int, size_bytes: int, log: journal.Journal, newer: dict[int, journal.Place]) -> None:
        self._log = log
        self._newer = newer
        self._newer_blocks = sorted(newer)
        super().__init__(fd, size_bytes)

    def is_newer(self, offset: int, length: int) -> bool:
        """Whether any byte of a range is in the journal."""
        width = self._log.block_bytes
        after = bisect.bisect_left(self._newer_blocks, offset // width)
        return after < len(self._newer_blocks) and self._newer_blocks[after] * width < offset + length

    def read(self, offset: int, size: int) -> bytes:
        raw = super().read(offset, size)
        width = self._log.block_bytes
        blocks = range(offset // width, -(-(offset + len(raw)) // width))
        touched = [block for block in blocks if block in self._newer]
        if not touched:
            return raw
        whole = bytearray(raw)
        for block in touched:
            new = journal.content(self._log, self._newer[block])
            start = block * width - offset
            new = new[max(0, -start) : len(whole) - start]
            whole[max(0, start) : max(0, start) + len(new)] = new
        return bytes(whole)


class Filesystem:
    """A filesystem that the library opened, seen through paths of `/` and names."""

    def __init__(self, fd: int, size_bytes: int, kind: str) -> None:
        self._kind = kind
        self._count = 0
        self.note = ""
        """What people should know of what they see."""
        self._size_bytes = size_bytes
        self._image = image = _Image(fd, size_bytes)
        self._replayed: _Replayed | None = None
        self._fs = pytsk3.FS_Info(image, offset=0, type=_TYPES[kind])
        if kind == "ext":
            try:
                replayed = _replay(fd, size_bytes, self._fs, image)
            except (journal.JournalError, OSError, struct.error) as error:
                why = str(error).splitlines()[0][:200]
                self.note = (
                    f"it was not unmounted, and its journal cannot be replayed ({why}): what is in it is missing"
                )
                return
            if replayed is not None:
                self._replayed = replayed
                self._fs = pytsk3.FS_Info(replayed, offset=0, type=_TYPES[kind])

    def find(self, path: str) -> tuple[Any, Entry]:
        """The file at a path, and what there is to say about it."""
        file = self._fs.open_meta(inode=self._fs.info.root_inum)
        entry = self._describe(file, "")
        walked = ""
        for name in [part for part in path.split("/") if part not in ("", ".")]:
            walked += f"/{name}"
            if name == "..":
                raise RefusedError("invalid", f"{path}: a path inside a disk has no '..'")
            if entry["type"] != "folder":
                raise RefusedError("not-found", f"there is no {walked}: what is before it is no folder")
            found = self._lookup(file, name)
            if found is None:
                raise RefusedError("not-found", f"there is no {walked}")
            file, entry = found
        return file, entry

    def _lookup(self, folder: Any, name: str) -> tuple[Any, Entry] | None:
        """The entry of that name; where the filesystem ignores case, one that differs in case only is second best."""
        wanted, second = os.fsencode(name), None
        for file, raw in self._names(folder):
            if raw == wanted:
                return file, self._describe(file, name)
            if second is None and self._kind in _IGNORES_CASE and os.fsdecode(raw).casefold() == name.casefold():
                second = file, os.fsdecode(raw)
        return None if second is None else (second[0], self._describe(*second))

    def _names(self, folder: Any) -> Iterator[tuple[Any, bytes]]:
        """The files of a folder that are there and not deleted, with their names."""
        is_root = folder.info.meta.addr == self._fs.info.root_inum
        for file in folder.as_directory():
            info = file.info.name
            if info is None or info.name is None or int(info.flags) & int(pytsk3.TSK_FS_NAME_FLAG_UNALLOC):
                continue
            name, meta = bytes(info.name), file.info.meta
            if name in (b"", b".", b"..") or meta is None or int(meta.flags) & int(pytsk3.TSK_FS_META_FLAG_UNALLOC):
                continue
            if meta.type in (pytsk3.TSK_FS_META_TYPE_VIRT, pytsk3.TSK_FS_META_TYPE_VIRT_DIR):
                continue
            if self._kind == "ntfs" and is_root and meta.addr < _NTFS_FIRST_USER_INODE:
                continue
            if self._kind in ("fat", "exfat") and is_root and (name.endswith(_LABEL_SUFFIX) or name in _EXFAT_TABLES):
                continue
            self._count += 1
            if self._count > ENTRY_LIMIT:
                raise RefusedError("filesystem", f"more than {ENTRY_LIMIT} entries")
            yield file, name

    def _describe(self, file: Any, name: str) -> Entry:
        meta = file.info.meta
        kinds = {
            pytsk3.TSK_FS_META_TYPE_REG: "file",
            pytsk3.TSK_FS_META_TYPE_DIR: "folder",
            pytsk3.TSK_FS_META_TYPE_LNK: "link",
        }
        entry: Entry = {
            "name": name,
            "type": kinds.get(meta.type, "other"),
            "size_bytes": int(meta.size),
            "mode": int(meta.mode) & 0o7777,
            "inode": int(meta.addr),
            "target": os.fsdecode(bytes(meta.link)) if getattr(meta, "link", None) else None,
            "streams": [],
            "unreadable": None,
        }
        for field, of_library in (
            ("modified", "mtime"),
            ("accessed", "atime"),
            ("changed", "ctime"),
            ("created", "crtime"),
        ):
            seconds, rest_ns = getattr(meta, of_library, 0), getattr(meta, f"{of_library}_nano", 0)
            entry[f"{field}_ns"] = int(seconds) * 1_000_000_000 + int(rest_ns) if seconds else None
        if self._kind == "iso":  # the library keeps the one time of a record as that of its creation
            entry["modified_ns"] = entry["modified_ns"] or entry["created_ns"]
        if self._kind == "ntfs":
            _describe_ntfs(file, entry)
        return entry

    def walk(self, path: str, *, recursive: bool) -> Iterator[tuple[str, Any, Entry]]:
        """What is at a path and, when that is a folder, in it: (path below it, file, entry); folders before content."""
        file, entry = self.find(path)
        yield "", file, entry
        if entry["type"] == "folder":
            yield from self._below(file, "", {entry["inode"]}, recursive=recursive)

    def _below(self, folder: Any, prefix: str, seen: set[int], *, recursive: bool) -> Iterator[tuple[str, Any, Entry]]:
        waiting = [(folder, prefix, 0)]
        while waiting:
            parent, above, depth = waiting.pop()
            inner = []
            for file, raw in self._names(parent):
                entry = self._describe(file, os.fsdecode(raw))
                below = f"{above}{entry['name']}"
                if recursive and entry["type"] == "folder":
                    if entry["inode"] in seen:
                        entry["unreadable"] = "it was shown already: folders that contain each other are damage"
                    elif depth >= DEPTH_LIMIT:
                        entry["unreadable"] = f"folders deeper than {DEPTH_LIMIT} are not followed"
                    else:
                        seen.add(entry["inode"])
                        inner.append((file, f"{below}/", depth + 1))
                yield below, file, entry
            waiting += reversed(inner)

    def content(self, file: Any, entry: Entry, stream: str | None) -> Iterator[bytes | int | Extent]:
        """A file's bytes, or those of one of its streams; a number is the length of a hole."""
        if entry["unreadable"]:
            raise RefusedError("filesystem", f"{entry['name']}: {entry['unreadable']}")
        attribute: tuple[int, ...] = ()
        size = entry["size_bytes"]
        if stream is not None:
            size, attribute = _find_stream(file, entry["name"], stream)
        elif entry["type"] != "file":
            what = {"folder": "a folder", "link": "a link"}.get(entry["type"], "a device, a socket or a pipe")
            raise RefusedError("invalid", f"{entry['name'] or '/'} is {what}, not a file")
        if size > FILE_LIMIT_BYTES:
            raise RefusedError("filesystem", f"{entry['name']}: {size} bytes are more than any file can have here")
        at = 0
        block_bytes = int(self._fs.info.block_size)
        ranges = stored_ranges(file, attribute, size, block_bytes)
        if self._kind == "exfat":
            written = exfat_written_bytes(self._image.read, entry["inode"], block_bytes, size)
            ranges = [StoredRange(one.start, min(one.end, written), one.place) for one in ranges if one.start < written]
        plain_end = 0
        if all(place is not None and self._lies_plainly(place, end - start) for start, end, place in ranges):
            plain_end = find_plain_end(file, attribute, ranges, self._image.read)
        for start, end, place in ranges:
            if start > at:
                yield start - at
            at = start
            if place is not None and at < plain_end:
                yield Extent(place, min(end, plain_end) - at)
                at = min(end, plain_end)
            while at < end:
                part = file.read_random(at, min(_PIECE_BYTES, end - at), *attribute)
                if not part:
                    raise RefusedError(
                        "filesystem", f"{entry['name']}: it ends at byte {at}, not {size}: it is damaged"
                    )
                yield part
                at += len(part)
        if size > at:
            yield size - at

    def _lies_plainly(self, place: int, length: int) -> bool:
        """Whether a part of the volume is there, and nothing of it is newer in the journal."""
        is_newer = self._replayed is not None and self._replayed.is_newer(place, length)
        return place + length <= self._size_bytes and not is_newer


def _replay(fd: int, size_bytes: int, filesystem: Any, image: _Image) -> _Replayed | None:
    """An ext with what its journal has newer; None when that is nothing. Raises: JournalError; OSError."""
    superblock = image.read(_EXT_SUPERBLOCK, 1024)
    (shift,) = struct.unpack_from("<I", superblock, 24)
    (incompatible,) = struct.unpack_from("<I", superblock, 96)
    (inode,) = struct.unpack_from("<I", superblock, 224)
    if not incompatible & _EXT_RECOVER:
        return None
    if not inode:
        raise journal.JournalError("it is on another device")
    width = 1024 << min(shift, 6)
    file = filesystem.open_meta(inode=inode)

    def read(block: int) -> bytes:
        raw = bytes(file.read_random(block * width, width))
        if len(raw) < width:
            raise journal.JournalError(f"it ends before its block {block}")
        return raw

    log = journal.open_journal(read, width)
    newer = journal.find_newer(log) if log is not None else {}
    return _Replayed(fd, size_bytes, log, newer) if log is not None and newer else None


def _describe_ntfs(file: Any, entry: Entry) -> None:
    """Streams, links, and what hides the content from everybody but Windows."""
    for attribute in file:
        info = attribute.info
        name = bytes(info.name).decode("utf-8", "replace") if info.name else ""
        kind = int(info.type)
        if kind == DATA_ATTRIBUTE and name and name != "N/A":
            entry["streams"].append({"name": name, "size_bytes": int(info.size)})
        if kind == DATA_ATTRIBUTE and int(info.flags) & _ENCRYPTED_FLAG:
            entry["unreadable"] = "it is encrypted by Windows (EFS)"
        if kind == _REPARSE_ATTRIBUTE:
            _describe_reparse(bytes(file.read_random(0, 4096, kind, int(info.id))), entry)


def _describe_reparse(raw: bytes, entry: Entry) -> None:
    """[MS-FSCC] 2.1.2: tag, length; for links the places of the two names in what follows."""
    if len(raw) < 8:
        return
    (tag,) = struct.unpack_from("<I", raw)
    if tag in (_SYMLINK_TAG, _MOUNT_POINT_TAG) and len(raw) >= 20:
        start, length = struct.unpack_from("<HH", raw, 12)
        names_at = 20 if tag == _SYMLINK_TAG else 16
        entry["type"] = "link"
        entry["target"] = raw[names_at + start :][:length].decode("utf-16-le", "replace").replace("\\", "/")
    else:
        why = _REPARSE_NAMES.get(tag, f"it is a reparse point of type {tag:#x}, which only Windows can follow")
        entry["unreadable"] = why


def _find_stream(file: Any, name: str, stream: str) -> tuple[int, tuple[int, int]]:
    for attribute in file:
        info = attribute.info
        named = bytes(info.name).decode("utf-8", "replace") if info.name else ""
        if int(info.type) == DATA_ATTRIBUTE and named.casefold() == stream.casefold():
            return int(info.size), (DATA_ATTRIBUTE, int(info.id))
    raise RefusedError("not-found", f"{name} has no stream {stream}")


def _split_stream(filesystem: Filesystem, path: str) -> tuple[Any, Entry, str | None]:
    """`file:stream`, unless there is a file of that whole name."""
    try:
        return *filesystem.find(path), None
    except RefusedError as error:
        head, colon, stream = path.rpartition(":")
        if not colon or not stream or "/" in stream or error.code != "not-found":
            raise
        try:
            return *filesystem.find(head), stream
        except RefusedError:
            raise error from None


def _answer(fd: int, filesystem: Filesystem, request: Entry) -> None:
    def give(entry: Entry) -> None:
        channel.send(fd, channel.ENTRY, json.dumps(entry).encode())

    def give_part(part: bytes | int | Extent) -> None:
        if isinstance(part, Extent):
            channel.send(fd, channel.EXTENT, channel.EXTENT_PLACE.pack(*part))
        elif isinstance(part, int):
            channel.send(fd, channel.HOLE, channel.HOLE_BYTES.pack(part))
        else:
            channel.send(fd, channel.CONTENT, part)

    path = str(request["path"])
    match request["operation"]:
        case "list":
            for below, _, entry in filesystem.walk(path, recursive=bool(request["recursive"])):
                give(entry | {"path": below})
        case "read":
            file, entry, stream = _split_stream(filesystem, path)
            give(entry | {"path": "", "stream": stream})
            for part in filesystem.content(file, entry, stream):
                give_part(part)
        case "tree":
            file, entry, stream = _split_stream(filesystem, path)
            found = iter([("", file, entry)]) if stream else filesystem.walk(path, recursive=True)
            for below, file, entry in found:
                give(entry | {"path": below, "type": "file" if stream else entry["type"]})
                if (entry["type"] != "file" and not stream) or entry["unreadable"]:
                    continue
                try:
                    for part in filesystem.content(file, entry, stream):
                        give_part(part)
                except (RefusedError, OSError) as fault:  # this file is damaged; the others need not be
                    give(entry | {"path": below, "unreadable": str(fault).splitlines()[0][:300]})


def serve(fd: int) -> None:
    """Answer commands, all of one volume, until the other side hangs up.

    An exception of the library ends one answer only.
    """
    channel.send(fd, channel.READY)
    filesystem: Filesystem | None = None
    while True:
        head = channel.receive_exactly(fd, channel.HEAD.size)
        if len(head) < channel.HEAD.size:
            return
        _, length = channel.HEAD.unpack(head)
        request = json.loads(channel.receive_exactly(fd, length))
        error = {}
        try:
            if filesystem is None:
                volume = request["volume"]
                filesystem = Filesystem(fd, int(volume["size_bytes"]), str(volume["kind"]))
                if filesystem.note:
                    channel.send(fd, channel.NOTE, filesystem.note.encode())
            _answer(fd, filesystem, request)
        except RefusedError as refused:
            error = {"code": refused.code, "message": str(refused)}
        except MemoryError:
            error = {"code": "filesystem", "message": "it takes more memory than it may"}
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as fault:
            first = (str(fault) or type(fault).__name__).splitlines()[0]
            error = {"code": "filesystem", "message": f"the filesystem cannot be read: {first[:300]}"}
        channel.send(fd, channel.END, json.dumps(error).encode())


def main(arguments: list[str]) -> None:
    """Descriptor of the channel, pid of the parent."""
    fd, parent = map(int, arguments)
    for name in ("utf-16-le", "utf-8", "latin-1"):  # modules, which cannot be loaded any more later
        codecs.lookup(name)
    jail.confine(LIMITS, keep=(fd,), parent=parent)
    serve(fd)


if __name__ == "__main__":
    main(sys.argv[1:])
