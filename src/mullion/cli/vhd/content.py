"""`mullion vhd hash`, `mullion vhd read` and `mullion vhd write`: the bytes that a guest would see."""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from mullion.base.errors import InvalidError, MullionError
from mullion.base.units import MIB, format_size
from mullion.cli.face import Face, exit_code_of, pass_face
from mullion.cli.lazy import Command
from mullion.cli.values import SizeType
from mullion.cli.vhd.convert import refuse_terminal
from mullion.cli.vhd.meter import metered
from mullion.cli.vhd.options import DISK, allow_option, allowed_dirs, from_option, size_from_option

if TYPE_CHECKING:
    from mullion.base.progress import Progress
    from mullion.vhd import Chain

_BUFFER_BYTES: Final = MIB


@click.command("hash", cls=Command, short_help="Print the SHA-256 of disks' contents, whatever files they are in.")
@click.argument("paths", metavar="PATH...", type=DISK, nargs=-1, required=True)
@from_option
@size_from_option
@allow_option
@pass_face
def hash_disks(
    face: Face, *, paths: tuple[str, ...], source_format: str | None, size_source: str, allow: tuple[str, ...]
) -> int:
    """Print the SHA-256 of disks' contents, whatever files they are in: `HASH  PATH`, as sha256sum does.

    The content is what a guest would see. So a chain, the VHD it was flattened into and the raw disk have one hash,
    and the raw disk's is the one that sha256sum prints for the file. Several disks are hashed at once.

    \b
    Examples:
      mullion vhd hash child.vhd
      mullion vhd hash base.vhd fixed.vhd disk.img --format json
    """
    with metered(face, "hash", after="Nothing was changed.") as progress:
        found = _hash_all(paths, source_format, size_source, allow, progress)
    hashed, failure = [], 0
    for path, result in zip(paths, found, strict=True):
        if isinstance(result, MullionError):
            face.print_error(result)
            failure = failure or exit_code_of(result)
        else:
            hashed.append({"path": path, "sha256": result})
            if not face.is_json:
                face.say(f"{result}  {path}")
    if face.is_json:
        face.emit_json(hashed)
    return failure


def _hash_all(
    paths: Sequence[str], source_format: str | None, size_source: str, allow: Sequence[str], progress: Progress
) -> list[str | MullionError]:
    """The hash of each, or why there is none; as many at once as there are processors."""
    from concurrent.futures import ThreadPoolExecutor

    from mullion.media.source import open_source
    from mullion.vhd.geometry import SizeFrom
    from mullion.vhd.hashing import hash_content

    lock, ended = threading.Lock(), threading.Event()
    done = [(0, 0)] * len(paths)

    def one(number: int) -> str | MullionError:
        def report(stage: str, done_bytes: int, total_bytes: int) -> None:
            if ended.is_set():
                raise InterruptedError
            with lock:
                done[number] = done_bytes, total_bytes
                progress(stage, sum(part for part, _ in done), sum(whole for _, whole in done))

        path = paths[number]
        try:
            with open_source(
                path,
                source_format=source_format,
                allowed_dirs=allowed_dirs(path, allow),
                size_from=SizeFrom(size_source),
            ) as disk:
                return hash_content(disk.device, progress=report)
        except MullionError as error:
            return error

    with ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1)) as pool:
        try:
            return list(pool.map(one, range(len(paths))))
        except BaseException:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@click.command("read", cls=Command, short_help="Print bytes of a disk's content to standard output.")
