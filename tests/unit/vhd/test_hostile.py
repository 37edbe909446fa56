"""Broken and hostile files: each gets its own answer, nothing is written, nothing hangs."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.contract.block_device import all_of, read
from tests.unit.vhd import craft

from mullion.base.errors import MullionError
from mullion.base.units import MIB
from mullion.vhd import VhdError, create_differencing, inspect_chain, open_chain
from mullion.vhd.errors import NotVhdError, VhdDamagedError, VhdUnsupportedError

pytestmark = pytest.mark.unit

Break = Callable[[str], None]


def cut(path: str, to_bytes: int) -> None:
    os.truncate(path, to_bytes if to_bytes >= 0 else os.path.getsize(path) + to_bytes)


def both_footers(path: str) -> None:
    craft.patch(path, 0, b"conectiX")
    craft.patch(path, -512, b"conectiX")


def sparse_bat(path: str) -> None:
    """2 TiB in blocks of 512 bytes: a BAT of 16 GiB that lies in a hole of the file."""
    size = 2040 << 30
    craft.set_footer(path, 48, struct.pack(">Q", size))
    craft.set_header(path, 28, struct.pack(">I", size // 512))
    craft.set_header(path, 32, struct.pack(">I", 512))
    tail = craft.peek(path, -512, 512)
    os.truncate(path, 17 << 30)
    craft.patch(path, (17 << 30) - 512, tail)


REFUSED: dict[str, tuple[str, Break, type[VhdError], str]] = {
    "empty file": ("dynamic", lambda p: cut(p, 0), NotVhdError, "not a VHD"),
    "text": ("dynamic", lambda p: Path(p).write_bytes(b"hello\n" * 1000) and None, NotVhdError, "not a VHD"),
    "vhdx": ("dynamic", lambda p: Path(p).write_bytes(b"vhdxfile" * 1000) and None, NotVhdError, "a VHDX"),
    "both footers bad": ("dynamic", both_footers, NotVhdError, "not a VHD"),
    "footer checksum": ("fixed", lambda p: craft.patch(p, -500, b"\1"), VhdDamagedError, "checksum"),
    "both checksums": (
        "dynamic",
        lambda p: (craft.patch(p, 13, b"\7"), craft.patch(p, -499, b"\7"), None)[-1],
        VhdDamagedError,
        "checksum",
    ),
    "version": ("dynamic", lambda p: craft.set_footer(p, 12, b"\0\2\0\0"), VhdDamagedError, "version"),
    "type": ("dynamic", lambda p: craft.set_footer(p, 60, b"\0\0\0\5"), VhdDamagedError, "type 5"),
    "size zero": ("fixed", lambda p: craft.set_footer(p, 48, bytes(8)), VhdDamagedError, "current size"),
    "size odd": ("fixed", lambda p: craft.set_footer(p, 48, struct.pack(">Q", 513)), VhdDamagedError, "current size"),
    "size enormous": ("fixed", lambda p: craft.set_footer(p, 48, b"\xff" * 6 + b"\xfe\0"), VhdDamagedError, "size"),
    "fixed too short": ("fixed", lambda p: craft.set_footer(p, 48, struct.pack(">Q", MIB)), VhdDamagedError, "only"),
    "header outside": (
        "dynamic",
        lambda p: craft.set_footer(p, 16, struct.pack(">Q", 1 << 40)),
        VhdDamagedError,
        "dynamic disk header",
    ),
    "header nowhere": ("dynamic", lambda p: craft.set_footer(p, 16, b"\xff" * 8), VhdDamagedError, "header"),
    "header over footer": ("dynamic", lambda p: craft.set_footer(p, 16, bytes(8)), VhdDamagedError, "header"),
    "header cookie": ("dynamic", lambda p: craft.patch(p, 512, b"cxsparsE"), VhdDamagedError, "cxsparse"),
    "header checksum": ("dynamic", lambda p: craft.patch(p, 512 + 70, b"\1"), VhdDamagedError, "checksum"),
    "header version": ("dynamic", lambda p: craft.set_header(p, 24, b"\0\2\0\0"), VhdDamagedError, "version"),
    "block size zero": ("dynamic", lambda p: craft.set_header(p, 32, bytes(4)), VhdDamagedError, "block size 0"),
    "block size 3": (
        "dynamic",
        lambda p: craft.set_header(p, 32, struct.pack(">I", 3 << 20)),
        VhdDamagedError,
        "block",
    ),
    "block size 256": ("dynamic", lambda p: craft.set_header(p, 32, struct.pack(">I", 256)), VhdDamagedError, "block"),
    "block size 512 MiB": (
        "dynamic",
        lambda p: craft.set_header(p, 32, struct.pack(">I", 512 << 20)),
        VhdDamagedError,
        "block size",
    ),
    "BAT empty": ("dynamic", lambda p: craft.set_header(p, 28, bytes(4)), VhdDamagedError, "no entries"),
    "BAT too small": ("dynamic", lambda p: craft.set_header(p, 28, struct.pack(">I", 9)), VhdDamagedError, "cover"),
    "BAT larger than the file": (
        "dynamic",
        lambda p: craft.set_header(p, 28, b"\xff\xff\xff\xff"),
        VhdDamagedError,
        "reach beyond",
    ),
    "BAT outside": (
        "dynamic",
        lambda p: craft.set_header(p, 16, struct.pack(">Q", 1 << 50)),
        VhdDamagedError,
        "reach beyond",
    ),
    "BAT over the header": (
        "dynamic",
        lambda p: craft.set_header(p, 16, struct.pack(">Q", 1024)),
        VhdDamagedError,
        "over the dynamic disk header",
    ),
    "BAT over the footer": (
        "dynamic",
        lambda p: craft.set_header(p, 16, struct.pack(">Q", os.path.getsize(p) - 512)),
        VhdDamagedError,
        "reach beyond",
    ),
    "BAT unaligned": ("dynamic", lambda p: craft.set_header(p, 16, struct.pack(">Q", 1537)), VhdDamagedError, "512"),
    "BAT in a hole": ("dynamic", sparse_bat, VhdUnsupportedError, "more than the supported"),
    "file cut in the header": ("dynamic", lambda p: cut(p, 1000), VhdDamagedError, "header"),
    "file cut in the BAT": ("dynamic", lambda p: cut(p, 1540), VhdDamagedError, "reach beyond"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("read_only", [True, False], ids=["read", "write"])
def test_refused(name: str, read_only: bool, tmp_path: Path) -> None:
    kind, break_it, error, words = REFUSED[name]
    path = craft.make(tmp_path, kind)
    break_it(path)
    before = os.stat(path).st_mtime_ns
    with pytest.raises(error, match=words) as caught:
        open_chain(path, read_only=read_only)
    assert path in caught.value.message
    assert caught.value.path == path
    assert caught.value.structure
    assert caught.value.offset is not None
    assert caught.value.remedy
    assert os.stat(path).st_mtime_ns == before
    with pytest.raises(error):
        inspect_chain(path)


def make_tail_disagree(path: str) -> None:
    craft.patch(path, -512 + 68, b"\0" * 16)
    craft.patch(path, -512 + 64, struct.pack(">I", craft.checksum(craft.peek(path, -512, 512), 64)))


READ_ONLY: dict[str, tuple[Break, str]] = {
    "copy of the footer damaged": (lambda p: craft.patch(p, 20, b"\7"), "copy of the footer"),
    "copies disagree": (make_tail_disagree, "disagree"),
    "cut inside the last block": (lambda p: cut(p, -18000), "was cut"),
    "entry into the header": (lambda p: craft.set_entry(p, 4, 1), "point into other structures"),
    "entry into the BAT": (lambda p: craft.set_entry(p, 4, 3), "point into other structures"),
    "entry past the end": (lambda p: craft.set_entry(p, 4, 0x00FF_FFFF), "past the end"),
    "entry near 2 TiB": (lambda p: craft.set_entry(p, 4, 0xFFFF_FFFE), "past the end"),
    "overlap": (lambda p: craft.set_entry(p, 4, craft.entry(p, 9) - 1), "other structures"),
    "the same block twice": (lambda p: craft.set_entry(p, 4, craft.entry(p, 9)), "other structures"),
}


@pytest.mark.parametrize("name", READ_ONLY)
@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
def test_readable_but_not_writable(name: str, kind: str, tmp_path: Path) -> None:
    break_it, words = READ_ONLY[name]
    path = craft.make(tmp_path, kind)
    break_it(path)
    before = hashlib.sha256(Path(path).read_bytes()).digest()
    with pytest.raises(VhdDamagedError, match=words) as caught:
        open_chain(path)
    assert "read-only" in caught.value.remedy
    with open_chain(path, read_only=True) as chain:
        assert any(words in text for text in chain.warnings)
        assert read(chain, 1000, 1024) == bytes(24) + b"x" * 1000
        if "entry" in name or name in ("overlap", "the same block twice"):
            with pytest.raises(VhdDamagedError, match="BAT entry 4"):
                read(chain, 4 * craft.BLOCK_BYTES + 1024, 10)
        if "cut" in name:
            with pytest.raises(VhdDamagedError, match="the file ends"):
                all_of(chain)
    assert hashlib.sha256(Path(path).read_bytes()).digest() == before
    assert words in " ".join(inspect_chain(path).files[0].damage)


ACCEPTED: dict[str, tuple[str, Break, str]] = {
    "reserved feature clear": ("dynamic", lambda p: craft.set_footer(p, 8, bytes(4)), "reserved feature"),
    "saved state": ("dynamic", lambda p: craft.set_footer(p, 84, b"\1"), "saved state"),
    "zero geometry": ("fixed", lambda p: craft.set_footer(p, 56, bytes(4)), "geometry"),
    "odd timestamp": ("dynamic", lambda p: craft.set_footer(p, 24, b"\xff" * 4), ""),
    "parent timestamp": ("differencing", lambda p: craft.set_header(p, 56, b"\0\0\0\7"), "timestamp"),
    "padding of zeros": ("dynamic", lambda p: craft.patch(p, craft.BAT + 40, bytes(472)), ""),
    "header's next is zero": ("dynamic", lambda p: craft.set_header(p, 8, bytes(8)), ""),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_with_a_warning(name: str, tmp_path: Path) -> None:
    kind, change, words = ACCEPTED[name]
    path = craft.make(tmp_path, kind)
    change(path)
    with open_chain(path) as chain:
        assert bool(chain.warnings) == bool(words)
        assert words in " ".join(chain.warnings)
        chain.pwrite(0, b"written")
        assert read(chain, 0, 7) == b"written"


def test_footer_of_511_bytes(tmp_path: Path) -> None:
    for kind in ("fixed", "dynamic"):
        path = craft.make(tmp_path, kind)
        cut(path, -1)
        with open_chain(path) as chain:
            assert "511" in " ".join(chain.warnings)
            chain.pwrite(2 * craft.BLOCK_BYTES, b"more")
            content = all_of(chain)
        with open_chain(path, read_only=True) as chain:
            assert all_of(chain) == content


@pytest.mark.parametrize("damage", ["zeros", "missing", "garbage behind", "torn block behind"])
def test_a_missing_footer_is_mended_when_the_disk_is_written(damage: str, tmp_path: Path) -> None:
    path = craft.make(tmp_path, "dynamic")
    good_bytes = os.path.getsize(path)
    if damage == "zeros":
        craft.patch(path, -512, bytes(512))
    elif damage == "missing":
        cut(path, -512)
    else:
        with open(path, "ab") as file:
            file.write(b"\xaa" * (700 if damage == "garbage behind" else 3 * craft.BLOCK_BYTES + 100))
    with open_chain(path, read_only=True) as chain:
        assert "footer at the end is missing" in " ".join(chain.warnings)
        content = all_of(chain)
    with open_chain(path) as chain:
        assert "written again" in " ".join(chain.warnings)
        assert all_of(chain) == content
    assert os.path.getsize(path) == good_bytes
    with open_chain(path, read_only=True) as chain:
        assert chain.warnings == []


def test_the_guests_data_is_not_taken_for_a_footer(tmp_path: Path) -> None:
    """A guest that writes a footer of its own into the first or last sector of its disk changes nothing."""
    (tmp_path / "other").mkdir()
    foreign = craft.peek(craft.make(tmp_path / "other", "differencing"), 0, 512)
    for kind in ("fixed", "dynamic"):
        path = craft.make(tmp_path, kind)
        with open_chain(path) as chain:
            chain.pwrite(0, foreign)
            chain.pwrite(chain.size_bytes - 512, foreign)
            unique_id = chain.unique_id
        with open_chain(path, read_only=True) as chain:
            assert chain.unique_id == unique_id
            assert read(chain, 0, 512) == foreign
            assert chain.warnings == []


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.vhd")
    for path in (tmp_path / "fifo.vhd", tmp_path, Path("/dev/null")):
        for read_only in (True, False):
            with pytest.raises(NotVhdError, match="not a regular file"):
                open_chain(str(path), read_only=read_only)


def test_every_single_byte_of_the_metadata_may_be_wrong(tmp_path: Path) -> None:
    """Each byte of footer copy, header, locators and BAT in turn: a typed error, or a disk that reads or says why not."""
    path = craft.make(tmp_path, "differencing")
    original = Path(path).read_bytes()
    outcomes = {"error": 0, "read": 0}
    for offset in [*range(0, 1536 + 48, 5), *range(2048, 2100, 3), *range(3072, 3072 + 44)]:
        for value in (original[offset] ^ 0xFF, original[offset] ^ 0x01):
            craft.patch(path, offset, bytes([value]))
            try:
                with open_chain(path, read_only=True) as chain:
                    all_of(chain)
                outcomes["read"] += 1
            except MullionError as error:
                outcomes["error"] += bool(error.remedy)
            craft.patch(path, offset, original[offset : offset + 1])
    assert outcomes["error"] > 100
    assert outcomes["read"] > 100


def test_a_child_of_a_broken_parent_is_not_created(tmp_path: Path) -> None:
    parent = craft.make(tmp_path, "dynamic")
    craft.patch(parent, 512, b"cxsparsE")
    with pytest.raises(VhdDamagedError):
        create_differencing(str(tmp_path / "child.vhd"), parent)
    assert not (tmp_path / "child.vhd").exists()
