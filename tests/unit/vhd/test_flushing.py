"""Flushes beside requests: what waits for what, who shares, and where errors go."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tests.contract.block_device import read
from tests.unit.vhd.freezing import prepare_freeze
from tests.unit.vhd.power_cut import RecordingIO

import mullion.vhd.top
from mullion.base.block import Buffer, LostDataError
from mullion.base.units import KIB, MIB
from mullion.vhd import Chain, create_differencing, create_dynamic, create_fixed, open_chain
from mullion.vhd.fileio import FileIO
from mullion.vhd.flushing import SharedFlush
from mullion.vhd.pending import LOG_BYTES
from mullion.vhd.switching import Exchange, prepare_switch

pytestmark = pytest.mark.unit

DEADLINE_S = 30.0


class SlowSync(FileIO):
    """Syncs wait, once `hold` was called, until they are let go; the next may fail, and so may the next write."""

    def __init__(self) -> None:
        self.syncs = 0
        self.failure: OSError | None = None
        self.write_failure: OSError | None = None
        self.began = threading.Semaphore(0)
        self._may_end = threading.Event()
        self._may_end.set()

    def hold(self) -> None:
        while self.began.acquire(blocking=False):
            pass
        self._may_end.clear()

    def let_go(self) -> None:
        self._may_end.set()

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        failure, self.write_failure = self.write_failure, None
        if failure is not None:
            raise failure
        return super().pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        self.syncs += 1
        self.began.release()
        assert self._may_end.wait(DEADLINE_S)
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        super().fdatasync(fd)

    def wait_for_sync(self) -> None:
        assert self.began.acquire(timeout=DEADLINE_S)


@pytest.fixture
def slow() -> Iterator[SlowSync]:
    io = SlowSync()
    yield io
    io.let_go()


@pytest.fixture(params=["fixed", "dynamic", "differencing"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    top = str(tmp_path / "top.vhd")
    if request.param == "fixed":
        create_fixed(top, 4 * MIB)
    elif request.param == "dynamic":
        create_dynamic(top, 4 * MIB, block_bytes=16 * KIB)
    else:
        create_dynamic(str(tmp_path / "base.vhd"), 4 * MIB)
        create_differencing(top, str(tmp_path / "base.vhd"), block_bytes=16 * KIB)
    return top


@pytest.fixture
def child(tmp_path: Path) -> str:
    create_dynamic(str(tmp_path / "base.vhd"), 4 * MIB)
    create_differencing(str(tmp_path / "top.vhd"), str(tmp_path / "base.vhd"), block_bytes=16 * KIB)
    return str(tmp_path / "top.vhd")


def opened(path: str, io: FileIO) -> Chain:
    return open_chain(path, pending_path=f"{path}.pending", file_io=io)


class Caller:
    """A call in a thread of its own, and what became of it."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.error: OSError | None = None
        self._act = act
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._act()
        except OSError as error:
            self.error = error

    @property
    def is_waiting(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> OSError | None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        return self.error


def test_requests_go_on_while_a_flush_runs(path: str, slow: SlowSync) -> None:
    chain = opened(path, slow)
    chain.pwrite(0, b"before")
    slow.hold()
    flush = Caller(chain.flush)
    slow.wait_for_sync()
    for number in range(40):  # in the block that is being flushed, and in others of the same BAT sector
        chain.pwrite(number * 4 * KIB + 512, b"%06d" % number)
        chain.discard(100 * 16 * KIB, 16 * KIB)
        chain.write_zeroes(101 * 16 * KIB, 512)
        assert read(chain, number * 4 * KIB + 512, 6) == b"%06d" % number
    assert flush.is_waiting
    slow.let_go()
    assert flush.join() is None
    chain.abandon()
    with opened(path, slow) as chain:
        assert read(chain, 0, 6) == b"before"
        assert [read(chain, number * 4 * KIB + 512, 6) for number in range(40)] == [b"%06d" % n for n in range(40)]


def test_a_flush_makes_nothing_visible_that_was_written_since(child: str, slow: SlowSync) -> None:
    """Without the log, as after a power cut: the file shows what was there when the flush began."""
    chain = opened(child, slow)
    chain.pwrite(32 * KIB, b"o" * 512)  # this block is there when the flush begins
    chain.flush()
    chain.pwrite(32 * KIB + 512, b"a" * 512)
    chain.pwrite(0, b"a" * 512)
    slow.hold()
    flush = Caller(chain.flush)
    slow.wait_for_sync()
    for offset in (512, 16 * KIB, 32 * KIB + 1024):
        chain.pwrite(offset, b"b" * 512)
    slow.let_go()
    assert flush.join() is None
    Path(f"{child}.pending").unlink()
    chain.abandon()
    with opened(child, slow) as chain:
        assert read(chain, 0, 1024) == b"a" * 512 + bytes(512)
        assert read(chain, 16 * KIB, 512) == bytes(512)
        assert read(chain, 32 * KIB, 1536) == b"o" * 512 + b"a" * 512 + bytes(512)


class CountingLock:
    """Tells how many have come to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._came = threading.Semaphore(0)

    def __enter__(self) -> None:
        self._came.release()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self._came.acquire(timeout=DEADLINE_S)


@pytest.fixture
def shared() -> SharedFlush:
    made = SharedFlush()
    made.lock = CountingLock()  # type: ignore[assignment]
    return made


def come_to(shared: SharedFlush, count: int) -> None:
    assert isinstance(shared.lock, CountingLock)
    shared.lock.wait_for(count)


def test_flushes_that_come_while_one_runs_share_the_next(
    path: str, slow: SlowSync, shared: SharedFlush, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mullion.vhd.chain.SharedFlush", lambda: shared)
    with opened(path, slow) as chain:
        slow.hold()
        first = Caller(chain.flush)
        slow.wait_for_sync()
        before = slow.syncs
        others = [Caller(chain.flush) for _ in range(8)]
        come_to(shared, 9)
        slow.let_go()
        assert [caller.join() for caller in (first, *others)] == [None] * 9
        assert slow.syncs == before + 1


def test_all_who_share_a_flush_hear_of_its_failure(shared: SharedFlush) -> None:
    runs: list[int] = []
    may_end, began = threading.Event(), threading.Semaphore(0)

    def flush() -> None:
        runs.append(1)
        began.release()
        assert may_end.wait(DEADLINE_S)
        if len(runs) == 2:
            raise OSError(errno.EIO, "lost")

    first = Caller(lambda: shared.run(flush))
    assert began.acquire(timeout=DEADLINE_S)
    others = [Caller(lambda: shared.run(flush)) for _ in range(5)]
    come_to(shared, 6)
    may_end.set()
    assert first.join() is None
    errors = [caller.join() for caller in others]
    assert [error and error.errno for error in errors] == [errno.EIO] * 5
    assert len(runs) == 2
    shared.run(flush)
    assert len(runs) == 3


def test_a_flush_that_failed_is_repeated_with_what_it_had_taken(child: str, slow: SlowSync) -> None:
    chain = opened(child, slow)
    chain.pwrite(0, b"a" * 512)
    slow.failure = OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="full"):
        chain.flush()
    chain.pwrite(512, b"b" * 512)
    chain.flush()
    Path(f"{child}.pending").unlink()
    chain.abandon()
    with opened(child, slow) as chain:
        assert read(chain, 0, 1024) == b"a" * 512 + b"b" * 512


@pytest.fixture
def small_log(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(mullion.vhd.top, "RECORD_LIMIT", 40)
    return 40


def test_a_half_full_log_is_flushed_behind_the_requests(child: str, slow: SlowSync, small_log: int) -> None:
    chain = opened(child, slow)
    slow.hold()
    before = slow.syncs
    for number in range(25):  # of two records each, more than an area has: a flush has begun, and nobody has waited
        chain.pwrite(number * 16 * KIB, b"%06d" % number)
    slow.wait_for_sync()
    assert slow.syncs == before + 1

    def write_on() -> None:
        for number in range(25, 100):
            chain.pwrite(number * 16 * KIB, b"%06d" % number)

    writer = Caller(write_on)
    slow.let_go()
    assert writer.join() is None
    chain.abandon()
    with opened(child, slow) as chain:
        assert [read(chain, n * 16 * KIB, 6) for n in range(100)] == [b"%06d" % n for n in range(100)]


def test_what_a_flush_behind_fails_with_is_told_by_the_next(child: str, slow: SlowSync, small_log: int) -> None:
    with opened(child, slow) as chain:
        slow.failure = OSError(errno.EIO, "lost")
        number = 0
        while not (chain.writer and chain.writer.has_failed):
            chain.pwrite(number % small_log * 16 * KIB, b"x" * 512)
            number += 1
        with pytest.raises(OSError, match="lost"):
            chain.flush()
        chain.flush()
        chain.pwrite(0, b"again")


def test_closing_waits_for_a_flush(path: str, slow: SlowSync) -> None:
    chain = opened(path, slow)
    slow.hold()
    flush = Caller(chain.flush)
    slow.wait_for_sync()
    closing = Caller(chain.close)
    slow.let_go()
    assert flush.join() is None
    assert closing.join() is None
    assert not Path(f"{path}.pending").exists()


def test_killed_while_both_areas_of_the_log_hold_something(child: str, slow: SlowSync) -> None:
    chain = opened(child, slow)
    for round_number in range(2):  # areas change their roles
        chain.pwrite(round_number * 16 * KIB, b"first")
        slow.hold()
        flush = Caller(chain.flush)
        slow.wait_for_sync()
        chain.pwrite(round_number * 16 * KIB + 1024, b"later")
        log = Path(f"{child}.pending").read_bytes()  # what a kill leaves at this instant
        slow.let_go()
        assert flush.join() is None
    chain.abandon()
    assert len(log) == LOG_BYTES
    Path(f"{child}.pending").write_bytes(log)
    with opened(child, slow) as chain:
        for round_number in range(2):
            assert read(chain, round_number * 16 * KIB, 5) == b"first"
            assert read(chain, round_number * 16 * KIB + 1024, 5) == b"later"


@pytest.mark.parametrize("flush_unasked", [Chain.flush_ahead, Chain.settle])
def test_what_a_flush_fails_with_that_no_guest_asked_for_is_told_by_the_next_that_is_a_promise(
    path: str, slow: SlowSync, flush_unasked: Callable[[Chain], None]
) -> None:
    with opened(path, slow) as chain:
        chain.pwrite(0, b"x" * 512)
        slow.failure = OSError(errno.EIO, "lost")
        with pytest.raises(OSError, match="lost"):
            flush_unasked(chain)
        flush_unasked(chain)  # all seems well, and the guest knows nothing
        with pytest.raises(OSError, match="lost"):
            chain.flush()
        chain.flush()


def test_a_flush_ahead_that_finds_no_space_stops_nobody(child: str, slow: SlowSync) -> None:
    with opened(child, slow) as chain:
        chain.pwrite(0, b"x" * 512)
        slow.write_failure = OSError(errno.ENOSPC, "full")
        with pytest.raises(OSError, match="full"):
            chain.flush_ahead()
        chain.flush()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_sync_that_found_no_space_is_never_one_to_be_repeated(path: str, slow: SlowSync, number: int) -> None:
    """The system counts what it could not write as written: the next sync says that all is well, and nothing is."""
    with opened(path, slow) as chain:
        chain.pwrite(0, b"x" * 512)
        slow.failure = OSError(number, "full")
        with pytest.raises(LostDataError, match="full") as lost:
            chain.flush()
        assert lost.value.errno == errno.EIO
        chain.flush()
        slow.failure = OSError(number, "full")
        with pytest.raises(LostDataError):
            chain.flush_ahead()
        with pytest.raises(LostDataError):  # which nobody was promised: the next is
            chain.flush()


def test_what_is_read_after_a_sync_that_failed_is_what_the_storage_has(child: str) -> None:
    """Whoever opens the file next must not go by structures that count as written, and are not there."""
    new, lost = Path(child).read_bytes(), 0
    for fuse, seed in itertools.product(range(8), range(5)):
        Path(child).write_bytes(new)
        io = RecordingIO()
        chain = open_chain(child, file_io=io)
        for block in range(3):
            chain.pwrite(block * 16 * KIB, b"x" * 4096)
        io.fuse, io.fuse_kills, io.loses = fuse, False, random.Random(seed)
        try:
            chain.flush()
        except OSError as error:
            lost += isinstance(error, LostDataError)
        io.fuse = None
        chain.abandon()
        with open_chain(child, file_io=io) as chain:
            now = read(chain, 0, 64 * KIB)
        io.cut_power(random.Random(seed))
        with open_chain(child) as chain:
            assert read(chain, 0, 64 * KIB) == now, fuse
    assert lost == 2 * 5


def test_a_footer_that_waits_for_room_hides_no_loss(child: str, slow: SlowSync) -> None:
    """Closing leaves the file's end for later where there is no room; its syncs are not only about the footer."""
    with opened(child, slow) as chain:
        chain.pwrite(0, b"x" * 512)
        chain.flush()
        assert chain.writer is not None
        slow.failure = OSError(errno.ENOSPC, "full")
        with pytest.raises(LostDataError):
            chain.writer.close_gap()


class HeldFlush(FileIO):
    """The first sync of a file waits until it is let go; what others sync meanwhile fails once, if it is to."""

    def __init__(self) -> None:
        self.fd = -1
        self.failure: OSError | None = None
        self.began = threading.Event()
        self.may_end = threading.Event()

    def fdatasync(self, fd: int) -> None:
        if fd == self.fd and not self.began.is_set():
            self.began.set()
            assert self.may_end.wait(DEADLINE_S)
        elif self.began.is_set():
            failure, self.failure = self.failure, None
            if failure is not None:
                raise failure
        super().fdatasync(fd)


@pytest.fixture
def held() -> Iterator[HeldFlush]:
    io = HeldFlush()
    yield io
    io.may_end.set()


def test_a_flush_outlives_the_file_that_it_began_on(
    tmp_path: Path, held: HeldFlush, shared: SharedFlush, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two exchanges while it runs: a child over the file, and a copy of the file in its place below."""
    monkeypatch.setattr("mullion.vhd.chain.SharedFlush", lambda: shared)
    first, copy, child = (str(tmp_path / name) for name in ("first.vhd", "copy.vhd", "child.vhd"))
    create_fixed(first, MIB)
    with open_chain(first, file_io=held) as chain:
        chain.pwrite(0, b"x" * 512)
        freezing = prepare_freeze(chain, child)  # flushes
        held.fd = chain.images[0].fd
        flush = Caller(chain.flush)
        assert held.began.wait(DEADLINE_S)
        freezing.exchange()
        freezing_ends = Caller(freezing.finish)
        come_to(shared, 3)
        shutil.copy(first, copy)
        shorter = prepare_switch(
            chain, Exchange((child, copy), {copy: os.open(copy, os.O_RDONLY)}), pending_path=None, holder=""
        )
        shorter.exchange()
        closing = Caller(shorter.finish)
        come_to(shared, 1)
        held.may_end.set()
        assert flush.join() is None
        assert freezing_ends.join() is None
        assert closing.join() is None
        assert chain.paths == (child, copy)
        assert read(chain, 0, 512) == b"x" * 512


def test_a_flush_tells_what_the_freezing_of_its_file_met_meanwhile(tmp_path: Path, held: HeldFlush) -> None:
    create_fixed(str(tmp_path / "first.vhd"), MIB)
    with open_chain(str(tmp_path / "first.vhd"), file_io=held) as chain:
        freezing = prepare_freeze(chain, str(tmp_path / "child.vhd"))
        held.fd = chain.images[0].fd
        chain.pwrite(0, b"x" * 512)
        flush = Caller(chain.flush)
        assert held.began.wait(DEADLINE_S)
        freezing.exchange()
        held.failure = OSError(errno.EIO, "lost")
        with pytest.raises(LostDataError):
            chain.complete()  # as `finish` does, which then waits for the flush
        held.may_end.set()
        assert isinstance(flush.join(), LostDataError)
        chain.flush()
        freezing.finish()


def test_what_freezing_a_top_fails_with_is_told_by_the_next_flush(child: str, tmp_path: Path, slow: SlowSync) -> None:
    with opened(child, slow) as chain:
        switch = prepare_freeze(chain, str(tmp_path / "newer.vhd"))
        chain.pwrite(0, b"x" * 512)
        switch.settle()
        switch.exchange()
        slow.failure = OSError(errno.EIO, "lost")
        with pytest.raises(OSError, match="lost"):
            switch.finish()
        with pytest.raises(OSError, match="lost"):
            chain.flush()
        chain.flush()


def test_what_a_top_has_lost_is_told_before_it_is_merged_away(child: str, slow: SlowSync) -> None:
    with opened(child, slow) as chain:
        chain.pwrite(0, b"x" * 512)
        base = chain.paths[1]
        slow.failure = OSError(errno.EIO, "lost")
        with pytest.raises(OSError, match="lost"):
            prepare_switch(
                chain,
                Exchange((base,), {base: os.open(base, os.O_RDWR)}, collapse=True),
                pending_path=None,
                holder="",
            )
        with pytest.raises(OSError, match="lost"):
            chain.flush()
        chain.flush()


def test_whoever_shares_a_flush_ahead_is_told_once(shared: SharedFlush) -> None:
    may_end, began = threading.Event(), threading.Semaphore(0)
    failures = [None, OSError(errno.EIO, "lost"), None]

    def flush() -> None:
        began.release()
        assert may_end.wait(DEADLINE_S)
        if (failure := failures.pop(0)) is not None:
            raise failure

    first = Caller(lambda: shared.run(flush))
    assert began.acquire(timeout=DEADLINE_S)
    others = [Caller(lambda: shared.run(flush, is_ahead=True)), Caller(lambda: shared.run(flush))]
    come_to(shared, 3)
    may_end.set()
    assert first.join() is None
    assert [error and error.errno for error in (caller.join() for caller in others)] == [errno.EIO] * 2
    shared.run(flush)
    assert failures == []
