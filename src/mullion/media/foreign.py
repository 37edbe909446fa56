"""Disks in other formats, read as they are: VHDX, QCOW2, VMDK, VDI, OVA and more, beside VHD and raw.

What a file is, its bytes say, never its name (`detect_format`). Its own structures are looked through for names of
other files (`headers`, `vhdx`, `vmdk`) before a confined QEMU reads it (`qemu`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from mullion.base.block import BlockDevice
from mullion.base.errors import NotFoundError
from mullion.media import ova, vhdx, vmdk
from mullion.media.errors import ForeignDiskError, ForeignReferenceError, ForeignUnsupportedError
from mullion.media.headers import Source, check_header
from mullion.media.qemu import served
from mullion.media.windows import FileWindow, Piece, Pieces
from mullion.vhd import open_chain
from mullion.vhd.errors import NotVhdError
from mullion.vhd.formats import HEAD_BYTES, MARKS, identify
from mullion.vhd.image import open_file

QEMU_FORMATS: Final = ("vhdx", "qcow2", "qcow", "qed", "vmdk", "vdi", "parallels")
"""What QEMU reads for us."""
FORMATS: Final = ("vhd", "raw", *QEMU_FORMATS, "ova")
"""Everything that `open_foreign` opens."""

_FOOTER_COOKIE: Final = b"conectix"
_OLD_FOOTER_BYTES: Final = 511
_DMG_COOKIE: Final = b"koly"
_PACKED: Final = {
    "gzip": "gzip -dk",
    "bzip2": "bzip2 -dk",
    "xz": "xz -dk",
    "zstd": "zstd -dk",
    "zip": "unzip",
    "7z": "7z x",
}


def detect_format(path: str) -> str:
    """What the file is, by its content: one of `FORMATS`, or the name of a kind that is not read here.

    Anything unknown is `raw`: every file is a raw disk.
    Raises: NotFoundError, DeniedError, NotVhdError when it is not a regular file; OSError.
    """
    fd = open_file(path)
    try:
        return _detect(fd)
    finally:
        os.close(fd)


def _detect(fd: int) -> str:
    size_bytes = os.fstat(fd).st_size
    head = os.pread(fd, HEAD_BYTES, 0)
    tail = os.pread(fd, HEAD_BYTES, max(0, size_bytes - HEAD_BYTES))
    # A footer at the end comes first: what stands at the start of a fixed disk is the guest's to choose.
    if _FOOTER_COOKIE in (tail[:8], tail[-_OLD_FOOTER_BYTES:][:8], head[:8]):
        return "vhd"
    mark = identify(head)
    if mark is None:
        return "dmg" if tail[:4] == _DMG_COOKIE else "raw"
    return "ova" if mark.format == "tar" and ova.is_ova(fd) else mark.format


@contextlib.contextmanager
def open_foreign(path: str, format: str | None = None) -> Iterator[BlockDevice]:  # noqa: A002 - as it is called
    """The content of a disk in any format that is read here, as a read-only device.

    `format` names it where its content does not (a raw disk may begin with anything); default is `detect_format`. Of an
    OVA with several disks one must be chosen by `open_ova`. The device is used by the thread that opened it: what reads
    for it dies with that thread.
    Raises: ForeignUnsupportedError, ForeignReferenceError, ForeignDiskError; VhdError; MissingToolError; NotFoundError.
    """
    if format == "vhd" or (format is None and detect_format(path) == "vhd"):
        with open_chain(path, read_only=True) as chain:
            yield chain
        return
    with contextlib.ExitStack() as stack:
        fd = open_file(path)
        stack.callback(os.close, fd)
        source = Source(fd, path, 0, os.fstat(fd).st_size)
        yield stack.enter_context(_opened(source, format or _detect(fd)))


@contextlib.contextmanager
def open_ova(path: str, disk: str | None = None) -> Iterator[BlockDevice]:
    """One disk of an OVA: by its number or its name in `ova.list_ova`; without a choice the only one.

    Its hash in the manifest is verified first, where there is a manifest; nothing is unpacked to the disk.
    Raises: NotFoundError, ForeignDiskError and what `open_foreign` raises.
    """
    with contextlib.ExitStack() as stack:
        fd = open_file(path)
        stack.callback(os.close, fd)
        source = Source(fd, path, 0, os.fstat(fd).st_size)
        yield stack.enter_context(_opened_ova(source, disk))


def _opened(source: Source, kind: str) -> contextlib.AbstractContextManager[BlockDevice]:
    if kind == "raw":
        return contextlib.closing(FileWindow(os.dup(source.fd), source.path, source.offset, source.length))
    if kind == "vmdk" and vmdk.is_descriptor(source):
        return _opened_descriptor(source)
    if kind == "ova":
        return _opened_ova(source, None)
    if kind not in QEMU_FORMATS:
        title = next((mark.title for mark in MARKS if mark.format == kind), f"of the format {kind!r}")
        unpack = _PACKED.get(kind)
        remedy = (
            f"Unpack it first: {unpack} {source.path}" if unpack else f"Formats that are read: {', '.join(FORMATS)}."
        )
        raise ForeignUnsupportedError(
            f"{source.path} is {title}, not a disk that can be read here", path=source.path, remedy=remedy
        )
    if kind == "vhdx":
        return _opened_vhdx(source)
    if kind == "vmdk":
        vmdk.check_sparse(source)
    else:
        check_header(source, kind)
    return served(source, kind)


@contextlib.contextmanager
def _opened_vhdx(source: Source) -> Iterator[BlockDevice]:
    vhdx.check_vhdx(source)
    blocks = vhdx.read_map(source)
    with served(source, "vhdx") as device:
        is_certain = blocks is not None and blocks.size_bytes == device.size_bytes
        yield vhdx.VhdxDisk(device, blocks) if blocks is not None and is_certain else device


@contextlib.contextmanager
def _opened_descriptor(source: Source) -> Iterator[BlockDevice]:
    """A disk whose extents are files beside its descriptor."""
    folder_fd = os.open(os.path.dirname(os.path.realpath(source.path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, folder_fd)
        pieces: list[Piece] = []
        for extent in vmdk.read_descriptor(source):
            if extent.file_name is None:
                pieces.append(Piece(None, 0, extent.length))
                continue
            part = _open_extent(source, folder_fd, extent.file_name)
            stack.callback(os.close, part.fd)
            device = stack.enter_context(_opened(part, "raw"))
            if extent.offset + extent.length > device.size_bytes:
                source.refuse(
                    f"{extent.file_name} has {device.size_bytes} bytes, but {extent.offset + extent.length} are needed",
                    "VMDK extent",
                    0,
                )
            pieces.append(Piece(device, extent.offset, extent.length))
        yield Pieces(source.path, pieces)


def _open_extent(source: Source, folder_fd: int, name: str) -> Source:
    """A file beside the descriptor; never one that a link leads to."""
    path = os.path.join(os.path.dirname(source.path), name)
    try:
        fd = open_file(f"/proc/self/fd/{folder_fd}/{name}", follow=False)
    except NotFoundError as error:
        raise NotFoundError(
            f"{source.path}: its extent {name} is not beside it", remedy="Put all files of the disk into one folder."
        ) from error
    except NotVhdError as error:
        raise ForeignReferenceError(
            f"{source.path}: its extent {name} is a link or no regular file",
            path=path,
            remedy="Put the file itself there.",
        ) from error
    return Source(fd, path, 0, os.fstat(fd).st_size)


@contextlib.contextmanager
def _opened_ova(source: Source, disk: str | None) -> Iterator[BlockDevice]:
    package = ova.read_package(source)
    member = ova.choose(package, disk)
    ova.verify(source, package, member)
    part = Source(source.fd, f"{source.path}:{member.name}", source.offset + member.offset, member.length)
    head = part.read(0, HEAD_BYTES)
    mark = identify(head)
    kind = mark.format if mark is not None else "raw"
    if head.startswith(_FOOTER_COOKIE) or part.read(part.length - HEAD_BYTES, 8) == _FOOTER_COOKIE:
        raise ForeignUnsupportedError(
            f"{part.path} is a VHD inside an OVA", remedy=f"Unpack it first: tar -xf {source.path} {member.name}"
        )
    if kind == "tar" or vmdk.is_descriptor(part):
        raise ForeignDiskError(f"{part.path} is {mark.title if mark else kind}, not a disk", path=part.path)
    with _opened(part, kind) as device:
        yield device
