"""`mullion vhd resize`, `compact`, `rebase` and `diff` as a person or a script runs them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tests.contract.test_vhd_check_commands import vhd

from mullion.base.units import MIB
from mullion.vhd import create_differencing, create_dynamic, inspect_chain, open_chain

pytestmark = pytest.mark.contract


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """`a base.vhd` with data, and `enfant ünï.vhd` over it with a sector."""
    base = str(tmp_path / "a base.vhd")
    create_dynamic(base, 40 * MIB)
    create_differencing(str(tmp_path / "enfant ünï.vhd"), base)
    for path, offset in ((base, 10 * MIB), (str(tmp_path / "enfant ünï.vhd"), 20 * MIB)):
        with open_chain(path) as chain:
            chain.pwrite(offset, b"x" * 512)
    return tmp_path


def test_resize(disks: Path) -> None:
    done = vhd("resize", "enfant ünï.vhd", "--size", "80000001", "--format", "json", cwd=disks)
    assert json.loads(done.stdout) == {
        "path": "enfant ünï.vhd",
        "old_size_bytes": 40 * MIB,
        "size_bytes": 77 * MIB,
        "partition_table": "none",
        "table_problem": None,
    }
    refused = vhd("resize", "a base.vhd", "--size", "80M", cwd=disks)
    assert refused.returncode == 4
    assert "parent of enfant ünï.vhd" in refused.stderr
    assert vhd("resize", "a base.vhd", "--size", "80M", "--force", cwd=disks).returncode == 0
    refused = vhd("resize", "enfant ünï.vhd", "--size", "4M", cwd=disks)
    assert refused.returncode == 5
    assert "--size 21M" in refused.stderr


def test_compact(disks: Path) -> None:
    with open_chain(str(disks / "a base.vhd")) as chain:
        chain.pwrite(10 * MIB, bytes(512))
    done = vhd("compact", "a base.vhd", "--format", "json", cwd=disks)
    said = json.loads(done.stdout)
    assert (said["blocks_removed"], said["file_bytes"]) == (1, os.path.getsize(disks / "a base.vhd"))
    assert said["file_bytes"] < said["old_file_bytes"]
    told = vhd("compact", "enfant ünï.vhd", "--free-space", cwd=disks)
    assert told.returncode == 0
    assert "0 blocks removed, 0 moved" in told.stderr


def test_rebase(disks: Path) -> None:
    shutil.move(disks / "a base.vhd", disks / "moved.vhd")
    done = vhd("rebase", "enfant ünï.vhd", "--parent", "moved.vhd", cwd=disks)
    assert "finds its parent at moved.vhd now" in done.stderr
    create_dynamic(str(disks / "other.vhd"), 40 * MIB)
    done = vhd("rebase", "enfant ünï.vhd", "--parent", "other.vhd", "--format", "json", cwd=disks)
    assert json.loads(done.stdout) == {
        "path": "enfant ünï.vhd",
        "parent": "other.vhd",
        "is_same_disk": False,
        "copied_bytes": 512,
    }
    assert [Path(path).name for path in inspect_chain(str(disks / "enfant ünï.vhd")).paths][1] == "other.vhd"
    refused = vhd("rebase", "other.vhd", "--parent", "moved.vhd", cwd=disks)
    assert refused.returncode == 5
    assert "mullion.cli vhd create CHILD --parent moved.vhd" in refused.stderr


def test_diff(disks: Path) -> None:
    done = vhd("diff", "enfant ünï.vhd", "--since", "a base.vhd", "--format", "json", cwd=disks)
    assert json.loads(done.stdout) == [{"offset": 20 * MIB, "length": 512, "zero": False}]
    done = vhd("diff", "a base.vhd", "enfant ünï.vhd", cwd=disks)
    assert done.stdout.split() == ["OFFSET", "LENGTH", "KIND", str(20 * MIB), "512", "data"]
    assert "1 ranges, 512 B (512 bytes), of it 0 B zeros" in done.stderr
    done = vhd("diff", "a base.vhd", "a base.vhd", "--format", "json", cwd=disks)
    assert json.loads(done.stdout) == []
    refused = vhd("diff", "a base.vhd", "enfant ünï.vhd", "--since", "a base.vhd", cwd=disks)
    assert refused.returncode == 5
