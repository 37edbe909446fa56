"""The process that works on a repository: one request, progress, one answer.

The service is small and answers at once; hashing, compressing, encrypting and waiting for a remote storage are done
here, with the libraries that takes, at a lower priority. The socket that it is given carries lines of JSON:

    service ─► {"action": "backup", "url": …, "secret": {…}, …}
    worker  ─► {"stage": …, "done": n, "total": n}   now and then
    worker  ─► {"result": {…}} or {"error": {…}}     at the end

When the service's end is closed the work is given up at once: a repository is whole after that as after any crash.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec

from mullion.base.block import BlockDevice
from mullion.base.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidError,
    MullionError,
    NotFoundError,
    OperationFailedError,
)
from mullion.base.files import sync_folder
from mullion.base.units import format_time
from mullion.repository import Manifest, Repository, begin_backup
from mullion.repository.credentials import Credentials
from mullion.repository.errors import TargetUnreachableError
from mullion.repository.location import open_backend, open_repository
from mullion.repository.prune import prune
from mullion.repository.repair import repair
from mullion.repository.retention import Retention, plan_retention
from mullion.repository.verify import verify
from mullion.services.backup.record import note_files, unfinished
from mullion.services.backup.server import held, serve
from mullion.vhd import Chain, create_dynamic, open_chain
from mullion.vhd.diff import changed
from mullion.vhd.storage import storage_explained
from mullion.wire.nbd import SteadyReader

log = logging.getLogger(__name__)

REQUEST_LIMIT_BYTES: Final = 4 * 1024 * 1024
_NICE: Final = 10
_TELL_S: Final = 0.2
_PATIENCE_S: Final = 600.0
"""How long a backup waits for another one that it reads through: what was stored is used by the next try."""

Request = Mapping[str, Any]
Tell = Callable[[str, int, int], None]


class _Line:
    """The socket to the service."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._told_s = 0.0
        self._is_let_go = False

    def read_request(self) -> Request:
        data = bytearray()
        while not data.endswith(b"\n"):
            piece = self._connection.recv(64 * 1024)
            if not piece or len(data) > REQUEST_LIMIT_BYTES:
                raise InvalidError("the request is incomplete", remedy="Send one line of JSON.")
            data += piece
        request = json.loads(data)
        assert isinstance(request, dict)
        threading.Thread(target=self._watch, daemon=True).start()
        return request

    def _watch(self) -> None:
        """Nobody waits any more: end, whatever is being done."""
        try:
            self._connection.recv(1)
        except ConnectionError:
            log.info("the service was killed with words of ours unread")
        if not self._is_let_go:
            os._exit(1)

    def let_go(self) -> None:
        """What is done outlives the service from here on."""
        self._is_let_go = True

    def progress(self, stage: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= _TELL_S:
            self._told_s = now_s
            self.tell({"stage": stage, "done": done, "total": total})

    def tell(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self._connection.sendall(json.dumps(message).encode() + b"\n")


def _open(request: Request, *, index_folder: str | None = None) -> Repository:
    secret = request["secret"]
    credentials = Credentials(**secret["credentials"])
    return open_repository(request["url"], secret["passphrase"], credentials, index_folder=index_folder)


def _open_nearer(request: Request) -> Repository:
    """With copies of its index on this host: for what does not judge or change what the storage has."""
    return _open(request, index_folder=request["index_cache"])


def _add(request: Request, _tell: Tell) -> Mapping[str, Any]:
    """Make a repository where there is none, when that is asked for; or open the one that is there."""
    secret = request["secret"]
    backend = open_backend(request["url"], Credentials(**secret["credentials"]), create=request["create"])
    how = Repository.create if request["create"] else Repository.open
    with _told_how_to_make_one(request), how(backend, secret["passphrase"]) as repository:
        return {
            "location": repository.location,
            "backups": len(repository.backup_ids()),
            "repository_id": repository.config.repository_id.hex(),
        }


@contextlib.contextmanager
def _told_how_to_make_one(request: Request) -> Iterator[None]:
    """Who opens a repository in a folder that is not there may have meant to make it."""
    try:
        yield
    except TargetUnreachableError as error:
        if "://" in request["url"]:
            raise
        raise TargetUnreachableError(
            f"there is no folder {request['url']}",
            remedy="Mount or connect its storage; or make a repository there: "
            "mullion backup repository add NAME PLACE --create",
            repository=request["url"],
        ) from error


def _add_passphrase(request: Request, _tell: Tell) -> Mapping[str, Any]:
    """Let another passphrase open the repository too; the slots that it is to replace."""
    with _open(request) as repository:
        return {"replaced": list(repository.add_passphrase(request["new_passphrase"]))}


def _remove_slots(request: Request, _tell: Tell) -> Mapping[str, Any]:
    """Let only the present passphrase open the repository, which is in another slot than these."""
    with _open(request) as repository:
        repository.remove_slots(request["slots"], request["secret"]["passphrase"])
        return {}


def _backup(request: Request, tell: Tell) -> Mapping[str, Any]:
    """Back up frozen chains. Where a disk says since which file, only what the layers above it hold is read."""
    with _open_nearer(request) as repository:
        base = _base(repository, request["base"])
        with begin_backup(
            repository,
            request["partition"],
            partition_id=request["partition_id"],
            definition=request["definition"],
            base=base,
            notes=request["notes"],
        ) as backup:
            for disk in request["disks"]:
                with (
                    open_chain(disk["top"], read_only=True, allowed_dirs=disk["folders"]) as chain,
                    _read_through(chain, disk["id"], disk["backing"], tell),
                ):
                    since = disk["since"] if backup.base is not None else None
                    ranges = None
                    if since is not None:
                        found = changed(disk["top"], since=since, allowed_dirs=disk["folders"])
                        ranges = [(change.offset, change.length) for change in found]
                    backup.add_disk(disk["id"], chain, changed=ranges, progress=tell)
            for name, path in request["blobs"].items():
                with open(path, "rb") as content:
                    backup.add_blob(name, content)
            return _described(backup.commit())


@contextlib.contextmanager
def _read_through(chain: Chain, disk: str, path: str | None, tell: Tell) -> Iterator[None]:
    """Let a chain read from another backup what is still there only; nothing when there is no such thing."""
    if path is None:
        yield
        return

    def say(reason: str) -> None:
        tell(f"waiting for the backup that blocks of {disk} are in: {reason}", 0, 0)

    with contextlib.closing(SteadyReader(path, disk, patience_s=_PATIENCE_S, on_wait=say)) as backing:
        chain.backing = backing
        yield


def _base(repository: Repository, backup_id: str | None) -> Manifest | None:
    """The backup to build on; none when it was forgotten meanwhile: then everything is read again."""
    if backup_id is None:
        return None
    with contextlib.suppress(NotFoundError):
        return repository.backup(backup_id)
    return None


def _list(request: Request, _tell: Tell) -> Mapping[str, Any]:
    with _open(request) as repository:
        return {"backups": [_described(manifest) for manifest in repository.backups(request.get("partition"))]}


def _show(request: Request, _tell: Tell) -> Mapping[str, Any]:
    with _open(request) as repository:
        manifest = repository.backup(request["backup"])
        return {**_described(manifest), "definition": manifest.definition}


def _verify(request: Request, tell: Tell) -> Mapping[str, Any]:
    with _open(request) as repository:
        report = verify(
            repository,
            read_data=request["read_data"],
            part=(request["part"][0], request["part"][1]),
            progress=tell,
        )
        return {
            "is_whole": report.is_whole,
            "backups": report.backups,
            "packs": report.packs,
            "chunks": report.chunks,
            "read_bytes": report.read_bytes,
            "damaged": report.damaged,
            "findings": [msgspec.to_builtins(finding) for finding in report.findings],
        }


def _repair(request: Request, tell: Tell) -> Mapping[str, Any]:
    with _open(request) as repository:
        done = repair(repository, read_data=request["read_data"], discard=request["discard"], progress=tell)
        return {
            "is_whole": done.is_whole,
            "found": msgspec.to_builtins(done.found),
            "indexed_packs": done.indexed_packs,
            "indexed_chunks": done.indexed_chunks,
            "rescued_chunks": done.rescued_chunks,
            "lost_chunks": done.lost_chunks,
            "left": done.left,
            "discarded": done.discarded,
            "damaged": done.after.damaged,
            "findings": msgspec.to_builtins(done.after.findings),
        }


def _prune(request: Request, tell: Tell) -> Mapping[str, Any]:
    with _open(request) as repository:
        if request["forget"]:
            doomed = [repository.backup(text).id for text in request["forget"]]
            for backup_id in request["spared"]:
                if backup_id in doomed:
                    raise ConflictError(
                        f"backup {backup_id} is needed: the blocks of a partition are coming home from it",
                        remedy="Let that partition run until all is home: mullion operation list",
                    )
        else:
            judged = [
                manifest
                for manifest in repository.backups(request["partition"])
                if request["partition_id"] in (None, manifest.partition_id)
            ]
            kept = plan_retention(judged, Retention(**request["keep"]))
            doomed = [
                backup_id for backup_id, rules in kept.items() if not rules and backup_id not in request["spared"]
            ]
        done = prune(repository, doomed, dry_run=request["dry_run"], progress=tell)
        return {
            "forgotten": list(done.forgotten) if not request["dry_run"] else doomed,
            "kept": done.kept,
            "freed_bytes": done.freed_bytes,
            "live_bytes": done.live_bytes,
        }


def _restore(request: Request, tell: Tell) -> Mapping[str, Any]:
    """Disks into new files, blobs into others. The disks get their names when all of them are there and durable.

    Until then each is a file of another name beside (`unfinished`), which the service takes away when we do not. With
    `is_noted` a note of that name stays, for the service to know whose the disk is until a partition has it.
    """
    with _open_nearer(request) as repository, held(repository, "restore"):
        manifest = repository.backup(request["backup"])
        for path in request["disks"].values():
            if os.path.lexists(path):
                raise AlreadyExistsError(f"{path} exists already", remedy="Choose another name.", path=path)
        for disk, path in request["disks"].items():
            source = repository.open_disk(manifest, disk)
            with storage_explained(path):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(unfinished(path))
                create_dynamic(unfinished(path), source.size_bytes)
                with open_chain(unfinished(path), holder="mullion backup restore") as target:
                    source.restore(target, is_zero=True, progress=tell)
        for blob, path in request["blobs"].items():
            if blob in manifest.blobs:
                _write_blob(repository.open_blob(manifest, blob), path)
        for path in request["disks"].values():
            with storage_explained(path):
                _publish(path, is_noted=request["is_noted"])
        return {"disks": request["disks"]}


def _publish(path: str, *, is_noted: bool) -> None:
    """Give a finished file its name, which nobody has; durable. A note takes its other name, where it is wanted."""
    os.link(unfinished(path), path)
    if is_noted:
        note_files(path, (path,))
    else:
        os.unlink(unfinished(path))
        sync_folder(os.path.dirname(path))


def _serve(request: Request, line: _Line) -> None:
    """Serve a backup's disks until we are told to end, whatever becomes of the service."""

    def ready() -> None:
        line.let_go()
        line.tell({"result": {}})

    with _open_nearer(request) as repository, held(repository, "instant restore"):
        serve(repository, request, ready)


def _write_blob(source: BlockDevice, path: str) -> None:
    with storage_explained(path), open(path, "wb") as file:
        for offset in range(0, source.size_bytes, 1 << 20):
            buffer = bytearray(min(1 << 20, source.size_bytes - offset))
            source.pread(offset, buffer)
            file.write(buffer)
        file.flush()
        os.fsync(file.fileno())


def _described(manifest: Manifest) -> Mapping[str, Any]:
    """A manifest as the API shows it."""
    return {
        "id": manifest.id,
        "partition": manifest.partition,
        "begun_at": format_time(manifest.begun_ns),
        "ended_at": format_time(manifest.ended_ns),
        "base": manifest.base or None,
        "host": manifest.host,
        "notes": dict(manifest.notes),
        "new_bytes": manifest.new_bytes,
        "disks": [
            {
                "id": name,
                "size_bytes": disk.size_bytes,
                "data_bytes": disk.data_bytes,
                "read_bytes": disk.read_bytes,
                "new_bytes": disk.new_bytes,
            }
            for name, disk in manifest.disks.items()
        ],
        "blobs": sorted(manifest.blobs),
    }


_ACTIONS: Final[Mapping[str, Callable[[Request, Tell], Mapping[str, Any]]]] = {
    "add": _add,
    "add-passphrase": _add_passphrase,
    "remove-slots": _remove_slots,
    "backup": _backup,
    "list": _list,
    "show": _show,
    "verify": _verify,
    "repair": _repair,
    "prune": _prune,
    "restore": _restore,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="mullion.services.backup.worker")
    parser.add_argument("--fd", type=int, required=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    line = _Line(socket.socket(fileno=parser.parse_args().fd))
    try:
        request = line.read_request()
        if request["action"] == "serve":  # a guest waits for it
            _serve(request, line)
            return 0
        os.nice(_NICE)
        line.tell({"result": _ACTIONS[request["action"]](request, line.progress)})
    except MullionError as error:
        line.tell({"error": error.to_wire()})
    except OSError as error:
        failure = OperationFailedError(str(error), remedy="Look into the host's log (`dmesg`), and try again.")
        line.tell({"error": failure.to_wire()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
