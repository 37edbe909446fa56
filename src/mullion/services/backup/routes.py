"""REST of backups: `/1.0/backups`, `/1.0/repositories`."""

from __future__ import annotations

from typing import Annotated, Final

from litestar import Response, delete, get, post
from litestar.params import JSONBody, PathParameter, QueryParameter
from msgspec import Meta, Struct

from mullion.model.views import BackupView, OperationView, RepositoryView
from mullion.parent.api import PathName, Service, accepted
from mullion.services.backup.controller import BackupController

_TAGS: Final = ["backups"]
_Repository = Annotated[str | None, QueryParameter(description="a repository; not needed when only one is known")]
_BackupId = Annotated[str, PathParameter(description="a backup's id, or its beginning", max_length=64)]
_Count = Annotated[int, Meta(ge=0, le=10_000)]


class NewRepository(Struct, frozen=True, forbid_unknown_fields=True):
    """A repository to be known: `url` is a folder's absolute path, `sftp://…` or `s3://…`; `create` makes it.

    `credentials` are those of the storage, by the names that it uses.
    """

    name: str
    url: Annotated[str, Meta(min_length=1, max_length=4096)]
    passphrase: Annotated[str, Meta(min_length=1, max_length=1024)]
    credentials: dict[str, str] = {}
    create: bool = False


class Access(Struct, frozen=True, forbid_unknown_fields=True):
    """How a known repository is reached from now on; what is left out stays as it is."""

    url: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    passphrase: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    credentials: dict[str, str] | None = None


class NewPassphrase(Struct, frozen=True, forbid_unknown_fields=True):
    """What opens a repository from now on, in place of what did."""

    passphrase: Annotated[str, Meta(min_length=1, max_length=1024)]


class NewBackup(Struct, frozen=True, forbid_unknown_fields=True):
    """`consistent` freezes the guest's filesystems for an instant; `full` reads everything again."""

    partition: str
    repository: str | None = None
    consistent: bool = False
    full: bool = False


class Verification(Struct, frozen=True, forbid_unknown_fields=True):
    """`read_data` reads every chunk; `part` and `of` read only that share of them: one a day is a scrub."""

    repository: str | None = None
    read_data: bool = True
    part: Annotated[int, Meta(ge=0)] = 0
    of: Annotated[int, Meta(ge=1, le=1000)] = 1


class Repairing(Struct, frozen=True, forbid_unknown_fields=True):
    """`read_data` reads every chunk; `discard` deletes damaged packs, once what is whole in them is copied."""

    repository: str | None = None
    read_data: bool = True
    discard: bool = False


class Keep(Struct, frozen=True, forbid_unknown_fields=True):
    """How many backups of a partition each rule keeps; what one keeps is kept."""

    last: _Count = 0
    hourly: _Count = 0
    daily: _Count = 0
    weekly: _Count = 0
    monthly: _Count = 0
    yearly: _Count = 0


def keep_rules(keep: Keep) -> dict[str, int]:
    """By their names."""
    return {name: getattr(keep, name) for name in keep.__struct_fields__}


class Pruning(Struct, frozen=True, forbid_unknown_fields=True):
    """Backups to be forgotten: those named in `forget`, or those that no rule of `keep` keeps."""

    repository: str | None = None
    partition: str | None = None
    keep: Keep = Keep()
    forget: tuple[str, ...] = ()
    dry_run: bool = False


