"""From a differencing disk to its parent, and on to the end of the chain.

The child names its parent by locators (`W2ru` relative, `W2ku` absolute, `MacX` a file URL) and by a plain name; the
parent's unique id decides. Relative comes first, so that a chain that was moved as a whole finds itself; last comes the
parent's name in the child's own folder.

Security: the names come from the file, so a hostile file could name any file of the host and have it read. Hence:
drive letters, UNC paths and URLs with a host are refused; the file that was really opened (`/proc/self/fd`, all
symbolic links resolved) must lie in an allowed folder; it must be a regular file and a valid VHD with the right id. A
null id is an id like any other: it never stands for a raw parent. Where the caller names no folders these are the
topmost file's own, and for each child the one that whoever made it here named himself: `trust_folder` keeps that in the
attribute `user.mullion.parent_folder`, which neither a guest nor the bytes of a file that was sent to us can set.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

from mullion.base.errors import DeniedError, NotFoundError
from mullion.vhd.errors import (
    ChainCycleError,
    ChainTooDeepError,
    NotVhdError,
    ParentMismatchError,
    ParentNotFoundError,
    ParentRefusedError,
    VhdDamagedError,
    VhdError,
)
from mullion.vhd.findings import Finding, Kind
from mullion.vhd.image import Image, load_image, open_file
from mullion.vhd.layout import EPOCH_S, MAX_LOCATOR_BYTES, DiskType, ParentLocator
from mullion.vhd.locking import is_locked_for_merge, lock_file

CHAIN_LIMIT: Final = 1024
"""Files in a chain; each takes a descriptor for as long as the chain is open."""

FOLDER_ATTRIBUTE: Final = "user.mullion.parent_folder"
STATE_ATTRIBUTE: Final = "user.mullion.parent_state"

_LOOKS: Final = 20
_LOOK_INTERVAL_S: Final = 0.01
_SHOWN_CHARS: Final = 300
_FOLDER_LIMIT: Final = 4096
_DRIVE: Final = re.compile(r"[A-Za-z]:")
_PLATFORM_ORDER: Final = (b"W2ru", b"W2ku", b"MacX")


@dataclass(frozen=True, slots=True)
class ParentName:
    """One way in which a child names its parent: where that stands, and the path, or what is wrong with it."""

    source: str
    path: str | None
    complaint: str | None = None
    is_broken: bool = False
    """Can nothing be read there? Else it says something that does not lead to a file of this host."""


def real_path(fd: int) -> str:
    """The path of an open file, with all links resolved."""
    return os.readlink(f"/proc/self/fd/{fd}")


def trust_folder(fd: int, folder: str) -> None:
    """Note that whoever made this child chose a parent in that folder: best effort, some file systems keep no notes."""
    with contextlib.suppress(OSError):
        os.setxattr(fd, FOLDER_ATTRIBUTE, os.fsencode(folder)[:_FOLDER_LIMIT])


def note_parent(fd: int, parent_path: str) -> None:
    """Note in a child which file its parent is, and when that was last written; best effort, as `trust_folder`."""
    with contextlib.suppress(OSError):
        os.setxattr(fd, STATE_ATTRIBUTE, _state_of(os.stat(parent_path)))


def has_changed(child_fd: int, parent_fd: int) -> bool:
    """Was the very file that the child was made on written since? False where nothing was noted, or it is a copy."""
    try:
        noted = os.getxattr(child_fd, STATE_ATTRIBUTE)
    except OSError:
        return False
    now = _state_of(os.fstat(parent_fd))
    return noted != now and noted.rpartition(b":")[0] == now.rpartition(b":")[0]


def _state_of(status: os.stat_result) -> bytes:
    return f"{status.st_dev}:{status.st_ino}:{status.st_mtime_ns}".encode()


def _trusted_folder(fd: int) -> list[str]:
    try:
        return [os.path.realpath(os.fsdecode(os.getxattr(fd, FOLDER_ATTRIBUTE)))]
    except (OSError, ValueError):
        return []


def parent_names(image: Image, folder: str) -> Iterator[ParentName]:
    """All names of the parent, best first, as paths of this host; `folder` is the child's."""
    header = image.header
    assert header is not None
    for platform in _PLATFORM_ORDER:
        for locator in header.locators:
            if locator.platform == platform:
                yield _from_locator(image, locator, folder)
    name = header.parent_name
    if name is None:
        yield ParentName("parent name", None, "is not UTF-16", is_broken=True)
    elif base := name.replace("\\", "/").rstrip("/").rpartition("/")[2]:
        yield ParentName("parent name", os.path.join(folder, base), None)


