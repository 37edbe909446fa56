"""A chain over a backing: what no file has is read there, comes home, and never hides what was written."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.unit.vhd.freezing import freeze
from tests.unit.vhd.power_cut import KilledError, RecordingIO

from mullion.base.block import Buffer, Extent, ExtentKind
from mullion.base.errors import InvalidError
from mullion.base.units import KIB, MIB, SECTOR_BYTES
from mullion.vhd import Chain, create_differencing, create_dynamic, inspect_chain, open_chain
from mullion.vhd.errors import DiskBusyError
from mullion.vhd.fileio import SYSTEM, FileIO
from mullion.vhd.filling import Filling
from mullion.vhd.switching import Exchange, prepare_switch

pytestmark = pytest.mark.unit

SIZE_BYTES = 5 * MIB + 3 * SECTOR_BYTES
BLOCK_BYTES = 512 * KIB
BLOCKS = -(-5 * MIB // BLOCK_BYTES)


class Content:
    """What a backup's disk would give; shorter than the disk, as after a growth."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            buffer[:] = self.content[offset : offset + len(buffer)].ljust(len(buffer), b"\0")
            offset += len(buffer)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        here = max(0, min(length, len(self.content) - offset))
        if here:
            yield Extent(offset, here, ExtentKind.DATA)
        if here < length:
            yield Extent(offset + here, length - here, ExtentKind.HOLE)


@pytest.fixture
def content() -> bytes:
    return random.Random(7).randbytes(5 * MIB)


@pytest.fixture
def top(tmp_path: Path) -> str:
    """A differencing disk over an empty one."""
    return make_disk(tmp_path)


def make_disk(folder: Path) -> str:
    create_dynamic(str(folder / "base.vhd"), SIZE_BYTES, block_bytes=BLOCK_BYTES)
    create_differencing(str(folder / "top.avhd"), str(folder / "base.vhd"))
    return str(folder / "top.avhd")


def open_filled(top: str, content: bytes, file_io: FileIO = SYSTEM) -> tuple[Chain, Filling]:
    """The chain of a top, as a provider opens it whose disk is coming home."""
    paths = inspect_chain(top).paths
    fds = [os.open(path, os.O_RDWR if path in (paths[0], paths[-1]) else os.O_RDONLY) for path in paths]
    chain = Chain.from_descriptors(fds, paths, file_io=file_io)
    return chain, Filling(chain, Content(content))


def read(chain: Chain, offset: int = 0, length: int = SIZE_BYTES) -> bytes:
    buffer = bytearray(length)
    chain.pread(offset, buffer)
    return bytes(buffer)


def fill(filling: Filling, block: int, content: bytes) -> None:
    piece = content[block * BLOCK_BYTES :][:BLOCK_BYTES]
    filling.fill(block, [(0, piece[:1000]), (1000, piece[1000:])])


def bring_home(filling: Filling, content: bytes) -> None:
    for block in range(BLOCKS):
        fill(filling, block, content)


def test_what_no_file_has_is_read_from_the_backing(top: str, content: bytes) -> None:
    with open_chain(top) as chain:
        chain.backing = Content(content)
        assert read(chain) == content.ljust(SIZE_BYTES, b"\0")
        assert read(chain, 1_000_001, 77) == content[1_000_001:][:77]
        chain.pwrite(700, b"x" * 100)  # parts of two sectors, which are completed from the backing
        wanted = content[:700] + b"x" * 100 + content[800 : 8 * KIB]
        assert read(chain, 0, 8 * KIB) == wanted
        chain.backing = None
        whole_sectors = wanted[SECTOR_BYTES : 2 * SECTOR_BYTES]
        assert read(chain, 0, 2 * SECTOR_BYTES) == bytes(SECTOR_BYTES) + whole_sectors


def test_where_there_is_data_says_the_backing_too(top: str, content: bytes) -> None:
    with open_chain(top) as chain:
        assert {extent.kind for extent in chain.extents(0, SIZE_BYTES)} == {ExtentKind.HOLE}
        chain.backing = Content(content)
        end = Extent(len(content), SIZE_BYTES - len(content), ExtentKind.HOLE)
        assert list(chain.extents(0, SIZE_BYTES)) == [Extent(0, len(content), ExtentKind.DATA), end]
        assert list(chain.extents(1000, 70_000)) == [Extent(1000, 70_000, ExtentKind.DATA)]


