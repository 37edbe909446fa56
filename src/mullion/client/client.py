"""The typed client of the REST API: for the command line, tests and, later, other hosts.

Every method raises what the service answers, as the same class of MullionError with its remedy and context, and
UnavailableError when no service answers. Each POST carries an Idempotency-Key, so that a lost answer can be asked for
again without doing the thing twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from mullion.base.errors import (
    MullionError,
    NotFoundError,
    OperationCancelledError,
    OperationFailedError,
    UnavailableError,
)
from mullion.client.transport import Answer, Body, Transport
from mullion.model.definition import PartitionDefinition
from mullion.model.states import OperationState
from mullion.model.views import (
    BackupScheduleView,
    BackupView,
    CheckpointScheduleView,
    CheckpointTreeView,
    CheckpointView,
    DiskView,
    ErrorView,
    EventView,
    ExportView,
    FileVolumeView,
    ImageView,
    OperationView,
    PartitionView,
    ProviderView,
    RepositoryView,
    StatusView,
    TraceView,
)

if TYPE_CHECKING:
    from mullion.base.settings import Settings
    from mullion.client.console import Console

TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.5
_PAGE: Final = 1000
_SILENCE_S: Final = 60.0
_BACKUP_SILENCE_S: Final = 330.0
"""A repository may be far away, and its index long."""
_T = TypeVar("_T")


class _EventPage(msgspec.Struct):
    events: list[EventView]
    cursor: int
    truncated: bool = False


class Client:
    """A service, seen from outside. Not for several threads at once; close it, or use it in a `with` block."""

    def __init__(
        self, url: str = "", *, token: str = "", socket_path: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._transport = Transport(socket_path=socket_path, url=url, token=token)
        self._timeout_s = timeout_s

    @classmethod
    def local(cls, settings: Settings, *, socket: str | None = None) -> Client:
        """The service of this host, over its unix socket."""
        from mullion.base.paths import HostPaths

        data_dir, run_dir = os.path.abspath(settings.data_dir), os.path.abspath(settings.run_dir)
        return cls(socket_path=socket or HostPaths(data_dir, run_dir).api_socket)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    # Service

    def status(self) -> StatusView:
        return self._get("/status", StatusView)

    # Partitions

    def partitions(self) -> list[PartitionView]:
        return self._get("/partitions", list[PartitionView])

    def partition(self, name: str) -> PartitionView:
        return self._get(f"/partitions/{_part(name)}", PartitionView)

    def create_partition(self, definition: PartitionDefinition, *, idempotency_key: str | None = None) -> PartitionView:
        return self._post("/partitions", definition, PartitionView, idempotency_key)

    def update_partition(self, name: str, definition: PartitionDefinition, etag: str) -> PartitionView:
        """Replace a definition; `etag` is that of the view which it was made from.

        Raises: PreconditionError when it was changed since.
        """
        answer = self._ask("PUT", f"/partitions/{_part(name)}", definition, {"If-Match": _quoted(etag)})
        return _decoded(answer, PartitionView)

    def delete_partition(self, name: str, *, with_disks: bool = False, etag: str = "*") -> None:
        query = "?with_disks=true" if with_disks else ""
        self._ask("DELETE", f"/partitions/{_part(name)}{query}", None, {"If-Match": _quoted(etag)})

    def partition_action(self, name: str, action: str, **options: object) -> OperationView:
        """Begin start, stop, pause, resume, reset or turn-off."""
        given = {name: value for name, value in options.items() if value is not None}
        return self._post(f"/partitions/{_part(name)}/{_part(action)}", given, OperationView)

    def console(self, name: str) -> Console:
        """Connect to a partition's serial console."""
        from mullion.client.console import Console

        return Console.open(self._transport, f"/1.0/partitions/{_part(name)}/console", self._timeout_s)

    # Providers

    def provider(self, partition: str) -> ProviderView:
        """The process that serves a partition's disks. Raises: StateError when there is none."""
        return self._get(f"/partitions/{_part(partition)}/provider", ProviderView)

    def start_trace(self, partition: str, disk: str | None = None) -> TraceView:
        """Begin to record requests; what is recorded is taken by `read_trace`."""
        return self._post(f"/partitions/{_part(partition)}/provider/trace", {"disk": disk}, TraceView)

    def read_trace(self, partition: str, disk: str | None = None) -> TraceView:
        """What was recorded since the last look."""
        return self._get(f"/partitions/{_part(partition)}/provider/trace{_query(disk=disk)}", TraceView)

    def stop_trace(self, partition: str, disk: str | None = None) -> None:
        self._ask("DELETE", f"/partitions/{_part(partition)}/provider/trace{_query(disk=disk)}", None, {})

    def set_faults(self, partition: str, disk: str, rules: Sequence[dict[str, object]]) -> ProviderView:
        """Have a disk fail by these rules; none ends it. Raises: StateError where it is not allowed."""
        path = f"/partitions/{_part(partition)}/provider/faults"
        return self._post(path, {"disk": disk, "rules": rules}, ProviderView)

    def upgrade_provider(self, partition: str) -> OperationView:
        """Replace a provider by one of the code that is installed now, under its guest."""
        return self._post(f"/partitions/{_part(partition)}/provider/upgrade", {}, OperationView)

    def resize_disk(self, partition: str, disk: str, size_bytes: int) -> OperationView:
        """Make a disk of a partition that runs larger."""
        path = f"/partitions/{_part(partition)}/disks/{_part(disk)}/resize"
        return self._post(path, {"size_bytes": size_bytes}, OperationView)

    # Checkpoints

    def checkpoints(self, partition: str) -> CheckpointTreeView:
        return self._get(f"/partitions/{_part(partition)}/checkpoints", CheckpointTreeView)

    def set_merge_rate(self, partition: str, bytes_per_s: int | None) -> CheckpointTreeView:
        """How fast its layers may be merged, from now on; 0 is without a limit, None the service's setting."""
        path = f"/partitions/{_part(partition)}/merge-rate"
        return _decoded(self._ask("PUT", path, {"bytes_per_s": bytes_per_s}, {}), CheckpointTreeView)

    def checkpoint(self, partition: str, name: str) -> CheckpointView:
        return self._get(f"/partitions/{_part(partition)}/checkpoints/{_part(name)}", CheckpointView)

    def create_checkpoint(
        self,
        partition: str,
        name: str | None = None,
        *,
        memory: bool = False,
        consistent: bool = False,
        description: str = "",
    ) -> OperationView:
        fields = {"name": name, "memory": memory, "consistent": consistent, "description": description}
        return self._post(f"/partitions/{_part(partition)}/checkpoints", fields, OperationView)

    def apply_checkpoint(
        self, partition: str, name: str, *, keep_present: bool = False, keep_as: str | None = None
    ) -> OperationView:
        """Go back; `keep_present` keeps what is there now as a checkpoint, which is named `keep_as`."""
        path = f"/partitions/{_part(partition)}/checkpoints/{_part(name)}/apply"
        return self._post(path, {"keep_present": keep_present, "keep_as": keep_as}, OperationView)

    def delete_checkpoint(self, partition: str, name: str) -> OperationView:
        """It is gone at once; the operation lasts until its layers are merged."""
        answer = self._ask("DELETE", f"/partitions/{_part(partition)}/checkpoints/{_part(name)}", None, {})
        return _decoded(answer, OperationView)

    def export_checkpoint(
        self, partition: str, name: str, *, since: str | None = None, listen: str | None = None, tls: str | None = None
    ) -> ExportView:
        path = f"/partitions/{_part(partition)}/checkpoints/{_part(name)}/export"
        return self._post(path, {"since": since, "listen": listen, "tls": tls}, ExportView)

    def exports(self) -> list[ExportView]:
        return self._get("/exports", list[ExportView])

    def end_export(self, partition: str, export: str) -> None:
        self._ask("DELETE", f"/partitions/{_part(partition)}/exports/{_part(export)}", None, {})

    def checkpoint_schedules(self, partition: str) -> list[CheckpointScheduleView]:
        return self._get(f"/partitions/{_part(partition)}/checkpoint-schedules", list[CheckpointScheduleView])

    def set_checkpoint_schedule(
        self,
        partition: str,
        name: str,
        rule: str,
        *,
        keep: int | None = None,
        keep_for_s: int | None = None,
        consistent: bool = False,
        etag: str = "*",
    ) -> CheckpointScheduleView:
        """Make or change one; `rule` as `model.schedule` reads it."""
        path = f"/partitions/{_part(partition)}/checkpoint-schedules/{_part(name)}"
        fields = {"rule": rule, "keep": keep, "keep_for_s": keep_for_s, "consistent": consistent}
        return _decoded(self._ask("PUT", path, fields, {"If-Match": _quoted(etag)}), CheckpointScheduleView)

    def remove_checkpoint_schedule(self, partition: str, name: str, *, etag: str = "*") -> None:
        """Forget one; what it made stays."""
        path = f"/partitions/{_part(partition)}/checkpoint-schedules/{_part(name)}"
        self._ask("DELETE", path, None, {"If-Match": _quoted(etag)})

    # Files inside disks

    def file_volumes(
        self, partition: str, checkpoint: str = "", *, disk: str | None = None, consistent: bool = False
    ) -> list[FileVolumeView]:
        """The volumes of a partition's disks in a checkpoint, or as they are now."""
        query = _query(checkpoint=checkpoint, disk=disk, consistent=consistent)
        return self._get(f"/partitions/{_part(partition)}/files/volumes{query}", list[FileVolumeView])

    def partition_files(
        self,
        partition: str,
        what: str,
        *,
        checkpoint: str = "",
        path: str = "/",
        disk: str | None = None,
        volume: int | None = None,
        recursive: bool = False,
        consistent: bool = False,
    ) -> Body:
        """A `list`, a `file` or a `tree` of a partition's disks, as frames of `media.confined.channel`; close it."""
        query = _query(
            path=path,
            checkpoint=checkpoint,
            disk=disk,
            volume=volume,
            recursive=recursive,
            consistent=consistent,
            form="frames" if what == "list" else None,
            only="file" if what == "file" else None,
        )
        return self._stream(f"/partitions/{_part(partition)}/files/{'list' if what == 'list' else 'tree'}{query}")

    def _stream(self, path: str, silence_s: float = _SILENCE_S) -> Body:
        body = self._transport.stream(f"/1.0{path}", {}, silence_s)
        if isinstance(body, Answer):
            raise _error_of(body)
        return body

    # Backups

    def repositories(self) -> list[RepositoryView]:
        return self._get("/repositories", list[RepositoryView])

    def add_repository(
        self, name: str, url: str, passphrase: str, *, credentials: dict[str, str] | None = None, create: bool = False
    ) -> RepositoryView:
        fields = {
            "name": name,
            "url": url,
            "passphrase": passphrase,
            "credentials": credentials or {},
            "create": create,
        }
        return self._post("/repositories", fields, RepositoryView)

    def change_repository(
        self,
        name: str,
        *,
        url: str | None = None,
        passphrase: str | None = None,
        credentials: dict[str, str] | None = None,
    ) -> RepositoryView:
        """Reach it at another place or with other secrets; what is left out stays."""
        given = {"url": url, "passphrase": passphrase, "credentials": credentials}
        return self._post(f"/repositories/{_part(name)}/access", given, RepositoryView)

    def change_repository_passphrase(self, name: str, passphrase: str) -> OperationView:
        """Let another passphrase open it, for everybody, in place of the one that it has."""
        return self._post(f"/repositories/{_part(name)}/passphrase", {"passphrase": passphrase}, OperationView)

    def remove_repository(self, name: str) -> None:
        self._ask("DELETE", f"/repositories/{_part(name)}", None, {})

    def backups(self, *, repository: str | None = None, partition: str | None = None) -> list[BackupView]:
        return self._get(f"/backups{_query(repository=repository, partition=partition)}", list[BackupView])

    def backup(self, backup: str, *, repository: str | None = None) -> BackupView:
        return self._get(f"/backups/{_part(backup)}{_query(repository=repository)}", BackupView)

    def create_backup(
        self, partition: str, *, repository: str | None = None, consistent: bool = False, full: bool = False
    ) -> OperationView:
        fields = {"partition": partition, "repository": repository, "consistent": consistent, "full": full}
        return self._post("/backups", fields, OperationView)

    def verify_backups(
        self, *, repository: str | None = None, read_data: bool = True, part: int = 0, of: int = 1
    ) -> OperationView:
        fields = {"repository": repository, "read_data": read_data, "part": part, "of": of}
        return self._post("/backups/verify", fields, OperationView)

    def repair_backups(
        self, *, repository: str | None = None, read_data: bool = True, discard: bool = False
    ) -> OperationView:
        fields = {"repository": repository, "read_data": read_data, "discard": discard}
        return self._post("/backups/repair", fields, OperationView)

    def prune_backups(
        self,
        *,
        repository: str | None = None,
        partition: str | None = None,
        keep: dict[str, int] | None = None,
        forget: tuple[str, ...] = (),
        dry_run: bool = False,
    ) -> OperationView:
        """Forget those that are named, or those that no rule of `keep` (last, hourly, daily …) keeps."""
        fields = {
            "repository": repository,
            "partition": partition,
            "keep": keep or {},
            "forget": forget,
            "dry_run": dry_run,
        }
        return self._post("/backups/prune", fields, OperationView)

    def restore_backup(
        self,
        backup: str,
        *,
        repository: str | None = None,
        name: str | None = None,
        disk: str | None = None,
        path: str | None = None,
        instant: bool = False,
    ) -> OperationView:
        """A whole partition as a new one, at once if it is `instant`; or one disk into a new file."""
        fields = {"repository": repository, "name": name, "disk": disk, "path": path, "instant": instant}
        return self._post(f"/backups/{_part(backup)}/restore", fields, OperationView)

    def backup_volumes(
        self, backup: str, *, repository: str | None = None, disk: str | None = None
    ) -> list[FileVolumeView]:
        path = f"/backups/{_part(backup)}/files/volumes{_query(repository=repository, disk=disk)}"
        return self._get(path, list[FileVolumeView])

    def backup_files(
        self,
        backup: str,
        what: str,
        *,
        repository: str | None = None,
        path: str = "/",
        disk: str | None = None,
        volume: int | None = None,
        recursive: bool = False,
    ) -> Body:
        """A `list`, a `file` or a `tree` of a backup's disks, as frames; close it."""
        query = _query(repository=repository, path=path, disk=disk, volume=volume, recursive=recursive)
        return self._stream(f"/backups/{_part(backup)}/files/{what}{query}", _BACKUP_SILENCE_S)

    def backup_schedules(self, partition: str | None = None) -> list[BackupScheduleView]:
        return self._get(f"/backup-schedules{_query(partition=partition)}", list[BackupScheduleView])

    def set_backup_schedule(
        self,
        partition: str,
        name: str,
        rule: str,
        *,
        repository: str | None = None,
        keep: dict[str, int] | None = None,
        consistent: bool = False,
        etag: str = "*",
    ) -> BackupScheduleView:
        """Make or change one; `rule` as `model.schedule` reads it, `keep` as in `prune_backups`."""
        fields = {"rule": rule, "repository": repository, "keep": keep or {}, "consistent": consistent}
        path = _backup_schedule(partition, name)
        return _decoded(self._ask("PUT", path, fields, {"If-Match": _quoted(etag)}), BackupScheduleView)

    def remove_backup_schedule(self, partition: str, name: str, *, etag: str = "*") -> None:
        """Forget one; what it made stays."""
        self._ask("DELETE", _backup_schedule(partition, name), None, {"If-Match": _quoted(etag)})

    # Disks and images

    def disks(self) -> list[DiskView]:
        return self._get("/disks", list[DiskView])

    def disk(self, path: str) -> DiskView:
        """A disk by its path, or by its name in the pool."""
        return self._get(f"/disks/show?{urlencode({'path': path})}", DiskView)

    def create_disk(
        self,
        *,
        path: str,
        size_bytes: int | None = None,
        type: str = "dynamic",  # noqa: A002 - the API's word
        parent: str | None = None,
        block_bytes: int | None = None,
    ) -> DiskView:
        """Make a disk; with `parent` it is a differencing one, whatever `type` says."""
        chosen = type if parent is None else None
        fields = {"path": path, "size_bytes": size_bytes, "type": chosen, "parent": parent, "block_bytes": block_bytes}
        return self._post("/disks", {name: value for name, value in fields.items() if value is not None}, DiskView)

    def delete_disk(self, path: str) -> None:
        self._ask("DELETE", f"/disks?{urlencode({'path': path})}", None, {})

    def images(self) -> list[ImageView]:
        return self._get("/images", list[ImageView])

    def build_image(self, name: str) -> OperationView:
        return self._post("/images", {"name": name}, OperationView)

    # Operations and events

    def operations(self) -> list[OperationView]:
        return self._get("/operations", list[OperationView])

    def operation(self, operation_id: str) -> OperationView:
        return self._get(f"/operations/{_part(operation_id)}", OperationView)

    def cancel(self, operation_id: str) -> OperationView:
        return self._post(f"/operations/{_part(operation_id)}/cancel", None, OperationView)

    def wait(
        self,
        operation: OperationView | str,
        on_progress: Callable[[OperationView], None] | None = None,
        *,
        check: bool = True,
    ) -> OperationView:
        """Wait for an operation's end; `on_progress` sees it about twice a second.

        Raises: with `check`, the error of an operation that failed or was cancelled.
        """
        operation_id = operation if isinstance(operation, str) else operation.id
        wait_s = _POLL_S if on_progress is not None else 30.0
        while True:
            view = self._get(f"/operations/{_part(operation_id)}/wait?timeout_s={wait_s:g}", OperationView)
            if on_progress is not None:
                on_progress(view)
            if view.state.is_final:
                break
        if check and view.state is not OperationState.SUCCEEDED:
            raise operation_error(view)
        return view

    def events(self, after: int = 0, follow: bool = False) -> Iterator[EventView]:
        """Events after a cursor (0: the oldest, -n: the last n); with `follow`, also those to come, until it is closed.

        Where events are no longer kept, one of kind `events.truncated` stands in their place.
        """
        return self._follow(after) if follow else self._read_events(after)

    def _read_events(self, after: int) -> Iterator[EventView]:
        while True:
            page = self._get(f"/events?after={after}&limit={_PAGE}", _EventPage)
            if page.truncated and page.events:
                first = page.events[0]
                yield EventView(first.cursor - 1, first.at, "events.truncated", "events", {"after": after})
            yield from page.events
            if len(page.events) < _PAGE:
                return
            after = page.cursor

    def _follow(self, after: int) -> Iterator[EventView]:
        lines = self._transport.lines(f"/1.0/events/stream?after={after}", {}, _SILENCE_S)
        if isinstance(lines, Answer):
            raise _error_of(lines)
        for line in lines:
            yield msgspec.json.decode(line, type=EventView)

    # The wire

    def _get(self, path: str, kind: type[_T]) -> _T:
        return _decoded(self._ask("GET", path, None, {}), kind)

    def _post(self, path: str, body: object, kind: type[_T], key: str | None = None) -> _T:
        headers = {"Idempotency-Key": key or os.urandom(16).hex()}
        return _decoded(self._ask("POST", path, body, headers), kind)

    def _ask(self, method: str, path: str, body: object, headers: dict[str, str]) -> Answer:
        content = None
        if body is not None:
            content = msgspec.json.encode(body)
            headers = {**headers, "Content-Type": "application/json"}
        answer = self._transport.request(method, f"/1.0{path}", content, headers, self._timeout_s)
        if answer.status >= 400:
            raise _error_of(answer)
        return answer