@click.argument("path", type=DISK)
@click.option("--offset", type=SizeType(), metavar="N", default=0, help="The first byte, such as 512 or 1M; default 0.")
@click.option("--length", type=SizeType(), metavar="N", help="How many; default: up to the disk's end.")
@from_option
@size_from_option
@allow_option
@pass_face
def read(
    face: Face,
    *,
    path: str,
    offset: int,
    length: int | None,
    source_format: str | None,
    size_source: str,
    allow: tuple[str, ...],
) -> None:
    """Print bytes of a disk's content to standard output, read with all parents.

    \b
    Examples:
      mullion vhd read child.vhd --offset 1M --length 4K > part.bin
      mullion vhd read base.vhd --length 512 | od -A d -t x1
    """
    from mullion.media.source import open_source
    from mullion.vhd.geometry import SizeFrom
    from mullion.vhd.storage import storage_explained
    from mullion.vhd.streaming import stream_range

    folders = allowed_dirs(path, allow)
    with open_source(path, source_format=source_format, allowed_dirs=folders, size_from=SizeFrom(size_source)) as disk:
        size_bytes = disk.device.size_bytes
        wanted = size_bytes - offset if length is None else length
        _check_range(path, offset, max(wanted, 0), size_bytes)
        refuse_terminal()
        for warning in disk.warnings:
            face.note(f"warning: {warning}")
        fd = os.dup(sys.stdout.fileno())
        try:
            with storage_explained("standard output"):
                stream_range(disk.device, fd, offset, wanted)
        finally:
            os.close(fd)


@click.command("write", cls=Command, short_help="Write standard input into a disk's content.")
@click.argument("path", type=DISK)
@click.option("--offset", type=SizeType(), metavar="N", default=0, help="The first byte, such as 512 or 1M; default 0.")
@allow_option
@pass_face
def write(face: Face, *, path: str, offset: int, allow: tuple[str, ...]) -> None:
    """Write standard input into a disk's content: a VHD's, whose parents stay as they are.

    What was written is durable when the command ends. A file that is too long for the disk is refused before anything
    is written; of a pipe that does not end in time, what fits is written and the number of bytes said.

    \b
    Examples:
      mullion vhd write base.vhd < disk.img
      mullion vhd read base.vhd --length 64K | mullion vhd write child.vhd --offset 2M
    """
    from mullion.vhd import open_chain
    from mullion.vhd.storage import storage_explained

    stdin = sys.stdin.fileno()
    holder = f"mullion vhd write (pid {os.getpid()})"
    with open_chain(path, allowed_dirs=allowed_dirs(path, allow), holder=holder) as chain:
        for warning in chain.warnings:
            face.note(f"warning: {warning}")
        _check_range(path, offset, _known_length(stdin), chain.size_bytes)
        with storage_explained(path):
            written, fits = _pour(chain, stdin, offset)
            chain.flush()
    if not fits:
        raise InvalidError(
            f"{path}: the disk ends: {written} bytes from {offset} on were written and are durable, the rest was not",
            remedy="Give less, or begin at a lower offset.",
            path=path,
            written_bytes=written,
        )
    if face.is_json:
        face.emit_json({"path": path, "offset": offset, "written_bytes": written})
    else:
        face.note(f"{path}: {format_size(written)} ({written} bytes) written at byte {offset}")


def _pour(chain: Chain, stdin: int, offset: int) -> tuple[int, bool]:
    """Copy a descriptor to its end into the disk: the bytes written, and whether all of them fit."""
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    at = offset
    while True:
        filled = 0
        while filled < len(buffer) and (count := os.readv(stdin, [buffer[filled:]])):
            filled += count
        room = min(filled, chain.size_bytes - at)
        chain.pwrite(at, buffer[:room])
        at += room
        if room < filled:
            return at - offset, False
        if filled < len(buffer):
            return at - offset, True


def _known_length(stdin: int) -> int:
    """Bytes that standard input still has, when it is a file; else 0, not known."""
    status = os.fstat(stdin)
    if not stat.S_ISREG(status.st_mode):
        return 0
    return max(0, status.st_size - os.lseek(stdin, 0, os.SEEK_CUR))


def _check_range(path: str, offset: int, length: int, size_bytes: int) -> None:
    if offset + length > size_bytes:
        raise InvalidError(
            f"{path}: bytes {offset} to {offset + length} are not on a disk of {size_bytes} bytes: nothing was done",
            remedy="Choose --offset and --length inside the disk.",
            path=path,
        )
