"""Locks, the pending log, the direct tables, running out of space, and what a chain refuses."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from tests.contract.block_device import all_of, read
from tests.unit.vhd import craft
from tests.unit.vhd.power_cut import RecordingIO

import mullion.vhd.pending
from mullion.base.block import Buffer, ExtentKind
from mullion.base.errors import StateError
from mullion.base.units import GIB, KIB, MIB
from mullion.vhd import Chain, DiskBusyError, create_differencing, create_dynamic, create_fixed, open_chain
from mullion.vhd.errors import DiskReadOnlyError, ParentMismatchError, ParentNotFoundError
from mullion.vhd.fileio import SYSTEM, FileIO
from mullion.vhd.image import load_image, open_file
from mullion.vhd.pending import RECORD_LIMIT
from mullion.vhd.top import TopWriter

pytestmark = pytest.mark.unit


@pytest.fixture
def layers(tmp_path: Path) -> list[str]:
    """Parent and two children, 1 MiB in blocks of 64 KiB."""
    paths = [str(tmp_path / f"{number}.vhd") for number in range(3)]
    create_dynamic(paths[0], MIB, block_bytes=64 * KIB)
    create_differencing(paths[1], paths[0])
    create_differencing(paths[2], paths[1])
    return paths


# ---------------------------------------------------------------------- locks


def test_a_disk_has_one_writer(layers: list[str]) -> None:
    with open_chain(layers[2], holder="partition demo"):
        for read_only in (True, False):
            with pytest.raises(DiskBusyError, match="partition demo") as caught:
                open_chain(layers[2], read_only=read_only)
            assert caught.value.context["holder"] == "partition demo"
            assert caught.value.code == "disk-busy"
    open_chain(layers[2]).close()


def test_a_parent_in_use_cannot_be_written_but_can_be_shared(layers: list[str], tmp_path: Path) -> None:
    other = str(tmp_path / "other.vhd")
    create_differencing(other, layers[1])
    with open_chain(layers[2]), open_chain(other), open_chain(layers[1], read_only=True):
        for parent in layers[:2]:
            with pytest.raises(DiskBusyError):
                open_chain(parent)
    open_chain(layers[0]).close()


def test_a_disk_that_is_written_cannot_become_a_parent(layers: list[str]) -> None:
    with open_chain(layers[1]), pytest.raises(DiskBusyError):
        open_chain(layers[2])


def test_the_holders_note_is_harmless(layers: list[str]) -> None:
    with open_chain(layers[2], holder="evil\x1b[31m\n"), pytest.raises(DiskBusyError) as caught:
        open_chain(layers[2])
    assert caught.value.message.isprintable()


def test_lock_and_note_end_with_the_chain(layers: list[str]) -> None:
    chain = open_chain(layers[2], holder="me")
    chain.abandon()
    with open_chain(layers[2], read_only=True):
        pass
    open_chain(layers[2]).close()
    assert not {"user.mullion.holder", "user.mullion.session"} & set(os.listxattr(layers[2]))


# ---------------------------------------------------------------------- descriptors


def descriptors(paths: Sequence[str]) -> list[int]:
    return [os.open(path, os.O_RDONLY if number else os.O_RDWR) for number, path in enumerate(paths)]


def test_from_descriptors(layers: list[str]) -> None:
    paths = layers[::-1]
    with Chain.from_descriptors(descriptors(paths), paths, holder="provider") as chain:
        chain.pwrite(0, b"hello")
        with pytest.raises(DiskBusyError, match="provider"):
            open_chain(layers[2])
    with open_chain(layers[2], read_only=True) as chain:
        assert read(chain, 0, 5) == b"hello"


def test_a_restarted_provider_gets_the_same_open_file(layers: list[str]) -> None:
    """Descriptors that are kept elsewhere share the lock; the next user of them is not shut out."""
    kept = descriptors(layers[::-1])
    Chain.from_descriptors([os.dup(fd) for fd in kept], layers[::-1]).abandon()
    with Chain.from_descriptors([os.dup(fd) for fd in kept], layers[::-1]) as chain:
        chain.pwrite(0, b"again")
    for fd in kept:
        os.close(fd)


@pytest.mark.parametrize(
    ("order", "error"),
    [([2, 0], ParentMismatchError), ([2, 1], ParentNotFoundError), ([0, 1], ParentMismatchError)],
)
def test_descriptors_that_are_no_chain(layers: list[str], order: list[int], error: type[Exception]) -> None:
    paths = [layers[number] for number in order]
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error):
        Chain.from_descriptors(descriptors(paths), paths)
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------------- pending log


def test_killed_writers_acknowledged_writes_are_carried_out(layers: list[str], tmp_path: Path) -> None:
    pending = str(tmp_path / "pending")
    chain = open_chain(layers[2], pending_path=pending)
    chain.pwrite(100_000, b"acknowledged")
    chain.abandon()
    assert os.path.exists(pending)
    with open_chain(layers[2], read_only=True) as plain:  # nothing but the log knows of it
        assert read(plain, 100_000, 12) == bytes(12)
    with open_chain(layers[2], pending_path=pending) as chain:
        assert "carried out" in " ".join(chain.warnings)
        assert read(chain, 100_000, 12) == b"acknowledged"
    assert not os.path.exists(pending)


def killed(path: str, pending: str) -> None:
    chain = open_chain(path, pending_path=pending)
    chain.pwrite(0, b"killed")
    chain.abandon()


def test_log_of_another_boot_is_discarded(layers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pending = str(tmp_path / "pending")
    killed(layers[2], pending)
    monkeypatch.setattr(mullion.vhd.pending, "boot_id", lambda: "0" * 36)
    with open_chain(layers[2], pending_path=pending) as chain:
        assert "discarded" in " ".join(chain.warnings)
        assert read(chain, 0, 6) == bytes(6)


def test_log_of_another_disk_is_discarded(layers: list[str], tmp_path: Path) -> None:
    pending, other = str(tmp_path / "pending"), str(tmp_path / "other.vhd")
    create_differencing(other, layers[1])
    killed(layers[2], pending)
    with open_chain(other, pending_path=pending) as chain:
        assert "discarded" in " ".join(chain.warnings)
        assert not any(all_of(chain))


def test_log_from_before_another_writer_is_discarded(layers: list[str], tmp_path: Path) -> None:
    """Somebody wrote the disk without this log since: what it says is no longer true."""
    pending = str(tmp_path / "pending")
    killed(layers[2], pending)
    with open_chain(layers[2]) as chain:
        chain.pwrite(0, b"newer!")
    with open_chain(layers[2], pending_path=pending) as chain:
        assert "discarded" in " ".join(chain.warnings)
        assert read(chain, 0, 6) == b"newer!"


def test_a_killed_writer_without_its_log_is_told(layers: list[str], tmp_path: Path) -> None:
    pending = tmp_path / "pending"
    killed(layers[2], str(pending))
    pending.unlink()
    with open_chain(layers[2], pending_path=str(pending)) as chain:
        assert "may be missing" in " ".join(chain.warnings)
    open_chain(layers[2]).abandon()
    with open_chain(layers[2]) as chain:
        assert "may be missing" in " ".join(chain.warnings)
    with open_chain(layers[2]) as chain:
        assert chain.warnings == []


def test_garbage_in_the_place_of_the_log(layers: list[str], tmp_path: Path) -> None:
    pending = tmp_path / "pending"
    for content in (b"", b"hello", os.urandom(256 * KIB)):
        pending.write_bytes(content)
        with open_chain(layers[2], pending_path=str(pending)) as chain:
            chain.pwrite(0, b"x")


@pytest.mark.parametrize("has_log", [True, False])
def test_a_full_log_makes_room_by_flushing(has_log: bool, tmp_path: Path) -> None:
    parent, path = str(tmp_path / "p.vhd"), str(tmp_path / "c.vhd")
    create_dynamic(parent, 16 * MIB)
    create_differencing(path, parent)
    pending = str(tmp_path / "pending") if has_log else None
    chain = open_chain(path, pending_path=pending)
    for sector in range(RECORD_LIMIT + 2000):
        chain.pwrite(sector * 1024, b"%08d" % sector)
    if has_log:
        chain.abandon()
    else:
        chain.close()
    with open_chain(path, pending_path=pending) as chain:
        for sector in range(0, RECORD_LIMIT + 2000, 97):
            assert read(chain, sector * 1024, 9) == b"%08d\0" % sector


# ---------------------------------------------------------------------- space


class FullDisk(FileIO):
    """Takes `room` more bytes of data, then refuses like a full file system."""

    def __init__(self) -> None:
        self.room: int | None = None
        self.can_punch = True

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        if self.room is None:
            return super().pwritev(fd, buffers, offset)
        whole = b"".join(bytes(buffer) for buffer in buffers)[: self.room]
        if not whole:
            raise OSError(errno.ENOSPC, "no space left")
        self.room -= len(whole)
        return super().pwritev(fd, [whole], offset)

    def punch_hole(self, fd: int, offset: int, length: int) -> None:
        if not self.can_punch:
            raise OSError(errno.EOPNOTSUPP, "no holes here")
        super().punch_hole(fd, offset, length)


@pytest.mark.parametrize("can_punch", [True, False])
@pytest.mark.parametrize("kind", ["dynamic", "differencing"])
@pytest.mark.parametrize("room", [0, 100, 512, 600, 1024, 5000, 20_000])
def test_no_space_left(kind: str, room: int, can_punch: bool, tmp_path: Path) -> None:
    path = craft.make(tmp_path, kind)
    full = FullDisk()
    full.can_punch = can_punch
    with open_chain(path, pending_path=str(tmp_path / "pending"), file_io=full) as chain:
        before = all_of(chain)
        content = os.urandom(craft.BLOCK_BYTES)
        full.room = room
        if room < craft.BLOCK_BYTES:
            with pytest.raises(OSError, match="no space"):
                chain.pwrite(craft.BLOCK_BYTES, content)
            assert all_of(chain) == before
        full.room = None
        # Another block takes the place that the refused one was to have: nothing of it may show there.
        chain.pwrite(7 * craft.BLOCK_BYTES + 512, b"y" * 512)
        assert read(chain, 7 * craft.BLOCK_BYTES, 2048) == bytes(512) + b"y" * 512 + bytes(1024)
        chain.pwrite(craft.BLOCK_BYTES, content)
        chain.flush()
        before[7 * craft.BLOCK_BYTES + 512 : 7 * craft.BLOCK_BYTES + 1024] = b"y" * 512
        before[craft.BLOCK_BYTES : 2 * craft.BLOCK_BYTES] = content
        assert all_of(chain) == before
    with open_chain(path, read_only=True) as chain:
        assert all_of(chain) == before
        assert chain.warnings == []


def test_a_fixed_disk_below_a_new_top_is_made_durable_when_the_writer_of_both_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No log tells of what was written into it since its last flush; the first flush of who comes next promises it."""
    base, top = str(tmp_path / "base.vhd"), str(tmp_path / "top.vhd")
    create_fixed(base, 64 * KIB)
    recorded = RecordingIO()
    killed = open_chain(base, file_io=recorded)
    killed.pwrite(0, b"acknowledged")
    create_differencing(top, base, lock_parent=False)
    killed.abandon()
    with open_chain(top, file_io=recorded) as chain:
        chain.flush()
        monkeypatch.setattr(Random, "choice", lambda _, versions: versions[0])  # nothing remains that was not synced
        recorded.cut_power(Random())
        assert read(chain, 0, 12) == b"acknowledged"


