"""User ids of partitions and the modes of their folders."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

import pytest

from mullion.base.errors import ConflictError
from mullion.base.paths import HostPaths
from mullion.host import allocate_uid, isolates, prepare_host_folders, prepare_partition_folders
from mullion.host.identity import FIRST_UID

pytestmark = pytest.mark.unit


def mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def test_the_lowest_free_number() -> None:
    assert allocate_uid(()) == FIRST_UID
    assert allocate_uid({FIRST_UID, FIRST_UID + 1, FIRST_UID + 3}) == FIRST_UID + 2


def test_numbers_of_accounts_are_not_given_away() -> None:
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    assert 0 in taken
    assert allocate_uid((), first=0, last=70_000) not in taken


def test_no_number_left() -> None:
    with pytest.raises(ConflictError, match="from 30000 to 30002 are taken"):
        allocate_uid({30_000, 30_001, 30_002}, last=30_002)


@pytest.mark.parametrize(("user", "setting", "answer"), [(0, "auto", True), (0, "off", False), (1000, "auto", False)])
def test_isolation_needs_root_and_consent(
    monkeypatch: pytest.MonkeyPatch, user: int, setting: str, answer: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert isolates(setting) is answer


def test_folders_without_isolation(tmp_path: Path) -> None:
    paths = HostPaths(str(tmp_path / "data"), str(tmp_path / "run"))
    prepare_host_folders(paths, isolated=False)
    partition = paths.partition("p")
    for _ in range(2):
        prepare_partition_folders(partition, None)
    for folder in (paths.data_dir, paths.run_dir, partition.data, partition.run, partition.pending_dir):
        assert mode(folder) == 0o750


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_folders_with_isolation(tmp_path: Path) -> None:
    paths = HostPaths(str(tmp_path / "data"), str(tmp_path / "run"))
    prepare_host_folders(paths, isolated=True)
    assert mode(paths.data_dir) == mode(paths.run_dir) == 0o711
    partition = paths.partition("p")
    prepare_partition_folders(partition, (30_000, 30_000))
    status = os.stat(partition.run)
    assert (status.st_uid, status.st_gid, mode(partition.run)) == (0, 30_000, 0o750)
    assert os.stat(partition.pending_dir).st_uid == 30_000


def test_a_link_in_a_folder_s_place_is_not_followed(tmp_path: Path) -> None:
    paths = HostPaths(str(tmp_path / "data"), str(tmp_path / "run")).partition("p")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    os.makedirs(os.path.dirname(paths.run))
    os.symlink(elsewhere, paths.run)
    with pytest.raises(OSError, match=r"Not a directory|symbolic link"):
        prepare_partition_folders(paths, None)
    assert mode(str(elsewhere)) == 0o700
