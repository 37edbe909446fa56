"""A disk against a bytearray: random requests, kills, power cuts and full file systems between any two changes.

What is promised, and checked after every death, for each sector on its own:

- killed, with a pending log: exactly what was acknowledged; a request under way may be done in part
- power cut: what the last finished flush promised, or anything written since
- no space: nothing but the refused request's own sectors may differ, and repeating it succeeds
- a flush promises what was written before it began; what is written between its steps may be lost, and nothing else
- a sync that fails may have lost what was written since the last flush, and nothing else; the next flush promises again
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.vhd.power_cut import SECTOR, KilledError, RecordingIO

import mullion.vhd.chain
import mullion.vhd.pending
import mullion.vhd.top
from mullion.base.block import LostDataError
from mullion.vhd import Chain, create_differencing, create_dynamic, create_fixed, open_chain

OFFSETS = st.floats(0, 0.999)
LENGTHS = st.sampled_from([1, 300, 512, 513, 1024, 4096, 5000, 20000])
LONG = st.sampled_from([513, 4096, 5000, 20000])
FUSES = st.integers(0, 12)


class DiskMachine(RuleBasedStateMachine):
    """One chain under test; its top is recorded."""

    chain: Chain
    lacked_room = False
    """Something ended without room: what it left at a file's end may be tidied up by the next opening, which says so."""

    @initialize(
        kind=st.sampled_from(["dynamic", "over dynamic", "over fixed", "over child"]),
        block_bytes=st.sampled_from([512, 2048, 4096, 16384]),
        sectors=st.integers(1, 160),
        seed=st.integers(0, 2**32),
        records=st.sampled_from([mullion.vhd.top.RECORD_LIMIT, 9]),
    )
    def create(self, kind: str, block_bytes: int, sectors: int, seed: int, records: int) -> None:
        self.folder = tempfile.mkdtemp(prefix="vhd-", dir="/tmp")
        self.patch = pytest.MonkeyPatch()
        self.boot = 0
        self.patch.setattr(mullion.vhd.pending, "boot_id", lambda: f"boot {self.boot:031}")
        self.patch.setattr(mullion.vhd.chain, "YOUNG_SECTORS", 6)
        self.records = records
        self.patch.setattr(mullion.vhd.top, "RECORD_LIMIT", records)
        self.choose = random.Random(seed)
        self.fills_cells = seed % 2 == 1  # half of the disks are those of running machines
        self.size = sectors * SECTOR
        self.top = f"{self.folder}/top.vhd"
        self.pending = f"{self.folder}/pending"
        self.model = bytearray(self.size)
        if kind == "dynamic":
            create_dynamic(self.top, self.size, block_bytes=block_bytes, durable=False)
        else:
            self._create_parents(kind)
            parent = f"{self.folder}/p.vhd"
            create_differencing(self.top, parent, block_bytes=block_bytes, size_bytes=self.size, durable=False)
        self.io = RecordingIO()
        self.chain = self._open()
        self._flushed()
        self._first_opened()

    def _first_opened(self) -> None:
        """For machines that can do more."""

    def _create_parents(self, kind: str) -> None:
        parent = f"{self.folder}/p.vhd"
        base = f"{self.folder}/base.vhd" if kind == "over child" else parent
        size = max(SECTOR, self.size - self.choose.choice([0, 0, 3]) * SECTOR)  # a parent may be smaller
        if kind == "over fixed":
            create_fixed(base, size, durable=False)
        else:
            create_dynamic(base, size, block_bytes=self.choose.choice([1024, 8192]), durable=False)
        layers = [base]
        if kind == "over child":
            create_differencing(parent, base, block_bytes=4096, durable=False)
            layers.append(parent)
        for layer in layers:
            with open_chain(layer) as chain:
                for _ in range(6):
                    offset = self.choose.randrange(size)
                    content = self.choose.randbytes(min(self.choose.choice([512, 3000]), size - offset))
                    chain.pwrite(offset, content)
                    self.model[offset : offset + len(content)] = content

    def _open(self) -> Chain:
        return open_chain(self.top, pending_path=self.pending, file_io=self.io, fills_cells=self.fills_cells)

    def _range(self, place: float, length: int) -> tuple[int, int]:
        offset = int(place * self.size)
        return offset, min(length, self.size - offset)

    def _sectors(self, offset: int, length: int) -> range:
        return range(offset // SECTOR, -(-(offset + length) // SECTOR))

    def _flushed(self) -> None:
        """From here on a power cut must not lose what the model has."""
        self.since_flush: dict[int, list[bytes]] = {}
        self.since_step: dict[int, list[bytes]] = {}
        self.at_flush = bytes(self.model)

    def _became(self, offset: int, length: int) -> None:
        for sector in self._sectors(offset, length):
            now = bytes(self.model[sector * SECTOR : (sector + 1) * SECTOR])
            for contents in (self.since_flush, self.since_step):
                contents.setdefault(sector, []).append(now)

    def _content(self) -> bytearray:
        content = bytearray(self.size)
        self.chain.pread(0, content)
        return content

    # ------------------------------------------------------------------ requests

    @rule(place=OFFSETS, length=LENGTHS)
    def write(self, place: float, length: int) -> None:
        offset, length = self._range(place, length)
        content = self.choose.randbytes(length)
        cut = self.choose.randrange(length + 1)
        self.chain.pwritev(offset, [memoryview(content)[:cut], memoryview(content)[cut:]])
        self.model[offset : offset + length] = content
        self._became(offset, length)

    @rule(place=OFFSETS, length=LENGTHS)
    def write_zeroes(self, place: float, length: int) -> None:
        offset, length = self._range(place, length)
        self.chain.write_zeroes(offset, length)
        self.model[offset : offset + length] = bytes(length)
        self._became(offset, length)

    @rule(place=OFFSETS, length=LENGTHS)
    def discard(self, place: float, length: int) -> None:
        offset, length = self._range(place, length)
        self.chain.discard(offset, length)
        now = self._content()
        for sector in self._sectors(offset, length):
            part = slice(sector * SECTOR, (sector + 1) * SECTOR)
            assert now[part] in (self.model[part], bytes(SECTOR))
            self.model[part] = now[part]
        self._became(offset, length)

    @rule()
    def flush(self) -> None:
        self.chain.flush()
        self._flushed()

    @rule(
        between=st.lists(
            st.tuples(st.sampled_from(["write", "write", "zero", "discard", ""]), OFFSETS, LENGTHS),
            min_size=9,  # twice the steps of a flush: one that has failed is repeated first
            max_size=9,
        ),
        step=st.integers(0, 4),
        end=st.sampled_from(["", "", "leave", "full", "kill", "power"]),
        fuse=st.integers(0, 3),
    )
    def flush_by_steps(self, between: list[tuple[str, float, int]], step: int, end: str, fuse: int) -> None:
        """Requests between the steps of a flush, which ends well or, at some step, otherwise."""
        self.chain.complete()
        writer = self.chain.writer
        if writer is None:
            return
        self.since_step = {}
        at_begin = bytes(self.model)
        act = {"write": self.write, "zero": self.write_zeroes, "discard": self.discard}
        steps = writer.flush_steps()
        self.patch.setattr(mullion.vhd.top, "RECORD_LIMIT", 1000)  # who finds no room would wait for this flush
        try:
            for number, (what, place, length) in enumerate(between):
                is_last = end and number == step
                if is_last and end == "leave":
                    return
                self.io.fuse, self.io.fuse_kills = (fuse if is_last else None), end != "full"
                next(steps)
                self.io.fuse = None
                if what:
                    act[what](place, length)
        except StopIteration:
            self.at_flush, self.since_flush = at_begin, self.since_step
        except OSError:
            assert end == "full"
        except KilledError:
            self._come_back(range(0), bytearray(self.model), power=end == "power")
        finally:
            self.io.fuse = None
            self.patch.setattr(mullion.vhd.top, "RECORD_LIMIT", self.records)

    @rule(place=OFFSETS, length=LENGTHS)
    def read(self, place: float, length: int) -> None:
        offset, length = self._range(place, length)
        buffer = bytearray(length)
        self.chain.pread(offset, buffer)
        assert buffer == self.model[offset : offset + length]

    @rule()
    def reopen(self) -> None:
        self.chain.close()
        assert not os.path.exists(self.pending)
        self.chain = self._open()
        said = [text for text in self.chain.warnings if "footer at the end" in text or "behind" in text]
        assert self.lacked_room or not said
        self.lacked_room = any(not text.startswith(f"{self.top}: ") for text in said)  # only the top is mended
        self._flushed()

    @rule()
    def list_extents(self) -> None:
        at = 0
        for extent in self.chain.extents(0, self.size):
            assert extent.offset == at
            assert extent.length > 0
            at += extent.length
            if extent.kind.value != "data":
                assert not any(self.model[extent.offset : at])
        assert at == self.size

    # ------------------------------------------------------------------ deaths

    @rule(place=OFFSETS, length=LENGTHS, fuse=FUSES, end=st.sampled_from(["kill", "power", "close"]))
    def die(self, place: float, length: int, fuse: int, end: str) -> None:
        """Die in the middle of a write, of a flush or of the closing that follows."""
        offset, length = self._range(place, length)
        content = self.choose.randbytes(length)
        wanted = bytearray(self.model)
        wanted[offset : offset + length] = content
        self.io.fuse, self.io.fuse_kills = fuse, True
        under_way = self._sectors(offset, length)
        try:
            self.chain.pwrite(offset, content)
            self.model, under_way = wanted, range(0)
            self._became(offset, length)
            self.chain.flush()
            self._flushed()
            if end == "close":
                self.chain.close()
        except KilledError:
            pass
        for sector in under_way:
            new = wanted[sector * SECTOR : (sector + 1) * SECTOR]
            self.since_flush.setdefault(sector, []).append(bytes(new))
        self._come_back(under_way, wanted, power=end == "power")

    def _come_back(self, under_way: range, wanted: bytearray, *, power: bool) -> None:
        """Reopen after a death; opening may die as well, once or twice."""
        self.chain.abandon()
        deaths = self.choose.choice([0, 0, 1, 2])
        while True:
            self.io.fuse = None
            if power:
                self.io.cut_power(self.choose)
                self.boot += 1
                if self.choose.random() < 0.3:
                    Path(self.pending).unlink(missing_ok=True)
            if power:
                self.io = RecordingIO()
            self.io.fuse = self.choose.randrange(6) if deaths else None
            try:
                self.chain = self._open()
                self.io.fuse = None
                break
            except KilledError:
                deaths -= 1
                power = power or self.choose.random() < 0.3
        now = self._content()
        for sector in range(self.size // SECTOR):
            part = slice(sector * SECTOR, (sector + 1) * SECTOR)
            if power:
                allowed = [self.at_flush[part], *self.since_flush.get(sector, [])]
                assert now[part] in allowed, f"sector {sector}"
            elif sector in under_way:
                assert now[part] in (self.model[part], wanted[part]), f"sector {sector}"
            else:
                assert now[part] == self.model[part], f"sector {sector}"
        for sector in range(self.size // SECTOR) if power else under_way:
            part = slice(sector * SECTOR, (sector + 1) * SECTOR)
            self.model[part] = now[part]
        if power:
            self.chain.flush()
            self._flushed()
        elif under_way:
            self._became(under_way[0] * SECTOR, len(under_way) * SECTOR)

    @rule(place=OFFSETS, length=LONG, fuse=st.integers(0, 5), is_repeated=st.booleans())
    def run_out_of_space(self, place: float, length: int, fuse: int, is_repeated: bool) -> None:
        offset, length = self._range(place, length)
        content = self.choose.randbytes(length)
        before = bytes(self.model)
        self.io.fuse, self.io.fuse_kills = fuse, False
        try:
            self.chain.pwrite(offset, content)
            self.model[offset : offset + length] = content
            self._became(offset, length)
            self.chain.flush()
            self._flushed()
        except OSError:
            self.io.fuse = None
            now = self._content()
            touched = self._sectors(offset, length)
            assert now[: touched.start * SECTOR] == before[: touched.start * SECTOR]
            assert now[touched.stop * SECTOR :] == before[touched.stop * SECTOR :]
            self.model[:] = now  # what was written in part may be there after a power cut
            self._became(offset, length)
            if touched and is_repeated:
                self.chain.pwrite(offset, content)
                self.model[offset : offset + length] = content
                self._became(offset, length)
        finally:
            self.io.fuse = None
        assert self._content() == self.model

    @rule(place=OFFSETS, length=LONG, fuse=st.integers(0, 5))
    def lose_in_a_sync(self, place: float, length: int, fuse: int) -> None:
        """A sync fails, and what it was to write is gone: what an earlier flush has promised is not."""
        self.write(place, length)
        self.io.fuse, self.io.fuse_kills, self.io.loses = fuse, False, self.choose
        try:
            self.chain.flush()
        except LostDataError:
            now = self._content()
            for sector in range(self.size // SECTOR):
                part = slice(sector * SECTOR, (sector + 1) * SECTOR)
                # A cell that was taken over is not there either: docs/limits.md.
                assert self.fills_cells or sector in self.since_flush or now[part] == self.at_flush[part], sector
            self.model[:] = now
        except OSError:
            return
        finally:
            self.io.fuse = self.io.loses = None
        self.chain.flush()
        self._flushed()

    # ------------------------------------------------------------------ always

    @precondition(lambda self: hasattr(self, "chain"))
    @invariant()
    def content_is_the_models(self) -> None:
        assert self._content() == self.model

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        try:
            if hasattr(self, "chain"):
                self.chain.close()
                with open_chain(self.top, read_only=True) as chain:
                    content = bytearray(self.size)
                    chain.pread(0, content)
                    assert content == self.model
                    said = [text for text in chain.warnings if "geometry is zero" not in text]
                    assert self.lacked_room or not said
        finally:
            self.patch.undo()
            shutil.rmtree(self.folder)
