"""The repositories that are known, their secrets, and the workers that act on them.

A repository's record is in the store; its passphrase and the credentials of its storage are in a file that only the
service reads, and go to a worker by the socket between the two: never into arguments, environment, log or store.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from mullion.base.errors import AlreadyExistsError, ConflictError, InvalidError, MullionError, NotFoundError
from mullion.base.files import replace_file
from mullion.base.paths import HostPaths
from mullion.base.units import utc_now
from mullion.model.views import RepositoryView
from mullion.parent.events import Events
from mullion.parent.operations import Operation
from mullion.parent.store import Condition, Delete, Put, Store
from mullion.services.backup.record import REPOSITORIES, RepositoryRecord
from mullion.services.backup.worker_link import run_worker

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
CREDENTIALS: Final = frozenset(
    {
        "s3_access_key",
        "s3_secret_key",
        "s3_session_token",
        "s3_region",
        "sftp_key_file",
        "sftp_key_passphrase",
        "sftp_password",
        "known_hosts",
    }
)
"""The fields of `repository.credentials.Credentials`, which the service does not import."""
WRONG_KEY: Final = "repository-wrong-key"
"""The code of `repository.errors.WrongKeyError`, likewise."""


class RepositorySource(NamedTuple):
    """Where a repository is, its secret, and the folder for copies of its index: for the process that reads it."""

    url: str
    secret: dict[str, Any]
    index_cache: str


class Repositories:
    """The repositories that backups of this host may go to."""

    def __init__(self, store: Store, events: Events, paths: HostPaths) -> None:
        self._store = store
        self._events = events
        self._paths = paths
        self._known: dict[str, tuple[RepositoryRecord, int]] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def open(self) -> None:
        """Read what is known."""
        for entry in await self._store.list(REPOSITORIES):
            record = RepositoryRecord.decode(entry.value)
            self._known[record.name] = (record, entry.revision)

    def views(self) -> tuple[RepositoryView, ...]:
        """By name."""
        return tuple(
            RepositoryView(record.name, record.url, record.added_at)
            for record, _ in sorted(self._known.values(), key=lambda known: known[0].name)
        )

    async def add(
        self, name: str, url: str, passphrase: str, credentials: Mapping[str, str], *, create: bool
    ) -> RepositoryView:
        """Know a repository from now on; with `create` it is made. The passphrase is kept where only the service reads.

        Raises: InvalidError; AlreadyExistsError; what the repository raises: WrongKeyError, Target… errors.
        """
        if not _NAME.fullmatch(name):
            raise InvalidError(
                f"{name!r} is not a name for a repository",
                remedy="Choose lower-case letters, digits and hyphens, at most 32.",
                field="name",
            )
        _check_place(url)
        secret = _secret(passphrase, credentials)
        async with self.turn(name):  # a second one of that name must not put its secrets over those of the first
            return await self._add(name, url, secret, create=create)

    async def _add(self, name: str, url: str, secret: Mapping[str, object], *, create: bool) -> RepositoryView:
        if name in self._known:
            raise AlreadyExistsError(
                f"there is a repository {name!r} already",
                remedy="Choose another name, or remove that one first: mullion backup repository list",
            )
        said = await self.work({"action": "add", "url": url, "secret": secret, "create": create})
        record = RepositoryRecord(name, url, utc_now(), said["repository_id"])
        await self.write_secret(name, secret)
        revision = await self._store.transact([Condition(record.key, 0)], [Put(record.key, record.encode())])
        self._known[name] = (record, revision)
        self._events.publish("backup.repository-added", f"repository/{name}", {"url": url})
        return RepositoryView(name, url, record.added_at)

    async def change_access(
        self, name: str, *, url: str | None, passphrase: str | None, credentials: Mapping[str, str] | None
    ) -> RepositoryView:
        """Reach a known repository at another place or in another way; what is None stays. It is opened first.

        What waits for it goes on by itself. A crash in between may leave the new secrets with the old place.
        Raises: NotFoundError; InvalidError; ConflictError when it is another repository; as `add`.
        """
        async with self.turn(name):
            return await self._change_access(name, url, passphrase, credentials)

    async def _change_access(
        self, name: str, url: str | None, passphrase: str | None, credentials: Mapping[str, str] | None
    ) -> RepositoryView:
        record, revision = self._find(name)
        known = await asyncio.to_thread(self.source, name)
        secret = _secret(
            known.secret["passphrase"] if passphrase is None else passphrase,
            known.secret["credentials"] if credentials is None else credentials,
        )
        place = record.url if url is None else url
        _check_place(place)
        said = await self.work({"action": "add", "url": place, "secret": secret, "create": False})
        if record.repository_id not in ("", said["repository_id"]):
            raise ConflictError(
                f"what is at {place} is another repository than {name}",
                remedy="Add it under a name of its own: mullion backup repository add NAME PLACE",
            )
        changed = msgspec.structs.replace(record, url=place, repository_id=said["repository_id"])
        await self.write_secret(name, secret)
        revision = await self._store.transact([Condition(record.key, revision)], [Put(record.key, changed.encode())])
        self._known[name] = (changed, revision)
        self._events.publish("backup.repository-changed", f"repository/{name}", {"url": place})
        return RepositoryView(name, place, record.added_at)

    async def remove(self, name: str) -> None:
        """Forget a repository and its secrets; its files stay. Raises: NotFoundError."""
        async with self.turn(name):
            await self._remove(name)

    async def _remove(self, name: str) -> None:
        record, revision = self._find(name)
        await self._store.transact([Condition(record.key, revision)], [Delete(record.key)])
        del self._known[name]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._secret_path(name))
        # What a worker puts there meanwhile stays: nobody can read it, and another repository of that name drops it.
        await asyncio.to_thread(shutil.rmtree, self._paths.index_cache(name), ignore_errors=True)
        self._events.publish("backup.repository-removed", f"repository/{name}")

    def _find(self, name: str) -> tuple[RepositoryRecord, int]:
        try:
            return self._known[name]
        except KeyError:
            raise NotFoundError(
                f"there is no repository {name!r}",
                remedy="Add one: mullion backup repository add NAME PLACE; those known: mullion backup repository list",
            ) from None

    def choose(self, name: str | None) -> str:
        """The repository that is named, or the only one. Raises: NotFoundError; InvalidError."""
        if name is not None:
            return self._find(name)[0].name
        if len(self._known) == 1:
            return next(iter(self._known))
        names = ", ".join(sorted(self._known))
        raise InvalidError(
            "which repository?" if names else "no repository is known",
            remedy=f"Name one: {names}." if names else "Add one: mullion backup repository add NAME PLACE --create",
            field="repository",
        )

    def source(self, repository: str | None) -> RepositorySource:
        """What a process needs to open a repository. Raises: as `choose`."""
        record, _ = self._find(self.choose(repository))
        kept = self._read_secret(record.name)
        secret = {field: kept[field] for field in ("passphrase", "credentials")}
        return RepositorySource(record.url, secret, self._paths.index_cache(record.name))

    async def ask(
        self, repository: str, action: str, operation: Operation | None = None, **arguments: object
    ) -> Mapping[str, Any]:
        """Have a worker act on a repository, and again when its passphrase was changed just then.

        Raises: what it ends with.
        """
        source = self.source(repository)
        try:
            return await self.work({"action": action, **source._asdict(), **arguments}, operation)
        except MullionError as error:
            changed = self.source(repository)
            if error.code != WRONG_KEY or changed.secret == source.secret:
                raise
        return await self.work({"action": action, **changed._asdict(), **arguments}, operation)

    async def work(self, request: Mapping[str, object], operation: Operation | None = None) -> Mapping[str, Any]:
        """Have a worker carry out a request, and the operation say how far it is. Raises: what it ends with."""

        def tell(stage: str, done: int, total: int) -> None:
            if operation is not None:
                operation.stage(stage, done / total if total else None)

        return await run_worker(request, self._paths.log, tell)

    def _secret_path(self, name: str) -> str:
        return f"{self._paths.secrets}/repository-{name}.json"

    def turn(self, name: str) -> asyncio.Lock:
        """Who holds it may read a repository's secret file and write it again; others read what is there."""
        return self._turns[name]

    async def read_secret(self, name: str) -> dict[str, Any]:
        """All that a known repository's secret file says. Raises: NotFoundError."""
        return await asyncio.to_thread(self._read_secret, self._find(name)[0].name)

    async def write_secret(self, name: str, secret: Mapping[str, object]) -> None:
        """Durably: a crash leaves what was there or this."""
        await asyncio.to_thread(self._write_secret, name, secret)

    def _read_secret(self, name: str) -> dict[str, Any]:
        with open(self._secret_path(name), "rb") as file:
            secret: dict[str, Any] = json.loads(file.read())
        return secret

    def _write_secret(self, name: str, secret: Mapping[str, object]) -> None:
        os.makedirs(self._paths.secrets, mode=0o700, exist_ok=True)
        replace_file(self._secret_path(name), json.dumps(secret).encode(), mode=0o600)


def _check_place(url: str) -> None:
    """Raises: InvalidError for a folder whose place depends on where a process happens to be."""
    if not url.startswith("/") and "://" not in url:
        raise InvalidError(
            f"{url!r} is no place for a repository: a folder is named by its absolute path",
            remedy="Write /srv/backup, sftp://user@host/folder, s3://bucket/prefix or s3+https://host/bucket/prefix.",
            field="url",
        )


def _secret(passphrase: str, credentials: Mapping[str, str]) -> dict[str, Any]:
    """What is kept of how a repository is opened. Raises: InvalidError."""
    unknown = set(credentials) - CREDENTIALS
    if unknown:
        raise InvalidError(
            f"credentials of no storage: {', '.join(sorted(unknown))}",
            remedy=f"Known are: {', '.join(sorted(CREDENTIALS))}.",
            field="credentials",
        )
    return {"passphrase": passphrase, "credentials": dict(credentials)}
