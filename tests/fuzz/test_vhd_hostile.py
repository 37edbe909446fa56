"""No file makes open, check, info or tree take more than 5 s of processor time or 100 MB of memory.

Each runs in a process of its own whose time and memory are measured by the kernel; the files are made here.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.vhd import craft
from tests.unit.vhd.test_hostile import READ_ONLY, REFUSED

from mullion.base.units import GIB
from mullion.vhd import create_differencing, create_dynamic

pytestmark = pytest.mark.fuzz

LIMIT_S = 5.0
LIMIT_MB = 100.0
BLOCKS = 4 << 20
"""As many as a BAT may have."""

PROGRAM = """
import json, resource, sys, time
from mullion.base.errors import MullionError
from mullion.vhd import open_chain
from mullion.vhd.check import check_disk
from mullion.vhd.forest import plant

def opened(path):
    open_chain(path, read_only=True).close()
    return "opened"

def drawn(path):
    found = {node.report.verdict.value for root in plant(path) for node in root.walk()}
    return next(word for word in ("broken", "repairable", "sound") if word in found)

resource.setrlimit(resource.RLIMIT_CPU, (240, 240))
calls = {
    "open": opened,
    "check": lambda path: check_disk(path).verdict.value,
    "info": lambda path: check_disk(path, facts=True).verdict.value,
    "tree": drawn,
}
found = []
for path in sys.argv[1:]:
    for name, call in calls.items():
        begin_s = time.process_time()
        try:
            outcome = call(path)
        except MullionError as error:
            outcome = error.code
        found.append([path, name, outcome, time.process_time() - begin_s])
with open("/proc/self/status") as status:  # getrusage counts what the parent had before exec
    peak_kb = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(json.dumps([found, peak_kb / 1024]))
"""


def measure(*paths: str) -> dict[tuple[str, str], str]:
    """What each call comes to, by path and call; fails when one takes too much."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths], capture_output=True, timeout=280, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    found, peak_mb = json.loads(done.stdout)
    for path, name, outcome, took_s in found:
        assert took_s <= LIMIT_S, (path, name, outcome)
    assert peak_mb <= LIMIT_MB
    return {(path, name): outcome for path, name, outcome, _ in found}


def test_every_class_of_small_files(tmp_path: Path) -> None:
    """What opening refuses is never sound, and what can only be read neither."""
    paths: dict[str, bool] = {}
    cases = {name: (kind, break_it) for name, (kind, break_it, _, _) in REFUSED.items()}
    for kind in ("dynamic", "differencing"):
        cases |= {f"{name}, {kind}": (kind, break_it) for name, (break_it, _) in READ_ONLY.items()}
    for number, (name, (kind, break_it)) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = craft.make(folder, kind)
        break_it(path)
        paths[path] = name in REFUSED
    found = measure(*paths)
    for path, is_refused in paths.items():
        assert (found[path, "open"] != "opened") == is_refused, path
        assert found[path, "check"] in ("repairable", "broken"), path
        assert found[path, "info"] == found[path, "check"] == found[path, "tree"]


def spoil(header_field: int, content: bytes) -> Callable[[str], None]:
    return lambda path: craft.set_header(path, header_field, content)


def both(*changes: Callable[[str], None]) -> Callable[[str], None]:
    def change(path: str) -> None:
        for one in changes:
            one(path)

    return change


def name_parent(text: bytes) -> Callable[[str], None]:
    """Replace the texts of both locators, which have 512 bytes each at 2048 and 2560, and the parent's name."""

    def change(path: str) -> None:
        for number, at in enumerate((2048, 2560)):
            craft.patch(path, at, text.ljust(512, b"\0"))
            craft.set_header(path, 576 + 24 * number + 8, struct.pack(">I", len(text)))
        craft.set_header(path, 64, bytes(512))

    return change


