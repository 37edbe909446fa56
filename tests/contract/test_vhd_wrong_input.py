"""What a person gets for wrong input to `mullion vhd`: one error that says what to do, and nothing left behind."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.contract.test_vhd_check_commands import vhd

from mullion.base.units import MIB
from mullion.vhd import create_differencing, create_dynamic, open_chain

pytestmark = pytest.mark.contract

LONG = "x" * 300


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    create_dynamic(str(tmp_path / "base.vhd"), 4 * MIB)
    create_differencing(str(tmp_path / "child.vhd"), str(tmp_path / "base.vhd"))
    os.symlink("loop", tmp_path / "loop")
    (tmp_path / "noise.vhd").write_bytes(b"not a disk" * 1000)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("create", "", "--size", "4M"), "an empty path names no file"),
        (("create", LONG, "--size", "4M"), f"{LONG}: File name too long"),
        (("create", "new.vhd", "--size", "2041G"), "at most 2040 GiB"),
        (("create", "new.vhd", "--size", "4M", "--block-size", "0"), "a block cannot have 0 bytes"),
        (("create", "new.vhd", "--size", "0"), "a VHD cannot have 0 bytes"),
        (("convert", "base.vhd", ""), "an empty path names no file"),
        (("convert", "base.vhd", LONG), "Choose another path."),
        (("clone", "base.vhd", "missing/new.vhd"), "there is no folder missing"),
        (("merge", "child.vhd", "--into", "loop"), "Name layers of this chain"),
        (("create", "new.vhdx", "--size", "4M"), "Name it new.vhd"),
        (("convert", "base.vhd", "new.QCOW2"), "a VHD or a raw file is what can be made here"),
        (("clone", "base.vhd", "new.vmdk"), "Name it new.vhd"),
        (("info", ""), "an empty path names no file"),
        (("ls", "noise.vhd"), "vhd convert noise.vhd NEW.vhd --from raw"),
    ],
)
def test_one_error_and_nothing_left(disks: Path, words: tuple[str, ...], says: str) -> None:
    before = sorted(os.listdir(disks))
    done = vhd(*words, cwd=disks)
    assert done.returncode not in (0, 1)
    assert done.stdout == ""
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(disks)) == before


def test_what_refuses_a_disk_comes_without_a_heading(disks: Path) -> None:
    assert vhd("diff", "missing.vhd", cwd=disks).stdout == ""


@pytest.mark.skipif(sys.platform != "linux", reason="a file of Linux that cannot be read")
@pytest.mark.parametrize(
    "words", [("info",), ("check",), ("hash",), ("read",), ("merge",), ("create", "n", "--parent")]
)
def test_a_storage_that_fails_is_no_fault_of_ours(disks: Path, words: tuple[str, ...]) -> None:
    done = vhd(*words, "/proc/self/mem", cwd=disks)
    assert done.returncode == 14
    assert done.stderr.startswith("mullion: ")
    assert "Input/output error" in done.stderr


def test_no_child_of_a_disk_that_somebody_writes(disks: Path) -> None:
    with open_chain(str(disks / "base.vhd"), holder="partition web"):
        done = vhd("create", "second.vhd", "--parent", "base.vhd", cwd=disks)
    assert done.returncode == 4
    assert "in use by partition web" in done.stderr
    assert not (disks / "second.vhd").exists()
    with open_chain(str(disks / "base.vhd"), read_only=True):
        assert vhd("create", "second.vhd", "--parent", "base.vhd", cwd=disks).returncode == 0


def test_closed_standard_streams(disks: Path) -> None:
    before = (disks / "base.vhd").read_bytes()
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        for words in ("check base.vhd", "hash base.vhd", "write base.vhd"):
            command = f"exec {shlex.quote(sys.executable)} -m mullion.cli vhd {words} {closed}"
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=disks,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=60,
            )
            assert (done.returncode, b"Traceback" in done.stderr) == (0, False), command
    assert (disks / "base.vhd").read_bytes() == before


@pytest.mark.parametrize("words", ["info", "check", "read"])
def test_standard_output_is_full(disks: Path, words: str) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m mullion.cli vhd {words} base.vhd >/dev/full"
    done = subprocess.run(["bash", "-c", command], cwd=disks, capture_output=True, check=False, timeout=60)
    assert done.returncode in (9, 14)
    assert done.stderr.startswith(b"mullion: standard output cannot be written: No space left on device\n")
    assert b"Traceback" not in done.stderr


def test_json_of_a_path_that_is_no_utf8(disks: Path) -> None:
    path = os.fsdecode(b"\xff\xfe.vhd")
    os.rename(disks / "base.vhd", disks / path)
    for words in (("info", path), ("check", path), ("hash", path)):
        found = json.loads(vhd(*words, "--format", "json", cwd=disks).stdout)
        assert (found[0] if isinstance(found, list) else found)["path"] == path
    refused = vhd("info", path + "x", "--format", "json", cwd=disks)
    assert json.loads(refused.stderr)["code"] == "not-found"


def test_a_writer_is_told_which_reader_is_in_its_way(disks: Path) -> None:
    os.setxattr(disks / "base.vhd", "user.mullion.holder", b"a writer that was killed")
    with open_chain(str(disks / "base.vhd"), read_only=True):
        refused = vhd("compact", "base.vhd", cwd=disks)
    assert refused.returncode == 4
    assert f"(pid {os.getpid()})" in refused.stderr
    assert "a writer that was killed" not in refused.stderr
