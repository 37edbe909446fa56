"""A restore with the power cut at any change of its disk: nothing is under the final name that is not whole and durable."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.framework.controllers import Controllers
from tests.unit.repository.disks import PASSPHRASE, QUICK_SCRYPT, MemoryDisk, back_up, scattered
from tests.unit.vhd.power_cut import KilledError, RecordingIO

from mullion.base.errors import AlreadyExistsError
from mullion.base.paths import HostPaths
from mullion.base.units import MIB
from mullion.model.definition import DiskAttachment, PartitionDefinition
from mullion.model.states import OperationState
from mullion.model.views import BackupDiskView, BackupView
from mullion.parent.operations import Operation, Operations
from mullion.parent.store import Condition, MemoryStore
from mullion.parent.store.protocol import Write
from mullion.repository import Repository
from mullion.repository.local import FolderBackend
from mullion.services.backup import instant, worker
from mullion.services.backup.controller import BackupController
from mullion.services.backup.record import give_up, note_files, noted_files, unfinished, unfinished_in
from mullion.vhd import create_dynamic, open_chain

pytestmark = pytest.mark.unit

SIZE_BYTES = 5 * MIB


@pytest.fixture
def content() -> bytes:
    return bytes(scattered(SIZE_BYTES, 5, pieces=20))


@pytest.fixture
def request_of(tmp_path: Path, content: bytes) -> Mapping[str, Any]:
    """What the service asks a worker: one disk of a backup."""
    repository = Repository.create(
        FolderBackend.create(str(tmp_path / "repository")), PASSPHRASE, scrypt_log2_n=QUICK_SCRYPT
    )
    manifest = back_up(repository, MemoryDisk(content))
    (tmp_path / "disks").mkdir()
    return {
        "url": repository.location,
        "secret": {"passphrase": PASSPHRASE, "credentials": {}},
        "index_cache": str(tmp_path / "cache"),
        "backup": manifest.id,
        "disks": {"disk0": str(tmp_path / "disks" / "web.vhd")},
        "blobs": {},
        "is_noted": False,
    }


def restore(request: Mapping[str, Any]) -> None:
    worker._restore(request, lambda *_: None)


def content_of(path: str) -> bytes:
    with open_chain(path, read_only=True) as chain:
        buffer = bytearray(chain.size_bytes)
        chain.pread(0, buffer)
        assert not chain.warnings
    return bytes(buffer)


def test_a_cut_at_any_change_leaves_nothing_under_the_name(
    request_of: Mapping[str, Any], content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request_of["disks"]["disk0"]
    for fuse in itertools.count():
        file_io = RecordingIO()
        file_io.fuse = fuse
        monkeypatch.setattr(worker, "open_chain", partial(open_chain, file_io=file_io))
        try:
            restore(request_of)
        except KilledError:
            file_io.cut_power(random.Random(fuse))
            assert not os.path.lexists(path)
            assert unfinished_in(os.path.dirname(path)) == [unfinished(path)]
            assert noted_files(unfinished(path)) == ()
        else:
            break
    assert fuse > 6
    assert content_of(path) == content, "over what the last try had left"
    assert os.listdir(os.path.dirname(path)) == ["web.vhd"]


@pytest.mark.parametrize("seed", range(4))
def test_what_gets_its_name_is_durable(
    request_of: Mapping[str, Any], content: bytes, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The power fails right when the disk is about to get its name, and the name is all that survives of what follows."""
    file_io = RecordingIO()
    publish = worker._publish

    def cut_and_publish(path: str, *, is_noted: bool) -> None:
        file_io.cut_power(random.Random(seed))
        publish(path, is_noted=is_noted)

    monkeypatch.setattr(worker, "open_chain", partial(open_chain, file_io=file_io))
    monkeypatch.setattr(worker, "_publish", cut_and_publish)
    restore(request_of)
    assert content_of(request_of["disks"]["disk0"]) == content


def test_what_is_being_made_is_noted_beside_it_and_only_there(tmp_path: Path) -> None:
    disk, head, other = (str(tmp_path / name) for name in ("now.vhd", "now-1.avhd", "elsewhere/x.vhd"))
    note_files(disk, (disk, head, other))
    (note,) = unfinished_in(str(tmp_path))
    assert noted_files(note) == (disk, head)


def test_an_instant_restore_that_a_crash_interrupts_leaves_no_files(tmp_path: Path) -> None:
    """Its operation has failed at the next start, and says so; a file that a partition has stays."""
    paths = HostPaths(str(tmp_path / "data"), str(tmp_path / "run"))
    os.makedirs(paths.disks)
    made = [f"{paths.disks}/now-disk0{end}" for end in (".vhd", "-1.avhd")]
    kept = f"{paths.disks}/other.vhd"
    for path in (*made, kept):
        create_dynamic(path, SIZE_BYTES)
    note_files(made[0], (made[0], made[1]))
    os.makedirs(f"{paths.partition('now').data}/restored-firmware")
    asyncio.run(_restart_after_crash(MemoryStore(), paths))
    assert os.listdir(paths.disks) == ["other.vhd"]
    assert not os.path.exists(paths.partition("now").data)


def _view() -> BackupView:
    return BackupView(
        id="ab" * 8,
        repository="far",
        partition="now",
        begun_at="",
        ended_at="",
        host="",
        new_bytes=0,
        disks=(BackupDiskView("disk0", SIZE_BYTES, SIZE_BYTES, 0, 0),),
    )


