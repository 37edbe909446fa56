"""Which disk is whose child: a chain, or all disks of a folder, as trees with what is wrong in them.

A tree's root is a disk that has no parent, or whose parent cannot be found. In a folder each disk is checked by itself
and asked for its parent once; so a folder costs as much as its files, however they hang together.

Invariants: one file is open at a time, with its parent; a folder has at most `FOLDER_LIMIT` disks; nothing is locked or
written. Files without the marks of a VHD are left out, unless their name says that they are one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from mullion.base.errors import DeniedError, MullionError, TooLargeError
from mullion.vhd.check import FileReport, add_finding, chain_finding, check_disk, check_open_file, compare_with_parent
from mullion.vhd.findings import Finding, Kind
from mullion.vhd.image import Image, open_file
from mullion.vhd.layout import DiskType
from mullion.vhd.parents import CHAIN_LIMIT, identity_of, walk_parents
from mullion.vhd.salvage import examine

FOLDER_LIMIT: Final = 10_000
_ENDINGS: Final = (".vhd", ".avhd")


@dataclass(slots=True)
class Node:
    """A disk and the disks that were made on it."""

    report: FileReport
    file_bytes: int
    children: list[Node] = field(default_factory=list)
    is_denied: bool = False
    """May we not read it? What is in it is not known then."""

    def walk(self) -> Iterator[Node]:
        """This disk and all below it, without recursion: a chain may be deep."""
        left = [self]
        while left:
            node = left.pop()
            yield node
            left += node.children


def plant(path: str, *, allowed_dirs: Sequence[str] | None = None, limit: int = CHAIN_LIMIT) -> list[Node]:
    """The trees of a folder, or the chain of a file as a tree without branches. Files are sorted by name.

    Raises: NotFoundError, DeniedError; NotVhdError when a file is not a regular one; TooLargeError; OSError.
    """
    if os.path.isdir(path):
        return _plant_folder(path, allowed_dirs)
    report = check_disk(path, facts=True, allowed_dirs=allowed_dirs, limit=limit)
    nodes = [Node(file, os.stat(file.path).st_size) for file in report.files]
    for child, parent in pairwise(nodes):
        parent.children.append(child)
    return [nodes[-1]]


@dataclass(slots=True)
class _Found:
    """A disk: its node, which file it is, and where its parent is."""

    node: Node
    identity: tuple[int, int]
    parent: tuple[int, int] | None
    parent_path: str | None


def _plant_folder(folder: str, allowed_dirs: Sequence[str] | None) -> list[Node]:
    found: dict[tuple[int, int], _Found] = {}
    left = deque(_files(folder))
    while left:
        disk = _look_at(left.popleft(), allowed_dirs)
        if disk is None or disk.identity in found:
            continue
        found[disk.identity] = disk
        if disk.parent_path is not None and disk.parent not in found:
            left.append(disk.parent_path)  # it may lie in another folder
        if len(found) > FOLDER_LIMIT:
            raise TooLargeError(
                f"{folder} has more than {FOLDER_LIMIT} disks",
                remedy="Draw the chain of one disk: mullion vhd tree FILE.",
                path=folder,
            )
    roots: list[Node] = []
    for disk in found.values():
        if disk.parent is None or disk.parent not in found:
            roots.append(disk.node)
        else:
            found[disk.parent].node.children.append(disk.node)
    return [*roots, *_cycles(found, roots)]


def _cycles(found: dict[tuple[int, int], _Found], roots: list[Node]) -> Iterator[Node]:
    """A root for each ring of disks that are each other's parents, cut open where it is met first."""
    reached = {id(node) for root in roots for node in root.walk()}
    for disk in found.values():
        if id(disk.node) in reached:
            continue
        seen: set[tuple[int, int]] = set()
        while disk.identity not in seen:
            seen.add(disk.identity)
            disk = _parent_of(disk, found)  # noqa: PLW2901  # down to the ring
        _parent_of(disk, found).node.children.remove(disk.node)
        what = f"its parent {disk.parent_path} is also its child"
        disk.node.report = add_finding(disk.node.report, Finding(Kind.CHAIN_CYCLE, what, 0))
        reached.update(id(node) for node in disk.node.walk())
        yield disk.node


def _parent_of(disk: _Found, found: dict[tuple[int, int], _Found]) -> _Found:
    assert disk.parent is not None
    return found[disk.parent]


def _files(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file())
    return (os.path.join(folder, name) for name in names)


def _look_at(path: str, allowed_dirs: Sequence[str] | None) -> _Found | None:
    """One file of a folder; None when it is no disk, or cannot be read."""
    is_named_so = path.lower().endswith(_ENDINGS)
    try:
        fd = open_file(path)
    except MullionError as error:
        if not is_named_so:
            return None
        failed = Finding(Kind.NOT_VHD, f"cannot be read: {error.message}", 0, error.remedy)
        node = Node(check_open_file([failed], path), 0, is_denied=isinstance(error, DeniedError))
        return _Found(node, (0, hash(path)), None, None)
    try:
        examined = examine(fd, path)
        if not isinstance(examined, Image) and examined[-1].kind is Kind.NOT_VHD and not is_named_so:
            return None
        parent = _ask_for_parent(examined, allowed_dirs) if isinstance(examined, Image) else (None, None)
        node = Node(check_open_file(examined, path, facts=True), os.fstat(fd).st_size)
        return _Found(node, identity_of(fd), *parent)
    finally:
        os.close(fd)


def _ask_for_parent(
    child: Image, allowed_dirs: Sequence[str] | None
) -> tuple[tuple[int, int], str] | tuple[None, None]:
    """Which file a disk's parent is, and its path; why there is none becomes a finding."""
    if child.kind is not DiskType.DIFFERENCING:
        return None, None

    def load(fd: int, path: str) -> Image:
        found = examine(fd, path)
        if isinstance(found, Image):
            return found
        raise found[-1].as_error(path)

    try:
        parent = next(walk_parents(child, allowed_dirs=allowed_dirs, load=load))
    except MullionError as error:
        child.findings.append(chain_finding(child, error))
        return None, None
    try:
        compare_with_parent(child, parent)
        return identity_of(parent.fd), parent.path
    finally:
        parent.close()
