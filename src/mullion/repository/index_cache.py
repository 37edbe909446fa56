"""Copies of index segments on this host, so that a far repository's index is not fetched each time.

A copy is the sealed object as the storage has it, in a file of the segment's name: nothing in the folder can be read
without the repository's secret, and nothing is believed that was not sealed with it under that very name. What is
damaged, or of another repository, is dropped and fetched again; what the storage has no more goes too. A cache that
cannot be written is told of, and costs nothing but time.

Not handled: two repositories in one folder, which would take away each other's copies.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from typing import Final

from mullion.base.files import replace_file
from mullion.base.units import GIB

log = logging.getLogger(__name__)

LIMIT_BYTES: Final = 2 * GIB
"""Of all copies in a folder; segments that do not fit are fetched each time. 48 bytes a chunk: 2.7 TiB of content."""
_SEGMENT_NAME: Final = re.compile(r"index/([0-9a-f]{32})")
_FILE_NAME: Final = re.compile(r"[0-9a-f]{32}(?:\.new)?")


class IndexCache:
    """The copies in a folder, which is made when the first is put. Several processes may use it at the same time."""

    def __init__(self, folder: str, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = folder
        self._limit_bytes = limit_bytes

    def get(self, name: str) -> bytes | None:
        """The copy of an object, unjudged; None when there is none."""
        if (path := self._path(name)) is None:
            return None
        try:
            with open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: the copy cannot be read: %s", path, error)
            return None

    def put(self, name: str, sealed: bytes) -> None:
        """Keep a copy, when there is room for it."""
        if (path := self._path(name)) is None:
            return
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            if self._size_bytes() + len(sealed) <= self._limit_bytes:
                replace_file(path, sealed, durable=False, mode=0o600)
        except OSError as error:
            log.warning("%s: an index segment is not kept here, and fetched again the next time: %s", path, error)

    def drop(self, name: str) -> None:
        """Take a copy away; one that is not there is no error."""
        if (path := self._path(name)) is not None:
            self._unlink(path)

    def keep(self, names: Collection[str]) -> None:
        """Take away all copies but those of some objects."""
        for found in self._files():
            if f"index/{found}" not in names:
                self._unlink(f"{self.folder}/{found}")

    def _path(self, name: str) -> str | None:
        """Where a copy would be; None for what is not named as we name segments."""
        match = _SEGMENT_NAME.fullmatch(name)
        return None if match is None else f"{self.folder}/{match[1]}"

    def _files(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.folder) if _FILE_NAME.fullmatch(name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            log.warning("%s: the copies of the index cannot be listed: %s", self.folder, error)
            return []

    def _size_bytes(self) -> int:
        total = 0
        for found in self._files():
            try:
                total += os.lstat(f"{self.folder}/{found}").st_size
            except FileNotFoundError:
                continue  # another process has taken it away
        return total

    def _unlink(self, path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("%s: the copy cannot be taken away: %s", path, error)