CHAINS: dict[str, tuple[Callable[[str], None], str]] = {
    "parent missing": (lambda path: os.unlink(os.path.join(os.path.dirname(path), "parent.vhd")), "vhd-parent-missing"),
    "parent of another id": (spoil(40, b"\1" * 16), "vhd-parent-mismatch"),
    "parent outside": (name_parent("/etc/passwd".encode("utf-16-le")), "vhd-parent-refused"),
    "parent remote": (name_parent("\\\\host\\share\\a.vhd".encode("utf-16-le")), "vhd-parent-refused"),
    "parent on a drive": (name_parent("C:\\a.vhd".encode("utf-16-le")), "vhd-parent-refused"),
    "locator of 4 GiB": (both(name_parent(b""), spoil(576 + 8, b"\xff\xff\xff\xff")), "vhd-parent-missing"),
    "locator that is no text": (name_parent(b"\x00\xd8" * 20), "vhd-parent-missing"),
    "no locator at all": (both(spoil(64, bytes(512)), spoil(576, bytes(192))), "vhd-parent-missing"),
}


def test_every_class_of_chains(tmp_path: Path) -> None:
    paths: dict[str, str] = {}
    for number, (break_it, code) in enumerate(CHAINS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = craft.make(folder, "differencing")
        break_it(path)
        paths[path] = code
    found = measure(*paths)
    for path, code in paths.items():
        assert found[path, "open"] == code, path
        assert found[path, "check"] == found[path, "info"] == found[path, "tree"] == "broken", path


def test_what_is_no_file(tmp_path: Path) -> None:
    fifo = str(tmp_path / "fifo.vhd")
    os.mkfifo(fifo)
    found = measure(fifo, "/dev/zero", str(tmp_path / "nothing.vhd"))
    assert {found[fifo, name] for name in ("open", "check", "info", "tree")} == {"not-a-vhd"}
    assert found["/dev/zero", "check"] == "not-a-vhd"
    assert found[str(tmp_path / "nothing.vhd"), "check"] == "not-found"


def largest_bat(path: str, table: array[int]) -> None:
    """A disk of 2 GiB in blocks of a sector, with this BAT of 16 MiB; the file is 30 GiB long and sparse."""
    create_dynamic(path, BLOCKS * 512, block_bytes=512)
    tail = craft.peek(path, -512, 512)
    if sys.byteorder == "little":
        table.byteswap()
    craft.patch(path, craft.BAT, table.tobytes())
    os.truncate(path, 30 * GIB)
    craft.patch(path, 30 * GIB - 512, tail)


FIRST = (craft.BAT + BLOCKS * 4) // 512
TABLES: dict[str, tuple[Callable[[], array[int]], str]] = {
    "in order": (lambda: array("I", range(FIRST, FIRST + 2 * BLOCKS, 2)), "sound"),
    "shuffled": (lambda: array("I", (FIRST + 2 * (i * 1_000_003 % BLOCKS) for i in range(BLOCKS))), "sound"),
    "all the same": (lambda: array("I", [FIRST + 8]) * BLOCKS, "broken"),
    "all past the end": (lambda: array("I", [0xFFFF_FFF0]) * BLOCKS, "broken"),
    "all into the header": (lambda: array("I", [1]) * BLOCKS, "broken"),
    "each over its neighbours": (lambda: array("I", range(FIRST, FIRST + BLOCKS)), "broken"),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_largest_bat(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / "large.vhd")
    table, verdict = TABLES[name]
    largest_bat(path, table())
    found = measure(path)
    assert found[path, "open"] == "opened"
    assert found[path, "check"] == verdict


def test_the_longest_chain_and_one_that_is_longer(tmp_path: Path) -> None:
    path = str(tmp_path / "0.vhd")
    create_dynamic(path, 1 << 20)
    for number in range(1, 1026):
        child = str(tmp_path / f"{number}.vhd")
        create_differencing(child, path, durable=False)
        path = child
    longest = str(tmp_path / "1000.vhd")
    found = measure(longest, path)
    assert found[longest, "check"] == found[longest, "tree"] == "sound"
    assert found[path, "open"] == "vhd-chain-too-deep"
    assert found[path, "check"] == "broken"


def test_a_ring_of_disks(tmp_path: Path) -> None:
    first, second = str(tmp_path / "first.vhd"), str(tmp_path / "second.vhd")
    create_dynamic(second, 1 << 20)
    create_differencing(first, second)
    os.unlink(second)
    create_differencing(second, first)
    craft.set_header(first, 40, craft.peek(second, 68, 16))
    found = measure(first, str(tmp_path))
    assert found[first, "open"] == "vhd-chain-cycle"
    assert found[first, "check"] == "broken"
    assert found[str(tmp_path), "tree"] == "broken"
