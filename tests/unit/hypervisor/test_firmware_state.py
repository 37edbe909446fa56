"""UEFI variables and the TPM's memory: copied whole, put back exactly, and never through a link."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mullion.base.errors import InvalidError, NotFoundError
from mullion.base.paths import PartitionPaths
from mullion.hypervisor.firmware_state import copy_firmware_state, restore_firmware_state

pytestmark = pytest.mark.unit

TPM = "tpm2-00.permall"


@pytest.fixture
def paths(tmp_path: Path) -> PartitionPaths:
    (tmp_path / "data").mkdir()
    return PartitionPaths(str(tmp_path / "data"), str(tmp_path / "run"))


def put(paths: PartitionPaths, variables: bytes | None, tpm: bytes | None) -> None:
    for path, content in ((Path(paths.firmware_vars), variables), (Path(paths.tpm_state, TPM), tpm)):
        path.unlink(missing_ok=True)
        if content is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)


def found(paths: PartitionPaths) -> tuple[bytes | None, bytes | None]:
    both = Path(paths.firmware_vars), Path(paths.tpm_state, TPM)
    variables, tpm = (path.read_bytes() if path.exists() else None for path in both)
    return variables, tpm


@pytest.mark.parametrize("variables", [None, b"variables"])
@pytest.mark.parametrize("tpm", [None, b"keys"])
def test_what_was_copied_comes_back_exactly(
    paths: PartitionPaths, tmp_path: Path, variables: bytes | None, tpm: bytes | None
) -> None:
    put(paths, variables, tpm)
    copy = str(tmp_path / "copy")
    copy_firmware_state(paths, copy)
    put(paths, b"newer", b"newer")
    for _ in range(2):  # it may be repeated
        restore_firmware_state(paths, copy, (os.geteuid(), os.getegid()))
        assert found(paths) == (variables, tpm)
    assert sorted(os.listdir(paths.data)) == [
        name for name, there in (("firmware-vars.fd", variables), ("tpm", tpm)) if there is not None
    ]


def test_a_copy_is_whole_or_not_there(paths: PartitionPaths, tmp_path: Path) -> None:
    put(paths, b"variables", None)
    os.mkdir(paths.tpm_state)
    os.symlink("/etc/shadow", f"{paths.tpm_state}/{TPM}")
    with pytest.raises(InvalidError, match="is no file"):
        copy_firmware_state(paths, str(tmp_path / "copy"))
    assert sorted(os.listdir(tmp_path)) == ["data"]
    os.unlink(f"{paths.tpm_state}/{TPM}")
    os.mkfifo(f"{paths.tpm_state}/{TPM}")
    with pytest.raises(InvalidError, match="is no file"):
        copy_firmware_state(paths, str(tmp_path / "copy"))
    (tmp_path / "copy.new").mkdir()  # as a crash leaves it
    os.unlink(f"{paths.tpm_state}/{TPM}")
    copy_firmware_state(paths, str(tmp_path / "copy"))
    assert sorted(os.listdir(tmp_path)) == ["copy", "data"]
    assert os.listdir(tmp_path / "copy") == ["firmware-vars.fd"]


def test_links_that_the_tpm_s_user_made_are_not_followed(paths: PartitionPaths, tmp_path: Path) -> None:
    put(paths, None, b"keys")
    copy_firmware_state(paths, str(tmp_path / "copy"))
    treasure = tmp_path / "treasure"
    treasure.write_bytes(b"not yours")
    for name in (TPM, f"{TPM}.new", "more"):
        Path(paths.tpm_state, name).unlink(missing_ok=True)
        os.symlink(treasure, f"{paths.tpm_state}/{name}")
    restore_firmware_state(paths, str(tmp_path / "copy"))
    assert found(paths) == (None, b"keys")
    assert os.listdir(paths.tpm_state) == [TPM]
    assert treasure.read_bytes() == b"not yours"


def test_without_a_copy_nothing_is_touched(paths: PartitionPaths, tmp_path: Path) -> None:
    put(paths, b"variables", b"keys")
    with pytest.raises(NotFoundError):
        restore_firmware_state(paths, str(tmp_path / "copy"))
    assert found(paths) == (b"variables", b"keys")