def read_locator(image: Image, locator: ParentLocator) -> tuple[str | None, str | None]:
    """What a locator says: (its text, or None; what is wrong with it, or None)."""
    space, length = locator.space_bytes, locator.data_length
    if space is None or not 0 < length <= MAX_LOCATOR_BYTES:
        return None, f"has an impossible size (data length {length}, space {locator.data_space})"
    raw = os.pread(image.fd, length, locator.data_offset) if locator.data_offset < 1 << 62 else b""
    if len(raw) != length:
        return None, "lies outside the file"
    try:
        text = raw.decode("utf-8" if locator.platform == b"MacX" else "utf-16-le").rstrip("\0")
    except UnicodeDecodeError:
        return None, "is not text"
    return (None, "is not a path") if "\0" in text or not text else (text, None)


def _from_locator(image: Image, locator: ParentLocator, folder: str) -> ParentName:
    source = f"locator {locator.platform.decode('ascii', 'replace')}"
    text, complaint = read_locator(image, locator)
    if text is None:
        return ParentName(source, None, complaint, is_broken=True)
    if locator.platform == b"MacX":
        return _from_url(source, text)
    return _from_windows(source, text, folder)


def _from_url(source: str, text: str) -> ParentName:
    try:
        url = urlsplit(text)
    except ValueError:
        return ParentName(source, None, f"is not a URL: {shown(text)}")
    path = unquote(url.path)
    if url.scheme != "file" or url.netloc not in ("", "localhost") or "\0" in path or not path.startswith("/"):
        return ParentName(source, None, f"names another machine or no file: {shown(text)}")
    return ParentName(source, path)


def _from_windows(source: str, text: str, folder: str) -> ParentName:
    path = text.replace("\\", "/")
    if path.startswith("//"):
        return ParentName(source, None, f"names another machine: {shown(text)}")
    if _DRIVE.match(path):
        return ParentName(source, None, f"names a drive of another system: {shown(text)}")
    return ParentName(source, os.path.normpath(os.path.join(folder, path)))


Loader = Callable[[int, str], Image]
"""Makes an image of an open file, as `load_image` does: raises what refuses the file."""


def open_parents(
    top: Image, *, allowed_dirs: Sequence[str] | None, limit: int = CHAIN_LIMIT, lock: bool = False
) -> list[Image]:
    """The whole chain of an open file, top first.

    Arguments and errors are those of `walk_parents`. On an error the parents opened so far are closed, the top stays
    the caller's.
    """
    images = [top]
    try:
        for parent in walk_parents(top, allowed_dirs=allowed_dirs, limit=limit, lock=lock):
            images.append(parent)  # noqa: PERF402  # what was opened before an error must be known
    except BaseException:
        for image in images[1:]:
            image.close()
        raise
    return images


def walk_parents(
    top: Image,
    *,
    allowed_dirs: Sequence[str] | None,
    limit: int = CHAIN_LIMIT,
    lock: bool = False,
    load: Loader = load_image,
) -> Iterator[Image]:
    """Open one parent after the other, down to the end of the chain; each is the caller's to close.

    `allowed_dirs` are the folders in which parents may lie; by default the top's own and those that were trusted. With
    `lock` each parent is locked for reading before its structures are read.

    Raises: ParentNotFoundError, ParentMismatchError, ParentRefusedError, ChainCycleError, ChainTooDeepError, VhdError.
    """
    first = os.path.dirname(real_path(top.fd))
    allowed = [os.path.realpath(folder) for folder in allowed_dirs] if allowed_dirs is not None else [first]
    seen = {identity_of(top.fd)}
    child = top
    while child.kind is DiskType.DIFFERENCING:
        if len(seen) >= limit:
            raise ChainTooDeepError(
                f"{top.path}: the chain has more than {limit} files", path=top.path, structure="chain"
            )
        trusted = _trusted_folder(child.fd) if allowed_dirs is None else []
        parent = find_parent(child, [*allowed, *trusted], lock=lock, known=seen, load=load)
        identity = identity_of(parent.fd)
        if identity in seen:
            parent.close()
            raise ChainCycleError(
                f"{child.path}: its parent {parent.path} is also its child", path=child.path, structure="chain"
            )
        seen.add(identity)
        yield parent
        child = parent


