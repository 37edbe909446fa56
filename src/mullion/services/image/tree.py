"""A tree of files in memory: what goes into the initramfs and into the root filesystem of the guest."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator
from dataclasses import dataclass

from mullion.base.errors import InvalidError


class Kind(enum.Enum):
    FOLDER = "folder"
    FILE = "file"
    LINK = "link"
    CHARACTER = "character"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file. `content` is a link's target or a file's bytes; `device` the numbers of a character device."""

    kind: Kind
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


class Tree:
    """Entries by path: relative, `/` between names, no `.` or `..`; folders above an entry come by themselves."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def add(self, path: str, entry: Entry) -> None:
        """Put an entry, in place of one of the same path.

        Raises: InvalidError for a path that leaves the tree, or runs through something that is not a folder.
        """
        names = path.split("/")
        if any(name in ("", ".", "..") for name in names):
            raise InvalidError(f"{path!r} is not a path within the guest", path=path)
        for depth in range(1, len(names)):
            above = self._entries.setdefault("/".join(names[:depth]), Entry(Kind.FOLDER, 0o755))
            if above.kind is not Kind.FOLDER:
                raise InvalidError(f"{path!r}: {'/'.join(names[:depth])!r} is not a folder in the guest", path=path)
        present = self._entries.get(path)
        if present is not None and (present.kind is Kind.FOLDER) is not (entry.kind is Kind.FOLDER):
            raise InvalidError(f"{path!r} is there already and only one of the two is a folder", path=path)
        self._entries[path] = entry

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        self.add(path, Entry(Kind.FILE, mode, content))

    def folder(self, path: str, mode: int = 0o755) -> None:
        self.add(path, Entry(Kind.FOLDER, mode))

    def link(self, path: str, target: str) -> None:
        self.add(path, Entry(Kind.LINK, 0o777, target.encode()))

    def items(self) -> Iterator[tuple[str, Entry]]:
        return iter(self._entries.items())

    def __getitem__(self, path: str) -> Entry:
        return self._entries[path]

    def __contains__(self, path: str) -> bool:
        return path in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def copy(self) -> Tree:
        other = Tree()
        other._entries = dict(self._entries)
        return other

    def write_to(self, folder: str) -> None:
        """Create it all below a folder that exists, owned by whoever runs this; character devices are left out."""
        for path, entry in sorted(self._entries.items()):
            target = f"{folder}/{path}"
            match entry.kind:
                case Kind.FOLDER:
                    os.mkdir(target)
                    os.chmod(target, entry.mode)
                case Kind.FILE:
                    with open(target, "xb") as file:
                        file.write(entry.content)
                    os.chmod(target, entry.mode)
                case Kind.LINK:
                    os.symlink(entry.content, target)
                case Kind.CHARACTER:
                    pass