@pytest.mark.parametrize("is_home_first", [False, True])
def test_zeros_stay_zeros(top: str, content: bytes, is_home_first: bool) -> None:
    """What the guest has zeroed or discarded does not show the backup's data again."""
    chain, filling = open_filled(top, content)
    if is_home_first:
        bring_home(filling, content)
    chain.write_zeroes(MIB - 100, 64 * KIB)
    bring_home(filling, content)
    filling.end()
    chain.backing = None
    assert read(chain, MIB - 100, 64 * KIB) == bytes(64 * KIB)
    assert read(chain, 0, MIB - 100) == content[: MIB - 100]
    chain.close()


def test_any_order_of_writes_and_homecoming_is_right(top: str, content: bytes) -> None:
    """Checkpoints on the way, too: each reads as the disk did, through the backing and, at the end, without it."""
    chance = random.Random(11)
    wanted = bytearray(content.ljust(SIZE_BYTES, b"\0"))
    blocks = list(range(BLOCKS))
    chance.shuffle(blocks)
    frozen: dict[str, bytes] = {}
    chain, filling = open_filled(top, content)
    for number, block in enumerate(blocks):
        for _ in range(3):
            at, count = chance.randrange(SIZE_BYTES), chance.choice((1, 512, 4096, 70_000))
            count = min(count, SIZE_BYTES - at)
            if chance.random() < 0.3:
                chain.write_zeroes(at, count)
                wanted[at : at + count] = bytes(count)
            else:
                data = os.urandom(count)
                chain.pwrite(at, data)
                wanted[at : at + count] = data
        assert filling.lacks(block)
        fill(filling, block, content)
        assert not filling.lacks(block)
        fill(filling, block, bytes(len(content)))  # again: nothing changes
        if number % 3 == 0:
            frozen[chain.paths[0]] = bytes(wanted)
            freeze(chain, f"{top}-{number}")
        if number % 5 == 0:
            filling.flush()
            check_readers(frozen, content)
    assert read(chain) == bytes(wanted)
    filling.end()
    chain.backing = None
    assert read(chain) == bytes(wanted)
    chain.flush()
    chain.abandon()
    for path, then in {**frozen, chain.paths[0]: bytes(wanted)}.items():
        with open_chain(path, read_only=True) as again:
            assert read(again) == then, path


def check_readers(frozen: dict[str, bytes], content: bytes) -> None:
    """Other processes read frozen layers while the file below them is being filled."""
    for path, then in frozen.items():
        with open_chain(path, read_only=True) as reader:
            reader.backing = Content(content)
            assert read(reader) == then, path


def test_the_file_that_is_filled_is_not_read_or_written_by_itself(top: str, content: bytes) -> None:
    chain, filling = open_filled(top, content)
    base = chain.paths[-1]
    for read_only in (True, False):
        with pytest.raises(DiskBusyError):
            open_chain(base, read_only=read_only)
    collapse = Exchange((base,), {base: os.open(base, os.O_RDWR)}, collapse=True)
    with pytest.raises(InvalidError, match="come home"):
        prepare_switch(chain, collapse, pending_path=None, holder="")
    filling.end()
    chain.close()
    open_chain(base).close()


class LosingIO(FileIO):
    """Loses, at the next sync of a file after `is_to_lose` was set, the data written to it since the last, and says so.

    As the system does where storage fails and works again: who asks once more hears that all is well.
    """

    def __init__(self) -> None:
        self.is_to_lose = False
        self._written: dict[int, list[tuple[int, int]]] = {}

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        written = super().pwritev(fd, buffers, offset)
        if written >= 4 * KIB:  # data
            self._written.setdefault(fd, []).append((offset, written))
        return written

    def fdatasync(self, fd: int) -> None:
        written = self._written.pop(fd, [])
        if self.is_to_lose:
            self.is_to_lose = False
            for offset, length in written:
                os.pwrite(fd, bytes(length), offset)
            raise OSError(errno.EIO, "lost")
        super().fdatasync(fd)


