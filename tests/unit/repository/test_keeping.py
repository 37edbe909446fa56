"""Retention, prune, leases, places and secrets: what is kept, who is told what, and what never shows."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path

import msgspec
import pytest
from tests.unit.repository.disks import CHUNK, MemoryDisk, back_up, content_of, new_repository, scattered

from mullion.base.errors import InvalidError
from mullion.base.process import ProcessIdentity
from mullion.base.units import KIB, MIB
from mullion.repository import Manifest
from mullion.repository.backend import ObjectMissingError, Patience, Persistent
from mullion.repository.credentials import Credentials, find_passphrase
from mullion.repository.errors import RepositoryDamagedError, SecretFileError, TargetDeniedError, TargetUnreachableError
from mullion.repository.fake import FakeBackend
from mullion.repository.lease import EXPIRY_S, Holder
from mullion.repository.location import open_backend
from mullion.repository.prune import prune
from mullion.repository.retention import Retention, plan_retention
from mullion.repository.verify import verify

pytestmark = pytest.mark.unit


def at(text: str, partition: str = "web") -> Manifest:
    time_ns = int(datetime.datetime.fromisoformat(f"{text}+00:00").timestamp()) * 10**9
    return Manifest(id=text.replace(":", "").replace("-", "").replace("T", ""), partition=partition, begun_ns=time_ns, ended_ns=time_ns, disks={})  # fmt: skip


def kept(texts: list[str], **rules: int) -> list[str]:
    backups = [at(text) for text in texts]
    plan = plan_retention(reversed(backups), Retention(**rules))
    return [text for text, manifest in zip(texts, backups, strict=True) if plan[manifest.id]]


def test_the_newest_of_each_period_is_kept() -> None:
    days = [f"2026-11-{day:02}T{hour:02}:00:00" for day in range(20, 26) for hour in (3, 15)]
    assert kept(days, last=1) == days[-1:]
    assert kept(days, last=3) == days[-3:]
    assert kept(days, daily=2) == ["2026-11-24T15:00:00", "2026-11-25T15:00:00"]
    assert kept(days, hourly=2) == days[-2:]
    assert kept(days, weekly=2) == ["2026-11-22T15:00:00", "2026-11-25T15:00:00"]  # weeks end on Sunday the 22nd
    assert kept(days, monthly=5) == days[-1:]
    assert kept(days, last=1, daily=2) == ["2026-11-24T15:00:00", "2026-11-25T15:00:00"]


def test_periods_without_a_backup_do_not_count() -> None:
    years = ["2019-01-05T00:00:00", "2022-06-01T00:00:00", "2022-12-31T23:59:59", "2026-01-01T00:00:00"]
    assert kept(years, yearly=2) == years[2:]
    assert kept(years, yearly=9) == [years[0], *years[2:]]
    assert kept(["2020-12-31T12:00:00", "2021-01-01T12:00:00"], weekly=9) == ["2021-01-01T12:00:00"]  # one ISO week


def test_each_partition_is_judged_for_itself() -> None:
    backups = [at("2026-11-20T00:00:00"), at("2026-11-21T00:00:00", "mail")]
    assert all(plan_retention(backups, Retention(last=1)).values())


def test_partitions_of_one_name_on_two_hosts_are_two() -> None:
    here, there = at("2026-11-20T00:00:00"), at("2026-11-21T00:00:00")
    backups = [msgspec.structs.replace(here, partition_id="a"), msgspec.structs.replace(there, partition_id="b")]
    assert all(plan_retention(backups, Retention(last=1)).values())


@pytest.mark.parametrize("rules", [{}, {"last": 0}, {"last": -1, "daily": 3}])
def test_a_retention_that_keeps_nothing_is_refused(rules: dict[str, int]) -> None:
    with pytest.raises(InvalidError):
        plan_retention([], Retention(**rules))


def test_a_prune_gives_back_what_only_the_forgotten_needed() -> None:
    repository, backend = new_repository(pack_bytes=4 * CHUNK)
    common = scattered(4 * MIB, 1, pieces=30)
    manifests, disks = [], []
    for seed in range(3):
        disk = MemoryDisk(common)
        disk.content[seed * MIB : seed * MIB + 8 * CHUNK] = os.urandom(8 * CHUNK)
        disks.append(disk)
        manifests.append(back_up(repository, disk))
    before = sum(map(len, backend.objects.values()))
    planned = prune(repository, [manifests[1].id], dry_run=True)
    assert sum(map(len, backend.objects.values())) == before
    done = prune(repository, [manifests[1].id])
    assert (done.forgotten, done.freed_bytes) == (planned.forgotten, planned.freed_bytes)
    assert sum(map(len, backend.objects.values())) < before - 5 * CHUNK
    for number in (0, 2):
        assert content_of(repository.open_disk(manifests[number], "disk0")) == disks[number].content
    assert verify(repository).is_whole
    assert prune(repository, repository.backup_ids()).live_bytes == 0
    assert not [name for name in backend.objects if name.startswith(("packs/", "backups/", "leases/"))]


def test_who_reads_while_packs_are_copied_goes_on() -> None:
    repository, backend = new_repository(pack_bytes=4 * CHUNK)
    disk = MemoryDisk(os.urandom(2 * MIB))
    first = back_up(repository, disk)
    disk.content[0 : 20 * CHUNK] = os.urandom(20 * CHUNK)
    second = back_up(repository, disk)
    reading = repository.open_disk(second, "disk0", cache_bytes=CHUNK)
    reading.pread(0, bytearray(10))
    other = type(repository)(backend, repository.config, repository.keys)
    assert prune(other, [first.id], repack_below=0.99).packs_copied
    assert content_of(reading) == disk.content


def test_a_prune_deletes_nothing_when_it_cannot_follow_a_backup() -> None:
    repository, backend = new_repository(pack_bytes=CHUNK)
    doomed = back_up(repository, MemoryDisk(scattered(MIB, 1)))
    back_up(repository, MemoryDisk(scattered(MIB, 2)))
    pack = [name for name in backend.objects if name.startswith("packs/")][-1]
    del backend.objects[pack]
    before = set(backend.objects)
    with pytest.raises(RepositoryDamagedError):
        prune(repository, [doomed.id])
    assert set(backend.objects) == before


def holder(**changes: object) -> Holder:
    identity = ProcessIdentity.of(os.getpid())
    fields = {"purpose": "backup", "exclusive": False, "host": "here", "process": str(identity), "namespace": os.stat("/proc/self/ns/pid").st_ino, "since_ns": 0, "refreshed_ns": time.time_ns()}  # fmt: skip
    return msgspec.convert(fields | changes, Holder)


def test_who_counts_as_dead() -> None:
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    gone = f"{identity.pid} {identity.start_ticks + 1} {identity.boot_id}"
    elsewhere = f"{identity.pid} {identity.start_ticks + 1} another-boot"
    assert not holder().is_dead
    assert holder(process=gone).is_dead
    assert not holder(process=gone, namespace=1).is_dead  # a container's: its pids say nothing here
    assert not holder(process=elsewhere).is_dead
    assert not holder(process="rubbish").is_dead
    assert holder(process=elsewhere, refreshed_ns=time.time_ns() - int((EXPIRY_S + 1) * 1e9)).is_dead


def test_trying_again_has_a_limit_and_is_for_the_way_only() -> None:
    backend = FakeBackend()
    backend.put("config", [b"x"])
    failures: list[Exception] = []

    def fail(number: int) -> None:
        if failures:
            raise failures.pop()

    backend.before_change = fail
    waits: list[float] = []
    persistent = Persistent(backend, Patience(tries=4), sleep=waits.append)
    failures[:] = [TargetUnreachableError("away")] * 3
    persistent.put("index/aa", [b"y"])
    assert waits == [0.5, 1.0, 2.0]
    failures[:] = [TargetUnreachableError("away")] * 9
    with pytest.raises(TargetUnreachableError):
        persistent.delete("index/aa")
    assert len(failures) == 5
    waits.clear()
    failures[:] = [TargetDeniedError("no")]
    with pytest.raises(TargetDeniedError):
        persistent.put("index/aa", [b"y"])
    with pytest.raises(ObjectMissingError):
        persistent.get("index/zz")
    assert waits == []


def test_secrets_come_from_files_that_nobody_else_reads(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("pass phrase \nsecond line\n")
    path.chmod(0o600)
    assert find_passphrase(str(path)) == "pass phrase "
    assert find_passphrase(None, {"MULLION_REPOSITORY_PASSPHRASE": "from outside"}) == "from outside"
    assert find_passphrase(None, {}) is None
    path.chmod(0o640)
    with pytest.raises(SecretFileError, match="read by others"):
        find_passphrase(str(path))
    path.chmod(0o600)
    path.write_text("\n")
    for bad in (str(path), str(tmp_path), str(tmp_path / "none"), "/dev/null"):
        with pytest.raises(SecretFileError):
            find_passphrase(bad)


def test_credentials(tmp_path: Path) -> None:
    path = tmp_path / "credentials.toml"
    path.write_text('s3_access_key = "key"\ns3_secret_key = "hidden"\n')
    path.chmod(0o600)
    found = Credentials.load(str(path), {"AWS_ACCESS_KEY_ID": "other", "AWS_REGION": "eu-1"})
    assert (found.s3_access_key, found.s3_secret_key, found.s3_region) == ("key", "hidden", "eu-1")
    assert "hidden" not in repr(found)
    for wrong in ("nonsense = 'x'", "s3_region = 5", "not toml"):
        path.write_text(wrong)
        with pytest.raises(InvalidError):
            Credentials.load(str(path), {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s3://",
        "s3://UPPER",
        "s3://bucket/../x",
        "s3://bucket?x",
        "sftp://host",
        "sftp:///folder",
        "ftp://host/x",
        "s3+https://host",
        "sftp://host:99999/x",
        "file://host/x",
        "\0",
    ],
)
def test_places_that_are_none(text: str) -> None:
    with pytest.raises(InvalidError):
        open_backend(text, Credentials(s3_access_key="a", s3_secret_key="b"))


@pytest.mark.parametrize("password", ["hunter2", "hunter#2", "hunter?2", "hunter/2", "hunter@2", "hunter:2"])
def test_a_password_in_a_place_is_refused_and_not_shown(password: str) -> None:
    with pytest.raises(InvalidError) as told:
        open_backend(f"sftp://me:{password}@host/folder")
    assert "hunter" not in str(told.value) + told.value.remedy


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("s3+https://h:1/bucket", "https://h:1/bucket"),
        ("sftp://me@h/a b", "sftp://me@h/a b"),
        ("sftp://h:23/~/x", "sftp://h:23/x"),
    ],
)
def test_places(text: str, location: str) -> None:
    backend = open_backend(text, Credentials(s3_access_key="a", s3_secret_key="b"))
    assert backend.location == location
    assert backend.pack_bytes == 16 * 1024 * KIB
