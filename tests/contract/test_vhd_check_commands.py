"""`mullion vhd info`, `tree`, `check` and `repair` as a person or a script runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit.vhd import craft

from mullion.base.units import MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, open_chain

pytestmark = pytest.mark.contract


def vhd(*words: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mullion.cli", "vhd", *words],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        timeout=60,
        check=False,
        encoding="utf-8",
    )


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    """`a base.vhd`, `child.vhd` and `grandchild.vhd` on it, `damaged.vhd` without a footer at its end."""
    base = str(tmp_path / "a base.vhd")
    create_dynamic(base, 40 * MIB)
    create_differencing(str(tmp_path / "child.vhd"), base)
    create_differencing(str(tmp_path / "grandchild.vhd"), str(tmp_path / "child.vhd"))
    create_dynamic(str(tmp_path / "damaged.vhd"), 40 * MIB)
    os.truncate(tmp_path / "damaged.vhd", 3072)
    return tmp_path


def test_verdicts_are_exit_codes(disks: Path) -> None:
    assert vhd("check", "grandchild.vhd", cwd=disks).returncode == 0
    done = vhd("check", "damaged.vhd", cwd=disks)
    assert done.returncode == 10
    assert "mullion vhd repair damaged.vhd" in done.stdout.replace("python -m mullion.cli", "mullion")
    os.unlink(disks / "child.vhd")
    assert vhd("check", "grandchild.vhd", cwd=disks).returncode == 11
    assert vhd("check", "grandchild.vhd", "--no-parents", cwd=disks).returncode == 0
    assert vhd("check", "nothing.vhd", cwd=disks).returncode == 3


def test_the_json_of_a_check(disks: Path) -> None:
    done = vhd("check", "damaged.vhd", "--format", "json", cwd=disks)
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"], found["path"]) == (10, "repairable", "damaged.vhd")
    problem = found["problems"][0]
    assert {"path", "code", "severity", "structure", "offset", "what", "remedy", "cure"} == set(problem)
    assert (problem["code"], problem["severity"], problem["structure"]) == ("footer-missing", "error", "footer")
    assert isinstance(problem["offset"], int)
    assert found["files"][0]["verdict"] == "repairable"


def test_a_repair_its_dry_run_and_its_undoing(disks: Path) -> None:
    before = (disks / "damaged.vhd").read_bytes()
    done = vhd("repair", "damaged.vhd", "--dry-run", cwd=disks)
    assert (done.returncode, (disks / "damaged.vhd").read_bytes()) == (0, before)
    assert "would be done" in done.stdout
    done = vhd("repair", "damaged.vhd", "--format", "json", cwd=disks)
    said = json.loads(done.stdout)
    assert (done.returncode, said["verdict_before"], said["verdict"]) == (0, "repairable", "sound")
    assert said["actions"]
    assert vhd("check", "damaged.vhd", cwd=disks).returncode == 0
    done = vhd("repair", "damaged.vhd", cwd=disks)
    assert (done.returncode, "needs no repair" in done.stdout) == (0, True)
    assert vhd("repair", "--undo", said["backup"], "damaged.vhd", cwd=disks).returncode == 0
    assert (disks / "damaged.vhd").read_bytes() == before


def test_what_cannot_be_mended_keeps_its_exit_code(disks: Path) -> None:
    path = craft.make(disks, "dynamic")
    craft.set_entry(path, 4, 1)
    done = vhd("repair", path, cwd=disks)
    assert done.returncode == 11
    assert "--allow-loss" in done.stdout
    assert vhd("repair", path, "--allow-loss", cwd=disks).returncode == 0


def test_info_says_all_of_a_chain(disks: Path) -> None:
    done = vhd("info", "grandchild.vhd", "--format", "json", cwd=disks)
    found = json.loads(done.stdout)
    assert (found["type"], found["size_bytes"], found["verdict"]) == ("differencing", 40 * MIB, "sound")
    assert [Path(file["path"]).name for file in found["files"]] == ["grandchild.vhd", "child.vhd", "a base.vhd"]
    assert Path(found["parent_path"]).name == "child.vhd"
    assert found["parent"]["locators"][0]["text"] == ".\\child.vhd"
    text = vhd("info", "grandchild.vhd", "--chain", cwd=disks).stdout
    assert text.count("unique id") == 3
    assert "41943040 bytes" in text
    assert "41909760 bytes by its geometry" in text


def test_info_of_what_is_damaged_foreign_or_held(disks: Path) -> None:
    done = vhd("info", "damaged.vhd", cwd=disks)
    assert (done.returncode, "repairable" in done.stdout) == (0, True)
    (disks / "other.img").write_bytes(b"vhdxfile" * 1000)
    done = vhd("info", "other.img", cwd=disks)
    assert done.returncode == 8
    assert "a VHDX" in done.stderr
    assert "vhd convert other.img" in done.stderr
    with open_chain(str(disks / "a base.vhd"), holder="partition web"):
        assert "partition web" in vhd("info", "a base.vhd", cwd=disks).stdout
        assert "held by partition web" in vhd("tree", ".", cwd=disks).stdout


def test_a_folder_is_drawn(disks: Path) -> None:
    (disks / "notes.txt").write_text("no disk")
    create_fixed(str(disks / "fixed.vhd"), MIB)
    text = vhd("tree", ".", cwd=disks, env={"PYTHONIOENCODING": "utf-8"}).stdout.splitlines()
    assert [line.lstrip(" ").partition("  ")[0] for line in text if "!" not in line] == [
        "a base.vhd",
        "└── child.vhd",
        "└── grandchild.vhd",
        "damaged.vhd",
        "fixed.vhd",
    ]
    assert "! footer, byte 2560" in text[4]
    plain = vhd("tree", ".", cwd=disks, env={"PYTHONIOENCODING": "ascii"}).stdout
    assert "`-- child.vhd" in plain


def test_a_chain_is_drawn_and_what_is_missing_is_said(disks: Path) -> None:
    text = vhd("tree", "grandchild.vhd", cwd=disks, env={"PYTHONIOENCODING": "utf-8"}).stdout.splitlines()
    assert [line.partition("  dynamic")[0].partition("  diff")[0].rpartition("/")[2] for line in text] == [
        "a base.vhd",
        "child.vhd",
        "    └── grandchild.vhd",
    ]
    os.rename(disks / "a base.vhd", disks / "elsewhere.vhd")
    text = vhd("tree", ".", cwd=disks).stdout
    assert "its parent is missing" in text
    nested = json.loads(vhd("tree", ".", "--format", "json", cwd=disks).stdout)
    child = next(root for root in nested if root["path"].endswith("child.vhd"))
    assert (child["verdict"], child["children"][0]["verdict"]) == ("broken", "sound")


def test_a_parent_in_another_folder_is_drawn_too(disks: Path) -> None:
    folder = disks / "ünïcode 磁盘"
    folder.mkdir()
    create_differencing(str(folder / "kind.vhd"), str(disks / "a base.vhd"))
    text = vhd("tree", str(folder), cwd=disks, env={"PYTHONIOENCODING": "utf-8"}).stdout
    assert text.splitlines()[0].startswith(str(disks / "a base.vhd"))
    assert "└── kind.vhd" in text


def test_names_in_a_file_do_not_drive_the_terminal(disks: Path) -> None:
    path = str(disks / "child.vhd")
    text = "\x1b[31mred\x07\u202e".encode("utf-16-le")
    craft.patch(path, 2048, text.ljust(512, b"\0"))
    craft.set_header(path, 64, "\x1b]0;title\x07".encode("utf-16-be").ljust(512, b"\0"))
    for command in ("info", "check", "tree"):
        done = vhd(command, path, cwd=disks)
        assert "\x1b" not in done.stdout + done.stderr
        assert "\x07" not in done.stdout + done.stderr
