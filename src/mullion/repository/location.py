"""Where a repository is, as people write it.

| text | place |
|---|---|
| `/srv/backup`, `file:///srv/backup` | a folder of this host |
| `sftp://[user@]host[:port]/folder` | below the root folder of the server; `/~/folder` below the user's own |
| `s3://bucket[/prefix]` | AWS |
| `s3+https://host[:port]/bucket[/prefix]`, `s3+http://…` | any other service |

No secret has a place in it: one that has a password is refused.
"""

from __future__ import annotations

import os
import re
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from mullion.base.errors import InvalidError
from mullion.repository.backend import Backend, Persistent
from mullion.repository.credentials import Credentials
from mullion.repository.index_cache import IndexCache
from mullion.repository.local import FolderBackend
from mullion.repository.repository import Repository

_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX: Final = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*")
_SECRET: Final = re.compile(r"(://[^/:@]*):.*@")
_FORMS: Final = "Write /folder, sftp://user@host/folder, s3://bucket/prefix or s3+https://host/bucket/prefix."


def open_backend(text: str, credentials: Credentials | None = None, *, create: bool = False) -> Backend:
    """The storage of a place; with `create` a folder is made when it is not there.

    Raises: InvalidError when the text is no place; Target… errors.
    """
    credentials = credentials or Credentials()
    if text.startswith("/") or "://" not in text:
        return _folder(text, create=create)
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:  # which says what it met: that may be a part of a password
        raise InvalidError(
            f"{_shown(text)!r} is not a place: no host and port can be read in it", remedy=_FORMS
        ) from None
    if url.password is not None:
        raise InvalidError(
            f"the place {url.scheme}://{url.username}:…@{url.hostname} has a password in it",
            remedy="Leave it out of the place: name a credentials file that has it.",
        )
    if url.query or url.fragment:
        raise InvalidError(f"{_shown(text)!r} has a query or a fragment", remedy=_FORMS)
    match url.scheme:
        case "file" if not url.netloc:
            return _folder(unquote(url.path), create=create)
        case "sftp" if url.hostname:
            from mullion.repository.sftp import SftpBackend

            path = unquote(url.path)
            folder = path.removeprefix("/~/") if path.startswith("/~/") else path
            if folder.strip("/"):
                return Persistent(SftpBackend(url.hostname, folder, credentials, user=url.username, port=port or 22))
        case "s3" | "s3+https" | "s3+http" if url.hostname:
            return Persistent(_bucket(text, url, credentials))
    raise InvalidError(f"{_shown(text)!r} is not a place for a repository", remedy=_FORMS)


def open_repository(
    text: str, passphrase: str, credentials: Credentials, *, index_folder: str | None = None
) -> Repository:
    """The repository that is at a place; a far one's index is copied into a folder, and not fetched again each time.

    Raises: as `open_backend` and `Repository.open`.
    """
    index_cache = None if index_folder is None else index_cache_of(text, index_folder)
    return Repository.open(open_backend(text, credentials), passphrase, index_cache=index_cache)


def index_cache_of(text: str, folder: str) -> IndexCache | None:
    """The copies of a place's index in a folder; none for a place that is a folder itself, and as near."""
    is_folder = text.startswith(("/", "file:")) or "://" not in text
    return None if is_folder else IndexCache(folder)


def _shown(text: str) -> str:
    """A place as an error may show it: without what could be a password in it, however it is cut."""
    return _SECRET.sub(r"\1:…@", text)


def _folder(path: str, *, create: bool) -> Backend:
    if not path or "\0" in path:
        raise InvalidError("an empty text is no place for a repository", remedy=_FORMS)
    path = os.path.abspath(path)
    return FolderBackend.create(path) if create else FolderBackend(path)


def _bucket(text: str, url: SplitResult, credentials: Credentials) -> Backend:
    from mullion.repository.s3 import S3Backend

    path = unquote(url.path).strip("/")
    if url.scheme == "s3":
        endpoint, bucket, prefix = None, url.netloc, path
    else:
        endpoint = f"{url.scheme.removeprefix('s3+')}://{url.netloc}"
        bucket, _, prefix = path.partition("/")
    if not _BUCKET.fullmatch(bucket) or (prefix and not _PREFIX.fullmatch(prefix)) or ".." in prefix.split("/"):
        raise InvalidError(
            f"{_shown(text)!r} names no bucket, or a prefix that is not letters, digits, `.`, `_`, `-`", remedy=_FORMS
        )
    return S3Backend(bucket, prefix, credentials, endpoint=endpoint)