class Restoration(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole partition, under `name` or the one it had; or one `disk` into a new file `path`.

    An `instant` partition can be started at once: its blocks come while it runs.
    """

    repository: str | None = None
    name: str | None = None
    disk: str | None = None
    path: str | None = None
    instant: bool = False


@get("/1.0/repositories", tags=_TAGS)
async def list_repositories(backups: Service[BackupController]) -> list[RepositoryView]:
    """The repositories that are known."""
    return list(backups.repositories.views())


@post("/1.0/repositories", tags=_TAGS)
async def add_repository(backups: Service[BackupController], data: JSONBody[NewRepository]) -> Response[RepositoryView]:
    """Know a repository from now on, or make it."""
    view = await backups.repositories.add(data.name, data.url, data.passphrase, data.credentials, create=data.create)
    return Response(view, status_code=201)


@post("/1.0/repositories/{name:str}/access", tags=_TAGS)
async def change_access(
    name: PathName, backups: Service[BackupController], data: JSONBody[Access]
) -> Response[RepositoryView]:
    """Reach a known repository at another place, or with other secrets; it has to be the same one."""
    view = await backups.repositories.change_access(
        name, url=data.url, passphrase=data.passphrase, credentials=data.credentials
    )
    return Response(view, status_code=200)


@post("/1.0/repositories/{name:str}/passphrase", tags=_TAGS, status_code=202)
async def change_passphrase(
    name: PathName, backups: Service[BackupController], data: JSONBody[NewPassphrase]
) -> Response[OperationView]:
    """Let another passphrase open a repository, for everybody; the one that it had does so no more."""
    return accepted(await backups.passphrases.begin(name, data.passphrase))


@delete("/1.0/repositories/{name:str}", tags=_TAGS)
async def remove_repository(backups: Service[BackupController], name: PathName) -> None:
    """Forget a repository; what is in it stays."""
    await backups.remove_repository(name)


@get("/1.0/backups", tags=_TAGS)
async def list_backups(
    backups: Service[BackupController],
    repository: _Repository = None,
    partition: Annotated[str | None, QueryParameter(description="only those of this partition")] = None,
) -> list[BackupView]:
    """The backups in a repository, oldest first."""
    return list(await backups.list(repository, partition))


@post("/1.0/backups", tags=_TAGS, status_code=202)
async def create_backup(backups: Service[BackupController], data: JSONBody[NewBackup]) -> Response[OperationView]:
    """Back a partition up."""
    return accepted(await backups.create(data.partition, data.repository, consistent=data.consistent, full=data.full))


@get("/1.0/backups/{backup:str}", tags=_TAGS)
async def show_backup(
    backups: Service[BackupController], backup: _BackupId, repository: _Repository = None
) -> BackupView:
    """One backup."""
    return await backups.show(repository, backup)


@post("/1.0/backups/{backup:str}/restore", tags=_TAGS, status_code=202)
async def restore_backup(
    backups: Service[BackupController], backup: _BackupId, data: JSONBody[Restoration | None] = None
) -> Response[OperationView]:
    """Bring a partition back as a new one, or one disk into a new file."""
    wanted = data or Restoration()
    return accepted(
        await backups.restore(
            wanted.repository,
            backup,
            name=wanted.name,
            disk=wanted.disk,
            path=wanted.path,
            instant=wanted.instant,
        )
    )


@post("/1.0/backups/verify", tags=_TAGS, status_code=202)
async def verify_backups(
    backups: Service[BackupController], data: JSONBody[Verification | None] = None
) -> Response[OperationView]:
    """Check a repository."""
    wanted = data or Verification()
    return accepted(await backups.verify(wanted.repository, read_data=wanted.read_data, part=(wanted.part, wanted.of)))


@post("/1.0/backups/repair", tags=_TAGS, status_code=202)
async def repair_backups(
    backups: Service[BackupController], data: JSONBody[Repairing | None] = None
) -> Response[OperationView]:
    """Make a repository's index again from its packs, and leave damaged ones behind."""
    wanted = data or Repairing()
    return accepted(await backups.repair(wanted.repository, read_data=wanted.read_data, discard=wanted.discard))


@post("/1.0/backups/prune", tags=_TAGS, status_code=202)
async def prune_backups(backups: Service[BackupController], data: JSONBody[Pruning]) -> Response[OperationView]:
    """Forget backups, and delete what no other needs."""
    return accepted(
        await backups.prune(
            data.repository,
            partition=data.partition,
            keep=keep_rules(data.keep),
            forget=data.forget,
            dry_run=data.dry_run,
        )
    )


ROUTES: Final = (
    list_repositories,
    add_repository,
    change_access,
    change_passphrase,
    remove_repository,
    list_backups,
    create_backup,
    show_backup,
    restore_backup,
    verify_backups,
    repair_backups,
    prune_backups,
)