def operation_error(view: OperationView) -> MullionError:
    """The error of an operation that did not succeed."""
    if view.error is not None:
        return MullionError.from_wire(msgspec.to_builtins(view.error))
    if view.state is OperationState.CANCELLED:
        return OperationCancelledError(f"operation {view.id} was cancelled", operation=view.id)
    return OperationFailedError(f"operation {view.id} is {view.state.value}", operation=view.id)


def _decoded(answer: Answer, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(answer.body, type=kind)
    except msgspec.MsgspecError as error:
        raise _not_ours(answer) from error


def _not_ours(answer: Answer) -> UnavailableError:
    text = answer.body[:200].decode(errors="replace").strip()
    return UnavailableError(
        f"what answers is not this version of Mullion: status {answer.status}, {text!r}",
        remedy="Check the address or the socket's path, and the version of the service.",
    )


def _error_of(answer: Answer) -> MullionError:
    try:
        view = msgspec.json.decode(answer.body, type=ErrorView)
    except msgspec.MsgspecError:
        return _not_ours(answer)
    return MullionError.from_wire(msgspec.to_builtins(view))


def _backup_schedule(partition: str, name: str) -> str:
    return f"/partitions/{_part(partition)}/backup-schedules/{_part(name)}"


def _query(**fields: object) -> str:
    """The fields that say something, as a query; a path that is not UTF-8 keeps its bytes."""
    given = {
        name: "true" if value is True else value
        for name, value in fields.items()
        if value is not None and value is not False and value != ""
    }
    return f"?{urlencode(given, errors='surrogateescape')}" if given else ""


def _part(name: str) -> str:
    """A part of a path, with nothing in it that could be another part. Raises: NotFoundError: no name has a slash."""
    if "/" in name:
        raise NotFoundError(f"there is nothing named {name!r}", name=name)
    return quote(name, safe="") if name.strip(".") else "%2E" * max(len(name), 1)


def _quoted(etag: str) -> str:
    return etag if etag == "*" or etag.startswith('"') else f'"{etag}"'
