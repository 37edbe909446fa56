"""The disk machine with what is done to the chain of a disk in use: a child on top, layers merged away, the top itself.

The machine is the provider, and the parent that starts the next one: it knows the top from its record, written before
the provider is told, and takes the file below where the top is empty. Beside the promises of `disk_machine`:

- a frozen layer, once the exchange is finished, reads for ever as the disk read when it was frozen
- a full file system during an exchange refuses it, or leaves what is to be finished to the next flush
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from tests.unit.vhd.disk_machine import FUSES, LENGTHS, OFFSETS, DiskMachine
from tests.unit.vhd.power_cut import KilledError

import mullion.vhd.merge_copy
from mullion.base.errors import InvalidError
from mullion.vhd import Chain, create_differencing, inspect_chain, open_chain
from mullion.vhd.layer_merge import LayerFiles, merge_layer
from mullion.vhd.pending import log_path
from mullion.vhd.recovery import recover_layer
from mullion.vhd.switching import Exchange, Switch, prepare_switch

DEPTH = 5
ENDS = st.sampled_from(["", "", "kill", "power", "full"])


class SwitchMachine(DiskMachine):
    """The chain is used all the time; `promised` has what was frozen."""

    promised: dict[str, bytes]
    layers: list[str]

    def _first_opened(self) -> None:
        self.number = 0
        self.patch.setattr(mullion.vhd.merge_copy, "SHORT_COPY_BYTES", 4096)
        self.promised = {}

    def _log(self, fd: int) -> str:
        return log_path(self.folder, "log", fd)

    def _open(self) -> Chain:
        """As the next provider does, on the chain that the next parent finds."""
        if os.path.getsize(self.top) == 0:
            self.top = self.layers[1]
        self.layers = list(inspect_chain(self.top).paths)
        fds: list[int] = []
        for path in reversed(self.layers[1:]):
            fd = os.open(path, os.O_RDWR)
            if os.path.exists(self._log(fd)):
                try:
                    recover_layer(fd, path, pending_path=self._log(fd), holder="", file_io=self.io)
                except BaseException:
                    for opened in (fd, *fds):
                        os.close(opened)
                    raise
            fds.insert(0, fd)
        fds.insert(0, os.open(self.top, os.O_RDWR))
        return Chain.from_descriptors(
            fds, self.layers, pending_path=self._log(fds[0]), file_io=self.io, fills_cells=self.fills_cells
        )

    def _come_back(self, under_way: range, wanted: bytearray, *, power: bool) -> None:
        self.chain.abandon()
        for entry in os.listdir(
            "/proc/self/fd"
        ):  # an exchange that was cut off had some too; a process takes all along
            with contextlib.suppress(OSError):
                name = os.readlink(f"/proc/self/fd/{entry}").removesuffix(" (deleted)")
                is_disk = name.startswith(f"{self.folder}/") and name.endswith(
                    ".vhd"
                )  # and no log: its map has it open
                if is_disk and not fcntl.fcntl(int(entry), fcntl.F_GETFL) & os.O_PATH:  # those pin inodes
                    os.close(int(entry))
        super()._come_back(under_way, wanted, power=power)

    def _prepare(self, paths: list[str], new: list[str], **kind: bool) -> Switch:
        descriptors = {path: os.open(path, os.O_RDWR) for path in new}
        wanted = Exchange(tuple(paths), descriptors, **kind)
        return prepare_switch(self.chain, wanted, pending_path=self._log, holder="")

    def _exchange(
        self, prepare: Callable[[], Switch], exchanged: Callable[[], None], end: str, fuse: int, write: tuple[int, int]
    ) -> bool:
        """All steps of an exchange, with a write before it is finished; False when it was refused and undone."""
        offset, length = write
        content = self.choose.randbytes(length)
        wanted = bytearray(self.model)
        wanted[offset : offset + length] = content
        under_way = range(0)
        self.io.fuse, self.io.fuse_kills = (fuse if end else None), end != "full"
        try:
            try:
                switch = prepare()
            except OSError:
                assert end == "full"
                self.lacked_room = True
                self._hear()
                return False
            try:
                switch.settle()
                switch.exchange()
            except OSError:
                assert end == "full"
                self.lacked_room = True
                with contextlib.suppress(OSError):  # nor was there room to undo it
                    switch.cancel()
                self._hear()
                return False
            exchanged()
            burning, self.io.fuse = self.io.fuse, (self.io.fuse if end != "full" else None)
            under_way = self._sectors(offset, length)
            self.chain.pwrite(offset, content)
            self.model, under_way = wanted, range(0)
            self._became(offset, length)
            self.io.fuse = burning
            try:
                switch.finish()
            except OSError:
                assert end == "full"
                self._hear()
                self.chain.flush()
                self._flushed()
            else:
                if burning is not None and self.io.fuse is None:  # a frozen layer's end waits for an opening
                    self.lacked_room = True
        except KilledError:
            for sector in under_way:
                self.since_flush.setdefault(sector, []).append(bytes(wanted[sector * 512 : sector * 512 + 512]))
            self._come_back(under_way, wanted, power=end == "power")
        finally:
            self.io.fuse = None
        self._check_promises()
        return True

    def _hear(self) -> None:
        """The next flush tells, once, of what an exchange met."""
        self.io.fuse = None
        with contextlib.suppress(OSError):
            self.chain.flush()

    def _check_promises(self) -> None:
        for path, promised in self.promised.items():
            with open_chain(path, read_only=True) as chain:
                content = bytearray(chain.size_bytes)
                chain.pread(0, content)
            assert content == promised, path

    # ------------------------------------------------------------------ exchanges

    @precondition(lambda self: len(self.layers) < DEPTH)
    @rule(block_bytes=st.sampled_from([512, 4096, 16384]), end=ENDS, fuse=FUSES, place=OFFSETS, length=LENGTHS)
    def push(self, block_bytes: int, end: str, fuse: int, place: float, length: int) -> None:
        """A checkpoint."""
        self.number += 1
        child, old = f"{self.folder}/child{self.number}.vhd", list(self.layers)
        create_differencing(child, self.top, block_bytes=block_bytes, durable=False, lock_parent=False)
        self.top, self.layers = child, [child, *old]  # the record comes first
        content = bytes(self.model)
        chain = self.chain

        def prepare() -> Switch:
            return self._prepare(self.layers, [child])

        if self._exchange(prepare, lambda: None, end, fuse, self._range(place, length)):
            if self.chain is chain:  # nobody died: the layer is promised
                self.promised[old[0]] = content
        else:
            self.top, self.layers = old[0], old
            os.unlink(child)

    @precondition(lambda self: len(self.layers) > 2)
    @rule(end=ENDS, fuse=FUSES, place=OFFSETS, length=LENGTHS)
    def shorten(self, end: str, fuse: int, place: float, length: int) -> None:
        """The layer below the top is merged into the one below it, and leaves the chain."""
        upper, lower = self.layers[1:3]
        short = [self.top, *self.layers[2:]]
        try:
            with LayerFiles.open(upper, lower) as files:
                below = max((file.size_bytes for file in inspect_chain(lower).files[1:]), default=None)
                merge_layer(files, file_io=self.io, below_bytes=below)
        except InvalidError:
            return
        self.promised.pop(lower, None)

        def prepare() -> Switch:
            return self._prepare(short, [], set_parent=True)

        def exchanged() -> None:
            self.layers = short
            if upper in self.promised:
                content = self.promised.pop(upper)
                size = inspect_chain(lower).size_bytes
                self.promised[lower] = content.ljust(size, b"\0")

        write = self._range(place, length)
        done = self._exchange(prepare, exchanged, end, fuse, write)
        if not done:  # the top may name its new parent by now: the service tries again, when there is room
            done = self._exchange(prepare, exchanged, "", fuse, write)
            assert done
        if upper not in self.layers:
            self.promised.pop(upper, None)
            os.unlink(upper)

    @precondition(lambda self: len(self.layers) > 1)
    @rule(end=ENDS, fuse=FUSES, place=OFFSETS, length=LENGTHS)
    def collapse(self, end: str, fuse: int, place: float, length: int) -> None:
        """The top into the file below it."""
        old, below = self.layers[0], self.layers[1:]

        def prepare() -> Switch:
            self.promised.pop(below[0], None)
            return self._prepare(below, below[:1], collapse=True)

        def exchanged() -> None:
            self.top, self.layers = below[0], below

        try:
            done = self._exchange(prepare, exchanged, end, fuse, self._range(place, length))
        except InvalidError:
            return
        if done and self.top != old:
            os.unlink(old)

    def teardown(self) -> None:
        if hasattr(self, "chain"):
            self._check_promises()
        super().teardown()
