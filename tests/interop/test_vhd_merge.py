"""The merge command as people meet it: killed with -9 anywhere, on a full file system, judged by another reader."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.contract.block_device import all_of
from tests.interop.test_vhd_no_space import small  # noqa: F401  # a fixture
from tests.interop.test_vhd_readers import scribble, seven_zip_hash

from mullion.base.units import KIB, MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, open_chain
from mullion.vhd.merge_journal import journal_path

pytestmark = pytest.mark.interop

KILLED = """
import os, signal, sys
from mullion.vhd.fileio import FileIO
from mullion.cli.root import main

left = int(sys.argv.pop(1))

def dying(change):
    def until(*args):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*args)
    return until

for name in ("pwritev", "fdatasync", "ftruncate", "punch_hole", "copy_range", "put_file", "remove_file", "sync_folder"):
    setattr(FileIO, name, dying(getattr(FileIO, name)))
sys.exit(main())
"""


def make_chain(folder: Path, kind: str) -> tuple[list[str], bytes]:
    """Four files of 16 MiB, base first, and the hash of what the top reads."""
    paths = [str(folder / f"disk{number}.vhd") for number in range(4)]
    if kind == "fixed":
        create_fixed(paths[0], 16 * MIB)
    else:
        create_dynamic(paths[0], 16 * MIB, block_bytes=512 * KIB)
    digest = scribble(paths[0], 0)
    for number in range(1, 4):
        create_differencing(paths[number], paths[number - 1])
        digest = scribble(paths[number], number)
    return paths, digest


def run_merge(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "mullion.cli", "vhd", "merge", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_7zip_reads_the_same_after_a_merge(kind: str, tmp_path: Path) -> None:
    paths, digest = make_chain(tmp_path, kind)
    assert seven_zip_hash(paths[3]) == digest
    middle = seven_zip_hash(paths[2])
    assert run_merge(paths[3], "--from", paths[2], "--into", paths[1]).returncode == 0
    assert seven_zip_hash(paths[3]) == digest
    assert seven_zip_hash(paths[1]) == middle
    assert run_merge(paths[3], "--into", paths[0]).returncode == 0
    assert seven_zip_hash(paths[0]) == digest
    assert os.listdir(tmp_path) == ["disk0.vhd"]


@pytest.mark.parametrize("ranges", [("3", "2"), ("3", "0"), ("2", "1")])
def test_killed_and_resumed(ranges: tuple[str, str], tmp_path: Path) -> None:
    """At a dozen places in the course of its changes; which one is reached does not depend on time."""
    source = tmp_path / "source"
    source.mkdir()
    _, digest = make_chain(source, "dynamic")
    resumed = 0
    for left in (0, 1, 2, 5, 12, 20, 35, 50, 60, 80, 100, 150, 250):
        folder = tmp_path / "try"
        shutil.copytree(source, folder)
        first, into = (str(folder / f"disk{number}.vhd") for number in ranges)
        top = str(folder / "disk3.vhd")
        line = [sys.executable, "-c", KILLED, str(left), "vhd", "merge", top, "--from", first, "--into", into]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode == -signal.SIGKILL:
            assert our_hash(top if os.path.exists(top) else into) == digest
            if os.path.exists(journal_path(top)):
                done = run_merge(top, "--format", "json")
                assert json.loads(done.stdout)["resumed"] is True
                resumed += 1
            elif os.path.exists(first):
                done = run_merge(top, "--from", first, "--into", into)
            else:
                done.returncode = 0
        assert done.returncode == 0, done.stderr
        assert seven_zip_hash(top if first != top else into) == digest
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
        shutil.rmtree(folder)
    assert resumed >= 5


def our_hash(path: str) -> bytes:
    """What a half-merged chain reads. 7-Zip wants a footer at the end of each file, which a death may have taken."""
    with open_chain(path, read_only=True) as chain:
        return hashlib.sha256(all_of(chain)).digest()


def test_no_room_then_room(small: Path) -> None:  # noqa: F811
    base, child = str(small / "base.vhd"), str(small / "child.vhd")
    create_dynamic(base, 16 * MIB, block_bytes=512 * KIB)
    create_differencing(child, base)
    with open_chain(child) as chain:
        chain.pwrite(3 * MIB, os.urandom(MIB + 600 * KIB))
    digest = seven_zip_hash(child)
    ballast = small / "ballast"
    ballast.write_bytes(bytes(2 * MIB))
    done = run_merge(child)
    assert done.returncode == 9, done.stderr
    assert "no room" in done.stderr
    assert "goes on" in done.stderr
    assert seven_zip_hash(child) == digest
    ballast.unlink()
    done = run_merge(child)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    assert seven_zip_hash(base) == digest
    assert os.listdir(small) == ["base.vhd"]
