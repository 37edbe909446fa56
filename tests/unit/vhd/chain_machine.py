"""The disk machine with what changes whole disks: checkpoint, merge, resize, compact, rebase, with deaths between.

Beside the promises of `disk_machine`, checked after every death and at the end of each of them:

- what is read through the top is the same before, during and after it, and after being done again to its end
- what is read through a frozen layer never changes, unless the layer is merged away or into
- the disk opens after any death, by itself
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from tests.unit.vhd.disk_machine import DiskMachine
from tests.unit.vhd.power_cut import SECTOR, KilledError

import mullion.vhd.merge_copy
from mullion.base.errors import ConflictError, InvalidError, NoSpaceError, OperationFailedError
from mullion.vhd import DiskBusyError, create_differencing, inspect_chain, open_chain
from mullion.vhd.compact import compact
from mullion.vhd.errors import HalfMergedError, NotVhdError
from mullion.vhd.fileio import SYSTEM
from mullion.vhd.findings import Verdict
from mullion.vhd.layer_journal import forget_layer_merge
from mullion.vhd.layer_merge import LayerFiles, merge_layer
from mullion.vhd.layout import DiskType
from mullion.vhd.merge import merge
from mullion.vhd.rebase import rebase
from mullion.vhd.repair import repair_disk
from mullion.vhd.resize import resize

DEPTH = 5
ENDS = st.sampled_from(["", "kill", "power", "full"])
"""What happens on the way: nothing, deaths, or a full file system."""
FUSES = st.integers(0, 60)


class ChainMachine(DiskMachine):
    """The top is `self.top`; `frozen` has the content of every layer below it."""

    frozen: dict[str, bytes]

    def _first_opened(self) -> None:
        self.number = 0
        self.patch.setattr(mullion.vhd.merge_copy, "SHORT_COPY_BYTES", 4096)  # so that holes are looked for
        self.frozen = {path: self._read(path) for path in inspect_chain(self.top).paths[1:]}

    def _read(self, path: str) -> bytes:
        with open_chain(path, read_only=True) as chain:
            content = bytearray(chain.size_bytes)
            chain.pread(0, content)
            return bytes(content)

    def _layers(self) -> list[str]:
        return list(inspect_chain(self.top).paths)

    def _through_deaths(self, end: str, fuse: int, work: Callable[[], object], check: Callable[[], None]) -> object:
        """Do it until it is done, whatever comes between; `check` looks at what each death leaves."""
        deaths = 1 + fuse % 2
        loses = self.choose if fuse % 3 else None  # and a sync that fails loses what it was to write, or does not
        while True:
            self.io.fuse, self.io.fuse_kills = (fuse if end and deaths else None), end != "full"
            self.io.loses = loses
            deaths -= 1
            try:
                return work()
            except KilledError:
                self.io.fuse = None
                if end == "power":
                    self.io.cut_power(self.choose)
                    self.boot += 1
            except (NoSpaceError, OperationFailedError, OSError):
                assert end == "full"
            finally:
                self.io.fuse = self.io.loses = None
            fuse = self.choose.randrange(60)
            check()

    def _close(self) -> None:
        self.chain.close()
        self._flushed()

    def _check_frozen(self) -> None:
        for path, content in self.frozen.items():
            assert self._read(path) == content, path

    def _come_up(self) -> None:
        """All is done: open the top again."""
        self.chain = self._open()
        self._flushed()
        assert self._content() == self.model
        self._check_frozen()

    def _check_rest(self) -> None:
        """A death left it: it opens by itself, and reads as ever."""
        assert self._read(self.top) == self.model
        self._check_frozen()

    # ------------------------------------------------------------------ what changes disks

    @precondition(lambda self: len(self.frozen) < DEPTH)
    @rule(block_bytes=st.sampled_from([512, 4096, 16384]))
    def checkpoint(self, block_bytes: int) -> None:
        """The top is frozen, and a child over it."""
        self._close()
        self.number += 1
        child = f"{self.folder}/child{self.number}.vhd"
        create_differencing(child, self.top, block_bytes=block_bytes, durable=False)
        self.frozen[self.top] = bytes(self.model)
        self.top = child
        self._come_up()

    @precondition(lambda self: self.frozen)
    @rule(first=st.integers(0, DEPTH), into=st.integers(1, DEPTH), keep=st.booleans(), end=ENDS, fuse=FUSES)
    def merge(self, first: int, into: int, keep: bool, end: str, fuse: int) -> None:
        self._close()
        layers = self._layers()
        into = min(into, len(layers) - 1)
        first = min(first, into - 1)
        gone, target, top = layers[first:into], layers[into], self.top
        keep = keep and first > 0 and len(gone) == 1
        kept_below = {path: self.frozen[path] for path in layers[into + 1 :]}
        kept_above = {path: self.frozen[path] for path in layers[1:first]}
        merged = bytes(self.model) if first == 0 else self.frozen[layers[first]]
        before, self.frozen = self.frozen, {**kept_below, **kept_above}

        def check() -> None:
            disk = top if os.path.exists(top) else target
            assert self._read(disk) == self.model
            self._check_frozen()

        def work() -> object:
            is_out = not os.path.exists(top) or layers[first] not in self._layers()
            if is_out and not os.path.exists(self._journal(top)):
                return None  # it died after its last change
            return merge(top, from_path=layers[first], into_path=target, keep=keep, file_io=self.io)

        try:
            self._through_deaths(end, fuse, work, check)
        except (InvalidError, ConflictError):
            self.frozen = before
            assert not self._may_merge(layers, first, into)
        else:
            if first == 0:
                self.top = target
            else:
                self.frozen[target] = merged.ljust(len(before[target]), b"\0")  # it may be larger
            assert [path for path in gone if os.path.exists(path)] == (gone if keep else [])
            if keep:
                os.unlink(gone[0])
        assert not [name for name in os.listdir(self.folder) if "mullion-merge" in name]
        self._come_up()

    def _journal(self, top: str) -> str:
        return f"{self.folder}/.{os.path.basename(top)}.mullion-merge"

    def _may_merge(self, layers: list[str], first: int, into: int) -> bool:
        """Sizes must fit: the disk must not become larger, and nothing from below may show."""
        sizes = [file.size_bytes for file in inspect_chain(layers[0]).files]
        is_larger = first == 0 and sizes[into] > sizes[0]
        return not is_larger and not (sizes[first] > sizes[into] < max(sizes[into + 1 :], default=0))

    @precondition(lambda self: len(self.frozen) >= 2)
    @rule(place=st.integers(1, DEPTH), end=ENDS, fuse=FUSES)
    def merge_while_in_use(self, place: int, end: str, fuse: int) -> None:
        """A frozen layer into the one below it, while the chain is written, and read by those who opened it before.

        Deaths are the merger's alone; what ends with a power cut has no writer.
        """
        is_written = end != "power"
        if not is_written:
            self._close()
        layers = self._layers()
        upper = layers[min(place, len(layers) - 2)]
        lower = layers[layers.index(upper) + 1]
        wanted = self.frozen[upper]
        old = self.frozen.pop(lower)
        below = max((len(self.frozen[path]) for path in layers[layers.index(lower) + 1 :]), default=0)
        reader = open_chain(upper, read_only=True)

        def look(_stage: str, _done: int, _total: int) -> None:
            here = bytearray(len(wanted))
            reader.pread(0, here)
            assert here == wanted
            if is_written:
                left, self.io.fuse = self.io.fuse, None
                self.write(self.choose.random() * 0.999, self.choose.choice([512, 5000]))
                self.io.fuse = left
            with pytest.raises(DiskBusyError):
                self._read(lower)

        def check() -> None:
            self._check_frozen()
            with contextlib.suppress(HalfMergedError):
                content = self._read(lower)
                assert content[: len(old)] in (old, wanted[: len(old)].ljust(len(old), b"\0"))

        def work() -> object:
            with LayerFiles.open(upper, lower) as files:
                if files.direct_fd is not None:
                    os.close(files.direct_fd)
                    files.direct_fd = None
                return merge_layer(files, below_bytes=below, progress=look, note_bytes=8192, file_io=self.io)

        try:
            self._through_deaths(end, fuse, work, check)
        except InvalidError:
            self.frozen[lower] = old
            assert len(old) < len(wanted)
            assert below > len(old)
        else:
            self.frozen[lower] = wanted.ljust(len(old), b"\0")
            forget_layer_merge(lower, SYSTEM)
        finally:
            reader.close()
        if is_written:
            self._check_frozen()
        else:
            self._come_up()

    @rule(sectors=st.integers(-40, 40), end=ENDS, fuse=FUSES)
    def resize(self, sectors: int, end: str, fuse: int) -> None:
        self._close()
        size = max(1, self.size // SECTOR + sectors) * SECTOR
        parent = self.frozen[self._layers()[1]] if self.frozen else b""
        old, new = bytes(self.model), bytearray(self.model[:size])
        new += parent[self.size : size].ljust(size - self.size, b"\0") if size > self.size else b""

        def check() -> None:
            try:
                found = self._read(self.top)
            except NotVhdError:
                assert end in ("power", "full")
                assert is_fixed  # whose growth may leave a length that was durable before the footer there
                assert repair_disk(self.top).after.verdict is Verdict.SOUND
                found = self._read(self.top)
            assert found in (old, new)
            self._check_frozen()

        is_fixed = inspect_chain(self.top).files[0].type is DiskType.FIXED
        with contextlib.suppress(InvalidError):  # it would cut off data
            self._through_deaths(end, fuse, lambda: resize(self.top, size, file_io=self.io), check)
            self.model, self.size = new, size
        self._come_up()

    @rule(against_parent=st.booleans(), end=ENDS, fuse=FUSES)
    def compact(self, against_parent: bool, end: str, fuse: int) -> None:
        self._close()

        def work() -> object:
            return compact(self.top, against_parent=against_parent, file_io=self.io)

        self._through_deaths(end, fuse, work, self._check_rest)
        self._come_up()

    @precondition(lambda self: self.frozen)
    @rule(place=st.integers(1, DEPTH), end=ENDS, fuse=FUSES)
    def rebase(self, place: int, end: str, fuse: int) -> None:
        """To any layer of the chain below it; the layers that are passed over are nobody's then."""
        self._close()
        layers = self._layers()
        place = min(place, len(layers) - 1)

        def work() -> object:
            return rebase(self.top, layers[place], file_io=self.io)

        self._through_deaths(end, fuse, work, self._check_rest)
        for path in layers[1:place]:
            os.unlink(path)
            del self.frozen[path]
        self._come_up()
