"""What a backup repository refuses, and how each refusal is known.

`DamagedError` is about bytes that are there and wrong; `Target…` about the way to them. The context says which
repository (`repository`), which object in it (`object`) and where (`offset`, bytes from the object's start).
"""

from __future__ import annotations

from mullion.base.errors import (
    AlreadyExistsError,
    ConflictError,
    DeadlineError,
    DeniedError,
    MullionError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
)


class RepositoryDamagedError(MullionError):
    """An object of the repository is missing, cut or changed: what it held is not given out."""

    code = "repository-damaged"
    exit_code = 8
    http_status = 422
    default_remedy = (
        "`mullion backup verify` says which backups are hurt. Restore from another one; `mullion backup repair` and "
        "then a full backup of the same disk (`mullion backup create PARTITION --full`) store again what was lost."
    )

    def __init__(
        self,
        message: str,
        *,
        repository: str | None = None,
        name: str | None = None,
        offset: int | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy, repository=repository, object=name, offset=offset)
        self.name = name
        self.offset = offset


class RepositoryMissingError(NotFoundError):
    """There is no repository at this place."""

    code = "repository-missing"
    default_remedy = (
        "Check the place's spelling, and that its storage is mounted; a new repository is made by adding it with "
        "`--create`."
    )


class RepositoryExistsError(AlreadyExistsError):
    """There is a repository, or something else, at this place already."""

    code = "repository-exists"
    default_remedy = "Use the repository that is there, or choose an empty place."


class WrongKeyError(DeniedError):
    """The passphrase opens none of the repository's keys."""

    code = "repository-wrong-key"
    default_remedy = (
        "Give the passphrase that opens it now; without it nothing in it can be read. Where it was changed on another "
        "host, tell this one: mullion backup repository set NAME --passphrase-file FILE"
    )


class SecretFileError(DeniedError):
    """A file that holds a secret may be read by others, or holds none."""

    code = "repository-secret-file"
    default_remedy = "Let only its owner read it (chmod 600), with the secret in its first line."


class RepositoryBusyError(ConflictError):
    """Somebody else works on the repository in a way that excludes this."""

    code = "repository-busy"
    default_remedy = "Wait until the other has ended, then try again; a holder that died is passed over by itself."


class LeaseLostError(ConflictError):
    """This process was away for so long that others took it for dead, and may have deleted what it built on."""

    code = "repository-lease-lost"
    default_remedy = "Start the backup again: what it stored already is used."


class TargetUnreachableError(UnavailableError):
    """The storage that holds the repository cannot be reached, or went away."""

    code = "target-unreachable"
    default_remedy = (
        "Check the network and the server that the message names, then start again: what was stored already is used."
    )


class TargetTimeoutError(DeadlineError):
    """The storage that holds the repository took too long to answer."""

    code = "target-timeout"
    default_remedy = "Look into the load of the server that the message names, then start again."


class TargetDeniedError(DeniedError):
    """The storage that holds the repository does not accept the credentials, or not this use."""

    code = "target-denied"
    default_remedy = "Check the user, the key or the access key for this place, and what they may do there."


class TargetFullError(NoSpaceError):
    """The storage that holds the repository is full, or the quota is used up."""

    code = "target-full"
    default_remedy = (
        "Make room there, or take away old backups with `mullion backup prune`, then start again: what was stored "
        "already is used, and no backup was harmed."
    )


class HostKeyError(DeniedError):
    """The SFTP server's host key is not the one that is known, or none is known."""

    code = "target-host-key"
    default_remedy = (
        "If you know the server's key to be right, put it into the known_hosts file that the message names "
        "(ssh-keyscan)."
    )


class TargetFaultError(UnavailableError):
    """The storage that holds the repository answered with a fault that says neither "denied" nor "full"."""

    code = "target-fault"
    default_remedy = "The message has the storage's own words: mend it there, then start again."