def test_what_a_flush_has_lost_comes_again_before_anything_is_said_to_be_home(top: str, content: bytes) -> None:
    losing = LosingIO()
    chain, filling = open_filled(top, content, losing)
    fill(filling, 0, content)
    filling.flush()
    for block in (1, 2):
        fill(filling, block, content)
    losing.is_to_lose = True
    with pytest.raises(OSError, match="lost"):
        filling.flush()
    assert [filling.lacks(block) for block in range(4)] == [False, True, True, True]
    for end in (filling.flush, filling.end):
        with pytest.raises(OSError, match="backup again"):
            end()
    bring_home(filling, content)
    assert not filling.is_doubtful
    filling.end()
    chain.close()
    with open_chain(top, read_only=True) as reader:
        assert read(reader) == content.ljust(SIZE_BYTES, b"\0")


def test_what_a_flush_has_lost_is_not_home_for_the_next_process(top: str, content: bytes) -> None:
    losing = LosingIO()
    chain, filling = open_filled(top, content, losing)
    fill(filling, 1, content)
    losing.is_to_lose = True
    with pytest.raises(OSError, match="lost"):
        filling.end()
    chain.abandon()
    again, more = open_filled(top, content)
    assert more.lacks(1)
    bring_home(more, content)
    more.end()
    again.backing = None
    assert read(again) == content.ljust(SIZE_BYTES, b"\0")
    again.close()


def test_a_power_cut_at_any_change_shows_what_was_flushed_and_never_less_than_the_backup(
    tmp_path: Path, content: bytes
) -> None:
    """What came home is either there or still asked of the backing; what was written and not flushed, either or.

    And a checkpoint, once its exchange is finished, is as it was then.
    """
    fuse = 0
    while True:
        fuse += 1
        folder = tmp_path / str(fuse)
        folder.mkdir()
        file_io = RecordingIO()
        life = Life(make_disk(folder), content, file_io, random.Random(fuse % 6))
        file_io.fuse = fuse
        try:
            life.live()
            return
        except KilledError:
            life.chain.abandon()
            file_io.cut_power(random.Random(fuse))
        again, more = open_filled(life.tops[-1], content)
        for at, values in zip(SECTORS, life.allowed, strict=True):
            assert read(again, at, SECTOR_BYTES) in values, (fuse, at)
        now = read(again)
        bring_home(more, content)
        more.end()
        again.backing = None
        assert read(again) == now, "what is home is what was read before"
        again.close()
        for path, then in life.frozen.items():
            with open_chain(path, read_only=True) as reader:
                assert read(reader) == then, (fuse, path)
        shutil.rmtree(folder)


SECTORS = [at for block in range(3) for at in range(block * BLOCK_BYTES, block * BLOCK_BYTES + 24 * KIB, SECTOR_BYTES)]
"""The first of some blocks: where the guest writes in the test with power cuts."""


class Life:
    """A disk that is used, frozen and filled; `allowed` is what each sector may hold after a power cut."""

    def __init__(self, top: str, content: bytes, file_io: RecordingIO, chance: random.Random) -> None:
        self.tops = [top]
        self.frozen: dict[str, bytes] = {}
        self.allowed = [{content[at : at + SECTOR_BYTES]} for at in SECTORS]
        self.chain, self._filling = open_filled(top, content, file_io)
        self._content = content
        self._chance = chance

    def live(self) -> None:
        for _ in range(16):
            match self._chance.randrange(6):
                case 0 | 1:
                    self._write()
                case 2:
                    fill(self._filling, self._chance.randrange(4), self._content)
                case 3:
                    self._filling.flush()
                case 4:
                    self.chain.flush()
                    for at, values in zip(SECTORS, self.allowed, strict=True):
                        values.intersection_update({read(self.chain, at, SECTOR_BYTES)})
                case 5:
                    self._freeze()
        self._filling.end()
        self.chain.close()

    def _write(self) -> None:
        first = self._chance.randrange(len(SECTORS))
        count = self._chance.randrange(1, min(12, 48 - first % 48) + 1)
        data = [self._chance.randbytes(SECTOR_BYTES) for _ in range(count)]
        for number, sector in enumerate(data, first):
            self.allowed[number].add(sector)
        self.chain.pwrite(SECTORS[first], b"".join(data))

    def _freeze(self) -> None:
        old, then = self.tops[-1], read(self.chain)
        self.tops.append(f"{self.tops[0]}-{len(self.tops)}")
        freeze(self.chain, self.tops[-1])
        self.frozen[old] = then
