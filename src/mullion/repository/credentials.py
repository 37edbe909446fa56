"""Secrets on their way in: from files that nobody else may read and from the environment; never from a command line.

A credentials file is TOML with any of the names of `Credentials`. Its mode must be 0600 or stricter.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Final, Self

from mullion.base.errors import InvalidError
from mullion.base.units import KIB
from mullion.repository.errors import SecretFileError

PASSPHRASE_VARIABLE: Final = "MULLION_REPOSITORY_PASSPHRASE"  # noqa: S105 - the name of it
_LIMIT_BYTES: Final = 64 * KIB
_VARIABLES: Final[Mapping[str, str]] = {
    "s3_access_key": "AWS_ACCESS_KEY_ID",
    "s3_secret_key": "AWS_SECRET_ACCESS_KEY",
    "s3_session_token": "AWS_SESSION_TOKEN",
    "s3_region": "AWS_REGION",
    "sftp_key_passphrase": "MULLION_SFTP_KEY_PASSPHRASE",
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a storage wants to see. Secrets are never shown."""

    s3_access_key: str = ""
    s3_secret_key: str = field(default="", repr=False)
    s3_session_token: str = field(default="", repr=False)
    s3_region: str = "us-east-1"
    sftp_key_file: str = ""
    sftp_key_passphrase: str = field(default="", repr=False)
    sftp_password: str = field(default="", repr=False)
    known_hosts: str = os.path.expanduser("~/.ssh/known_hosts")

    @classmethod
    def load(cls, path: str | None = None, environ: Mapping[str, str] = os.environ) -> Self:
        """From a file, and from the environment what the file does not have.

        Raises: SecretFileError; InvalidError for a file that is not such TOML.
        """
        values = {name: environ[variable] for name, variable in _VARIABLES.items() if environ.get(variable)}
        if path is not None:
            values |= _parse(path, {field.name for field in fields(cls)})
        return cls(**values)


def read_secret_file(path: str) -> str:
    """The first line of a file that only its owner can read.

    Raises: SecretFileError.
    """
    secret = _read(path).partition("\n")[0].rstrip("\r")
    if not secret:
        raise SecretFileError(f"{path} has an empty first line", path=path)
    return secret


def find_passphrase(path: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """A repository's passphrase from a file, or from MULLION_REPOSITORY_PASSPHRASE; None when there is neither.

    Raises: SecretFileError.
    """
    return read_secret_file(path) if path is not None else environ.get(PASSPHRASE_VARIABLE) or None


def _parse(path: str, known: set[str]) -> dict[str, str]:
    try:
        found = tomllib.loads(_read(path))
    except tomllib.TOMLDecodeError as error:
        raise InvalidError(f"{path} is not TOML: {error}", path=path) from error
    for name, value in found.items():
        if name not in known or not isinstance(value, str):
            raise InvalidError(
                f"{path}: {name} is not known, or not a text",
                remedy=f"Known are: {', '.join(sorted(known))}.",
                path=path,
            )
    return found


def _read(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SecretFileError(f"{path} cannot be read: {error.strerror}", path=path) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SecretFileError(f"{path} is not a regular file", path=path)
        if status.st_mode & 0o077:
            raise SecretFileError(f"{path} may be read by others (mode {stat.S_IMODE(status.st_mode):04o})", path=path)
        content = os.read(fd, _LIMIT_BYTES + 1)
    finally:
        os.close(fd)
    if len(content) > _LIMIT_BYTES:
        raise SecretFileError(f"{path} has more than 64 KiB", path=path)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise SecretFileError(f"{path} is not text", path=path) from error
