"""What other tools make of odd and broken disks: the table in docs/formats/vhd.md is what they do here and now."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.unit.vhd import craft

from mullion.base.units import MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, open_chain

pytestmark = pytest.mark.interop

PAGE = Path(__file__).parents[2] / "docs/formats/vhd.md"
HEADING = "## What other tools make of them"
SIZE_BYTES = 40 * MIB


def table() -> tuple[list[str], dict[str, list[str]]]:
    """The commands of the table's columns, and the cells of each row, by the file's name."""
    section = PAGE.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    commands = [line.partition("`")[2].rpartition("`")[0] for line in section.splitlines() if line.startswith("- `")]
    rows: dict[str, list[str]] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if line.startswith("| `"):
            rows[cells[0].strip("`")] = cells[2:]
    return commands, rows


COMMANDS, ROWS = table()


@pytest.fixture(scope="module")
def truth() -> Iterator[dict[str, str | None]]:
    """The disks, in the working folder, and the sha256 of each one's content; None where it has no true one."""
    with tempfile.TemporaryDirectory(prefix="vhd-tools-") as folder, contextlib.chdir(folder):
        yield make_disks()


def make_disks() -> dict[str, str | None]:
    choose = random.Random(7)
    create_dynamic("dynamic.vhd", SIZE_BYTES)
    with open_chain("dynamic.vhd") as chain:
        chain.pwrite(0, choose.randbytes(4 * MIB))
    create_differencing("child.vhd", "dynamic.vhd")
    with open_chain("child.vhd") as chain:
        for sector in range(1, 4000, 5):
            chain.pwrite(sector * 512, choose.randbytes(1024))
    create_fixed("fixed.vhd", SIZE_BYTES)
    with open_chain("fixed.vhd") as chain:
        chain.pwrite(0, choose.randbytes(MIB))
    create_dynamic("other-creator.vhd", 1000 * MIB)
    with open_chain("other-creator.vhd") as chain:
        chain.pwrite(1000 * MIB - 512, choose.randbytes(512))
    craft.set_footer("other-creator.vhd", 28, b"vbox")
    found: dict[str, str | None] = {name: content(name) for name in os.listdir()}
    whole = found["dynamic.vhd"]
    for name, (breaks, is_lost) in BROKEN.items():
        shutil.copy("fixed.vhd" if name.startswith("fixed") else "dynamic.vhd", name)
        breaks(name)
        found[name] = None if is_lost else whole
    return found


def content(path: str) -> str:
    found = hashlib.sha256()
    with open_chain(path, read_only=True) as chain:
        piece = bytearray(MIB)
        for offset in range(0, chain.size_bytes, MIB):
            chain.pread(offset, piece)
            found.update(piece)
    return found.hexdigest()


def cut_fixed(name: str) -> None:
    footer = craft.peek(name, -512, 512)
    os.truncate(name, 30 * MIB)
    with open(name, "ab") as file:
        file.write(footer)


BROKEN: dict[str, tuple[Callable[[str], None], bool]] = {
    "no-tail-footer.vhd": (lambda name: os.truncate(name, os.path.getsize(name) - 512), False),
    "no-footer-copy.vhd": (lambda name: craft.patch(name, 0, bytes(512)), False),
    "bad-header-sum.vhd": (lambda name: craft.patch(name, 512 + 36, bytes(4)), True),
    "same-block-twice.vhd": (lambda name: craft.set_entry(name, 1, craft.entry(name, 0)), True),
    "block-in-header.vhd": (lambda name: craft.set_entry(name, 1, 1), True),
    "block-past-end.vhd": (lambda name: craft.set_entry(name, 1, 0x7FFF_FF00), True),
    "block-size-3M.vhd": (lambda name: craft.set_header(name, 32, struct.pack(">I", 3 * MIB)), True),
    "fixed-cut.vhd": (cut_fixed, True),
}
"""How each file is broken, and whether nobody can know what was in it."""


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=[command.split()[0] for command in COMMANDS])
@pytest.mark.parametrize("name", ROWS)
def test_the_table_is_what_the_tools_do(name: str, number: int, truth: dict[str, str | None], tmp_path: Path) -> None:
    assert name in truth
    command = COMMANDS[number].replace("FILE", name).replace("OUT", str(tmp_path / "out.raw"))
    command = command.replace("MNT", str(tmp_path)).replace("mullion ", f"{sys.executable} -m mullion.cli ")
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120, check=False, text=True)
    assert outcome(done.returncode, tmp_path / "out.raw", truth[name]) == ROWS[name][number], done.stdout + done.stderr


def outcome(status: int, target: Path, true_hash: str | None) -> str:
    if status:
        return "refuses"
    with target.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == true_hash
    return "right" if same else "**wrong**"


def test_every_disk_is_in_the_table(truth: dict[str, str | None]) -> None:
    assert truth.keys() == ROWS.keys()
    assert {len(cells) for cells in ROWS.values()} == {len(COMMANDS)}
    assert all(cells[-1] != "**wrong**" for cells in ROWS.values()), "ours comes last, and is never wrong"