async def _restart_after_crash(store: MemoryStore, paths: HostPaths) -> None:
    async def never_done(_operation: Operation) -> None:
        await asyncio.Event().wait()

    async with _service(store, paths) as (operations, _):
        begun = await operations.start("backup.restore", "partition/now", never_done)
    async with _service(store, paths) as (operations, backups):
        await backups.open()
        await operations.recover()
        ended = await operations.wait(begun.id)
    assert ended.error is not None
    assert "was interrupted" in ended.error.message


@contextlib.asynccontextmanager
async def _service(store: MemoryStore, paths: HostPaths) -> AsyncIterator[tuple[Operations, BackupController]]:
    made = await Controllers.open(store, paths)
    backups = BackupController(
        store=store,
        events=made.events,
        operations=made.operations,
        paths=paths,
        partitions=made.partitions,
        checkpoints=made.checkpoints,
        disks=made.disks,
    )
    try:
        yield made.operations, backups
    finally:
        await made.close()


def test_a_file_that_was_there_before_an_instant_restore_is_never_noted_as_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note is what a crash removes: a disk that was kept from an earlier partition must not come to be in one."""
    paths = HostPaths(str(tmp_path / "data"), str(tmp_path / "run"))
    os.makedirs(paths.disks)
    kept = f"{paths.disks}/now-disk0.vhd"
    create_dynamic(kept, SIZE_BYTES)
    noted: list[str] = []
    monkeypatch.setattr(instant, "note_files", lambda _disk, files: noted.extend(files))
    view = _view()

    async def restore_instantly() -> None:
        async with _service(MemoryStore(), paths) as (_, backups):
            await backups.homecomings.create(PartitionDefinition("now"), view, {"disk0": kept})

    with pytest.raises(AlreadyExistsError, match="exists already"):
        asyncio.run(restore_instantly())
    assert not noted
    assert os.listdir(paths.disks) == ["now-disk0.vhd"]


class HeldStore(MemoryStore):
    """Holds up who stores a partition: before it is stored, or after."""

    def __init__(self, *, is_stored: bool) -> None:
        super().__init__()
        self.is_held = asyncio.Event()
        self.is_stored = is_stored

    async def transact(self, conditions: Sequence[Condition], writes: Sequence[Write]) -> int:
        if not writes[0].key.startswith("partitions/") or self.is_held.is_set():
            return await super().transact(conditions, writes)
        if self.is_stored:
            await super().transact(conditions, writes)
        self.is_held.set()
        await asyncio.Event().wait()
        raise AssertionError("nobody lets it go")


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize("is_instant", [False, True])
def test_a_service_that_ends_while_a_restored_partition_is_stored(
    tmp_path: Path, is_instant: bool, is_stored: bool
) -> None:
    """Its store may have it or not: the next service has a partition that is whole, or nothing of it."""
    paths = HostPaths(str(tmp_path / "data"), str(tmp_path / "run"))
    found = asyncio.run(_end_and_look(paths, HeldStore(is_stored=is_stored), is_instant))
    left = sorted(os.listdir(paths.disks))
    data = paths.partition("now")
    if is_stored:
        assert [name.partition("-disk0")[0] for name in left] == ["now"] * len(left)
        assert len(left) == 1 + is_instant
        assert found == OperationState.SUCCEEDED
        assert Path(data.firmware_vars).read_bytes() == b"variables"
        assert os.listdir(data.data) == [os.path.basename(data.firmware_vars)]
    else:
        assert left == []
        assert found == OperationState.FAILED
        assert not os.path.exists(data.data)


async def _end_and_look(paths: HostPaths, store: HeldStore, is_instant: bool) -> OperationState:
    disks = (DiskAttachment(path="now-disk0", id="disk0"),)
    view = msgspec.structs.replace(
        _view(),
        definition=msgspec.json.encode(PartitionDefinition("now", disks=disks)).decode(),
        blobs=("firmware-vars.fd",),
    )

    async def bring_back(_repository: str, action: str, _operation: Operation, **request: Any) -> Mapping[str, Any]:
        assert action == "restore"
        for path in request["disks"].values():
            create_dynamic(unfinished(path), SIZE_BYTES)
            worker._publish(path, is_noted=request["is_noted"])
        for path in request["blobs"].values():
            Path(path).write_bytes(b"variables")
        return {}

    async with _service(store, paths) as (_, backups):
        backups.repositories.ask = bring_back  # type: ignore[assignment, method-assign]
        begun = await backups._restore_partition("far", view, "now", instant=is_instant)
        await store.is_held.wait()
    async with _service(store, paths) as (operations, backups):
        await backups.open()
        await operations.recover()
        return (await operations.wait(begun.id)).state


def test_a_disk_that_had_just_got_its_name_is_given_up_too(tmp_path: Path) -> None:
    path, other = str(tmp_path / "now.vhd"), str(tmp_path / "other.vhd")
    for made in (unfinished(path), unfinished(other), other):
        create_dynamic(made, SIZE_BYTES)
    os.link(unfinished(path), path)
    for note in unfinished_in(str(tmp_path)):
        give_up(note)
    assert os.listdir(tmp_path) == ["other.vhd"]