# ---------------------------------------------------------------------- mapping


def test_more_layers_than_an_owner_map_can_number(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.vhd") for number in range(300)]
    create_dynamic(paths[0], 256 * KIB, block_bytes=256 * KIB)
    for number, path in enumerate(paths):
        if number:
            create_differencing(path, paths[number - 1])
        # Written without its parents: opening the whole chain for each layer would take quadratic time.
        image = load_image(open_file(path, writable=True), path)
        writer = TopWriter(image, SYSTEM)
        writer.write_new(0, number * 512, [b"%05d" % number + bytes(507)], 512)
        data = writer.data_offset(0)
        assert data is not None
        os.pwrite(image.fd, b"%05d" % number, data + 310 * 512)
        if writer.is_child:
            writer.set_bits(0, 310, 1)
        writer.flush()
        writer.close_gap()
        image.close()
    with open_chain(paths[-1]) as chain:
        content = all_of(chain)
        for number in range(300):
            assert content[number * 512 : number * 512 + 5] == b"%05d" % number
        assert content[310 * 512 : 310 * 512 + 5] == b"00299"
        chain.pwrite(100 * 512, b"above")
        assert read(chain, 99 * 512, 1029) == b"00099" + bytes(507) + b"above" + bytes(507) + b"00101"


def test_reads_and_writes_through_stale_looking_maps(layers: list[str]) -> None:
    """A granule goes from zero to the parent's, to mixed, to the top's; each step is seen at once."""
    with open_chain(layers[0]) as chain:
        chain.pwrite(0, b"p" * 64 * KIB)
    with open_chain(layers[2]) as chain:
        assert read(chain, 0, 4) == b"pppp"
        assert 0 in chain.direct_read
        assert 0 not in chain.direct_write
        for sector in range(128):
            chain.pwrite(sector * 512, b"t" * 512)
            if sector < 127:
                assert 0 not in chain.direct_read
            assert read(chain, 0, 64 * KIB) == b"t" * (sector + 1) * 512 + b"p" * (127 - sector) * 512
        assert 0 in chain.direct_write
        assert 0 in chain.direct_read


def test_what_the_top_owns_of_a_shared_granule_is_overwritten_in_place(layers: list[str], tmp_path: Path) -> None:
    """No metadata changes, nothing waits for a flush; the files below stay as they are."""
    with open_chain(layers[0]) as chain:
        chain.pwrite(0, b"p" * MIB)
    with open(layers[0], "rb") as file:
        before = file.read()
    with open_chain(layers[2], pending_path=str(tmp_path / "pending")) as chain:
        chain.pwrite(8192, b"a" * 8192)
        chain.flush()
        assert read(chain, 0, 32 * KIB) == b"p" * 8192 + b"a" * 8192 + b"p" * 16 * KIB
        assert chain.writer is not None
        owned, start = 8192, chain.images[0].file_bytes
        for offset, length in ((owned, 4096), (owned + 4096, 4096), (owned + 512, 1024), (owned + 100, 7)):
            chain.pwrite(offset, b"b" * length)
            assert not chain.writer.has_pending
            assert read(chain, offset - 1, length + 2)[1:-1] == b"b" * length
        assert chain.images[0].file_bytes == start
        assert chain.mixed_write_fd == chain.images[0].fd
        chain.pwrite(owned + 4096, b"c" * 8192)  # half of it is new to the top
        assert chain.writer.has_pending
        assert read(chain, 0, 32 * KIB) == b"p" * 8192 + b"b" * 4096 + b"c" * 8192 + b"p" * 12 * KIB
    with open(layers[0], "rb") as file:
        assert file.read() == before
    with open_chain(layers[2], read_only=True) as chain:
        assert chain.mixed_write_fd == -1
        assert read(chain, 0, 32 * KIB) == b"p" * 8192 + b"b" * 4096 + b"c" * 8192 + b"p" * 12 * KIB


def test_ranges_across_many_owners_are_read_whole(layers: list[str]) -> None:
    """Runs of three files and of nobody, at every alignment, into one buffer and into several."""
    content = bytearray(MIB)
    for number, layer in enumerate(layers):
        with open_chain(layer) as chain:
            for place in range(number, 96, 5 - number):
                data = bytes([1 + 70 * number + place]) * 4096
                chain.pwrite(place * 4096, data)
                content[place * 4096 : (place + 1) * 4096] = data
    with open_chain(layers[2], read_only=True) as chain:
        read(chain, 0, 512)  # now the granule is known
        for offset, length in ((0, 400 * KIB), (4096, 64 * KIB), (511, 70_001), (5 * KIB + 5, 50_000), (7, 4096)):
            assert read(chain, offset, length) == content[offset : offset + length]
            pieces = [memoryview(bytearray(length // 2)), memoryview(bytearray(length - length // 2))]
            chain.preadv(offset, pieces)
            assert b"".join(pieces) == content[offset : offset + length]


def test_extents_skip_what_is_empty_quickly(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.vhd") for number in range(2)]
    create_dynamic(paths[0], 2040 * GIB)
    create_differencing(paths[1], paths[0])
    with open_chain(paths[1]) as chain:
        chain.pwrite(1000 * GIB, b"x" * 4096)
        found = list(chain.extents(0, chain.size_bytes))
        assert [(extent.offset, extent.length, extent.kind) for extent in found] == [
            (0, 1000 * GIB, ExtentKind.HOLE),
            (1000 * GIB, 4096, ExtentKind.DATA),
            (1000 * GIB + 4096, 1040 * GIB - 4096, ExtentKind.HOLE),
        ]
        assert len(chain._map._zero) < 100


def test_caches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mullion.vhd import mapping

    monkeypatch.setattr(mapping, "DIRECT_LIMIT", 16)
    monkeypatch.setattr(mapping, "_ZERO_LIMIT", 16)
    monkeypatch.setattr(mapping, "_MIXED_BYTES", 16 * 8)
    paths = [str(tmp_path / f"{number}.vhd") for number in range(2)]
    create_dynamic(paths[0], MIB, block_bytes=4096)
    create_differencing(paths[1], paths[0])
    for path, letter in zip(paths, (b"a", b"b"), strict=True):
        with open_chain(path) as chain:
            for block in range(100):
                if letter == b"a" or block % 2:
                    chain.pwrite(block * 4096 + (512 if letter == b"b" else 0), letter * 512)
    with open_chain(paths[1]) as chain:
        for block in [*range(256), *range(100), *range(100)]:
            expected = b"a" * (block < 100) + b"b" * (block < 100 and block % 2)
            found = read(chain, block * 4096, 1) + read(chain, block * 4096 + 512, 1)
            assert found.rstrip(b"\0") == expected
            tables = (chain.direct_read, chain.direct_write, chain._map.mixed, chain._map._zero)
            assert all(len(table) <= 16 for table in tables)


def test_readers_and_a_writer_at_once(layers: list[str]) -> None:
    """Each sector goes from the parent's content to the child's and never back."""
    with open_chain(layers[0]) as chain:
        chain.pwrite(0, b"p" * MIB)
    with open_chain(layers[2]) as chain:
        done = threading.Event()
        wrong: list[str] = []

        def watch() -> None:
            seen = bytearray(MIB // 512)
            buffer = bytearray(32 * KIB)
            while not done.is_set():
                for offset in range(0, MIB, len(buffer)):
                    chain.pread(offset, buffer)
                    for number in range(len(buffer) // 512):
                        sector = offset // 512 + number
                        first, last = buffer[number * 512], buffer[number * 512 + 511]
                        if first not in b"pt" or (seen[sector] and last != ord("t")):
                            wrong.append(f"sector {sector} has {first} {last}")
                        seen[sector] = last == ord("t")

        threads = [threading.Thread(target=watch) for _ in range(2)]
        for thread in threads:
            thread.start()
        for sector in range(0, 2048, 3):
            chain.pwrite(sector * 512, b"t" * 1536 if sector % 2 and sector < 2044 else b"t" * 512)
            if sector % 500 == 0:
                chain.flush()
        done.set()
        for thread in threads:
            thread.join()
        assert wrong == []


# ---------------------------------------------------------------------- refusing


def test_read_only_refuses_writes(layers: list[str]) -> None:
    with open_chain(layers[2], read_only=True) as chain:
        for request in (
            lambda: chain.pwrite(0, b"x"),
            lambda: chain.write_zeroes(0, 512),
            lambda: chain.discard(0, 512),
        ):
            with pytest.raises(DiskReadOnlyError):
                request()
        chain.flush()
        assert chain.direct_write == {}


def test_closed_chains_say_so(layers: list[str]) -> None:
    chain = open_chain(layers[2])
    chain.close()
    for request in (lambda: read(chain, 0, 1), lambda: chain.pwrite(0, b"x"), chain.flush):
        with pytest.raises(StateError):
            request()


def test_zeros_hide_the_parent_and_cost_nothing_over_nothing(layers: list[str]) -> None:
    with open_chain(layers[0]) as chain:
        chain.pwrite(0, b"p" * 64 * KIB)
    with open_chain(layers[2]) as chain:
        before = os.path.getsize(layers[2])
        chain.write_zeroes(512 * KIB, 256 * KIB)
        chain.flush()
        assert os.path.getsize(layers[2]) == before
        chain.write_zeroes(700, 20_000)
        assert read(chain, 0, 64 * KIB) == b"p" * 700 + bytes(20_000) + b"p" * (64 * KIB - 20_700)
        chain.discard(0, MIB)
        assert read(chain, 0, 512) == b"p" * 512


def test_zeros_over_a_parents_data_use_no_room(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.vhd") for number in range(2)]
    create_dynamic(paths[0], 8 * MIB)
    with open_chain(paths[0]) as chain:
        chain.pwrite(0, b"p" * 8 * MIB)
    create_differencing(paths[1], paths[0])
    with open_chain(paths[1]) as chain:
        chain.pwrite(5 * MIB, b"c" * 4096)
        chain.write_zeroes(1000, 8 * MIB - 2000)
        assert all_of(chain) == b"p" * 1000 + bytes(8 * MIB - 2000) + b"p" * 1000
    with open_chain(paths[1], read_only=True) as chain:
        assert all_of(chain) == b"p" * 1000 + bytes(8 * MIB - 2000) + b"p" * 1000
    assert os.stat(paths[1]).st_blocks * 512 < 256 * KIB


def test_fixed_disks_punch_holes(tmp_path: Path) -> None:
    path = str(tmp_path / "f.vhd")
    create_fixed(path, 4 * MIB)
    with open_chain(path) as chain:
        chain.pwrite(0, b"x" * 4 * MIB)
        chain.flush()
        chain.discard(MIB, 2 * MIB)
        assert os.stat(path).st_blocks * 512 < 3 * MIB
        kinds = [(extent.offset, extent.kind) for extent in chain.extents(0, 4 * MIB)]
        assert kinds == [(0, ExtentKind.DATA), (MIB, ExtentKind.HOLE), (3 * MIB, ExtentKind.DATA)]
