"""From a repository's URL to the storage behind it."""

from __future__ import annotations

from collections.abc import Mapping

from mullion.base.errors import InvalidError
from mullion.repository import Backend
from mullion.repository.local import FolderBackend


def check_url(url: str) -> None:
    """Raises: InvalidError for what no storage is behind."""
    if not url.startswith("/"):
        raise InvalidError(
            f"{url!r} is not a place for a repository",
            remedy="Give a folder by its absolute path.",
            field="url",
        )


def open_target(url: str, secret: Mapping[str, str], *, create: bool = False) -> Backend:
    """The storage; with `create` its folder is made when it is not there.

    Raises: InvalidError; what the storage raises.
    """
    check_url(url)
    return FolderBackend.create(url) if create else FolderBackend(url)