def find_parent(
    child: Image,
    allowed: Sequence[str],
    *,
    lock: bool = False,
    known: Collection[tuple[int, int]] = (),
    load: Loader = load_image,
) -> Image:
    """Open the parent of a differencing disk; `allowed` are real paths of folders.

    With `lock` it is locked, unless it is one of the files `known` to be in the chain: those are locked already, and
    the caller has a cycle.
    """
    header = child.header
    assert header is not None
    folder = os.path.dirname(real_path(child.fd))
    complaints: list[str] = []
    refused, mismatch, broken, remedy = False, None, None, None
    tried: set[str] = set()
    for name in parent_names(child, folder):
        if name.path is None:
            complaints.append(f"{name.source} {name.complaint}")
            refused = refused or "names" in (name.complaint or "")
            continue
        if name.path in tried:
            continue
        tried.add(name.path)
        try:
            parent = _open_parent(name.path, allowed, lock=lock, known=known, load=load)
            check_parent(child, parent)
        except NotFoundError:
            complaints.append(f"{name.source}: there is no {shown(name.path)}")
        except ParentRefusedError as error:
            refused, remedy = True, remedy or error.remedy
            complaints.append(f"{name.source}: {error.message}")
        except ParentMismatchError as error:
            mismatch = mismatch or error
            complaints.append(f"{name.source}: {error.message}")
            parent.close()
        except (NotVhdError, DeniedError, VhdDamagedError) as error:
            broken = broken or error
            complaints.append(f"{name.source}: {error.message}")
        else:
            child.findings += [
                Finding(Kind.LOCATOR_BAD, f"parent {what}", child.footer.data_offset) for what in complaints
            ]
            return parent
    if mismatch is not None:
        raise mismatch
    if broken is not None:
        raise broken
    kind: type[VhdError] = ParentRefusedError if refused else ParentNotFoundError
    verb = "must not be opened" if refused else "is missing"
    raise kind(
        f"{child.path}: its parent {verb}: {'; '.join(complaints) or 'it names none'}",
        path=child.path,
        structure="parent locator",
        remedy=remedy,
    )


def _open_parent(
    path: str, allowed: Sequence[str], *, lock: bool, known: Collection[tuple[int, int]], load: Loader
) -> Image:
    # What lies outside the allowed folders is not even opened, so that an error cannot tell whether it exists.
    if not _is_inside(os.path.realpath(path), allowed):
        raise _outside(path, allowed)
    fd = open_file(path)
    try:
        if not _is_inside(real_path(fd), allowed):  # a link may have been swapped in since
            raise _outside(path, allowed)
        if lock and identity_of(fd) not in known:
            lock_file(fd, path, for_writing=False)
        return load_parent(fd, path, load)
    except BaseException:
        os.close(fd)
        raise


def load_parent(fd: int, path: str, load: Loader = load_image) -> Image:
    """Load a file that a merge may be writing to just now: what looks damaged then is looked at again.

    A merge changes the structures in an order in which each state is right, but reading them takes several calls.
    Raises: as `load_image`.
    """
    for _ in range(_LOOKS):
        try:
            image = load(fd, path)
            if not image.damage or not is_locked_for_merge(fd):
                return image
        except VhdError:
            if not is_locked_for_merge(fd):
                raise
        time.sleep(_LOOK_INTERVAL_S)
    return load(fd, path)


def _outside(path: str, allowed: Sequence[str]) -> ParentRefusedError:
    folders = ", ".join(dict.fromkeys(allowed))
    folder = shlex.quote(shown(os.path.dirname(path)))
    return ParentRefusedError(
        f"{shown(path)} is outside the allowed folders ({folders})",
        path=path,
        structure="parent locator",
        remedy=f"If you trust the file that names it: allow that folder (--allow {folder}), or move it to the child.",
    )


def shown(path: str) -> str:
    """A path that a foreign file names, harmless for a terminal and of bounded length."""
    text = path if len(path) <= _SHOWN_CHARS else f"{path[:_SHOWN_CHARS]}…"
    return "".join(char if char.isprintable() else "?" for char in text)


def _is_inside(path: str, folders: Sequence[str]) -> bool:
    return any(os.path.commonpath([path, folder]) == folder for folder in folders)


def identity_of(fd: int) -> tuple[int, int]:
    """Which file it is, whatever its names: device and inode."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def check_parent(child: Image, parent: Image) -> None:
    """Is this the disk that the child was made on? A parent's other timestamp is only noted.

    Raises: ParentMismatchError.
    """
    header = child.header
    if header is None or child.kind is not DiskType.DIFFERENCING:
        raise ParentMismatchError(
            f"{child.path} is {child.kind.word} and has no parent, but {parent.path} was given as one",
            path=child.path,
            structure="footer",
            offset=60,
        )
    if header.parent_unique_id != parent.footer.unique_id:
        raise ParentMismatchError(
            f"{parent.path} is not the parent of {child.path}: its id is {parent.footer.unique_id.hex()}, "
            f"not {header.parent_unique_id.hex()}",
            path=parent.path,
            structure="footer",
            offset=68,
        )
    stamps = (0, parent.footer.timestamp, int(os.fstat(parent.fd).st_mtime) - EPOCH_S)
    if header.parent_timestamp not in stamps:
        what = f"the parent's timestamp is not the one that was noted ({header.parent_timestamp})"
        child.findings.append(Finding(Kind.PARENT_TIMESTAMP, what, child.footer.data_offset + 56))
