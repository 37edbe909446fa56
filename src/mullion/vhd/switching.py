"""Exchanging the files beneath a chain that is in use: what is read stays the same, what lies below becomes another.

    push      a child was made over the top: it is the top from now on, the old one is frozen
    shorten   layers below the top are gone, because the one below them holds all they held
    collapse  the little that the top holds is copied into the file below it, which is the top from now on

All go through the same steps, so that the chains of several disks can be exchanged at one instant:

    prepare   open, lock, check, and do ahead whatever can be done ahead; requests go on
    settle    nobody reads or writes: what may fail and can be undone
    exchange  nobody reads or writes: from here on the new chain counts
    finish    requests go on: what is left is made durable, files that are in no chain are closed, once no flush that
              has begun on one of them runs any more

or, up to `exchange`, `cancel`: everything is as before.

Durability: a frozen top is flushed ahead, and what is left then not while requests wait, but right after, in `finish`;
the disk's own flush waits for that (`Chain.complete`), so nothing is promised that is not there. Killed in between, the
frozen layer's pending log is beside that of the new top, and whoever opens the chain next carries out both
(`recovery.recover_layer`).

In a collapse the lower file is durable before the top is emptied, and the top is emptied before the lower file takes
another write: whoever finds the top empty goes on with the file below, whoever finds it full reads it as ever.
"""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from mullion.base.block import Buffer
from mullion.base.errors import ConflictError, InvalidError
from mullion.base.units import SECTOR_BYTES, format_size
from mullion.vhd import bat as bat_table
from mullion.vhd.chain import Chain
from mullion.vhd.errors import ParentMismatchError, ParentNotFoundError
from mullion.vhd.fileio import FileIO
from mullion.vhd.image import Image, load_image
from mullion.vhd.layer_journal import check_marks
from mullion.vhd.layout import DiskType
from mullion.vhd.locking import lock_file, unlock_file, write_holder
from mullion.vhd.merge_copy import LowerLayer, UpperLayers, merge_block
from mullion.vhd.offline import reload
from mullion.vhd.parent_header import set_parent
from mullion.vhd.parents import CHAIN_LIMIT, check_parent, identity_of, load_parent, note_parent
from mullion.vhd.pending import end_session
from mullion.vhd.recovery import end_top, open_top
from mullion.vhd.resize import grow_file
from mullion.vhd.top import TopWriter

_PIECE_BYTES: Final = 64 * 1024


class LayerTooLargeError(ConflictError):
    """A layer holds more than may be merged while requests wait."""

    code = "layer-too-large"
    default_remedy = "Merge it in the background: delete the checkpoint below it, or let the merge go on."


@dataclass(frozen=True, slots=True)
class Exchange:
    """Which chain a disk is to stand on; `new` are descriptors of files to write to, by path."""

    paths: tuple[str, ...]
    new: Mapping[str, int]
    set_parent: bool = False
    """Name the second file as the top's parent, in the top."""
    collapse: bool = False
    limit_bytes: int | None = None
    """Most that a collapse may copy."""


class Switch(Protocol):
    """An exchange that is prepared."""

    @abstractmethod
    def settle(self) -> None:
        """Raises: OSError, MullionError: then it is to be cancelled."""

    @abstractmethod
    def exchange(self) -> None:
        """Raises: OSError, of a collapse, before anything has changed."""

    @abstractmethod
    def finish(self) -> None:
        """Raises: OSError; the disk goes on, its next flush raises it as well, and the one after that tries again."""

    @abstractmethod
    def cancel(self) -> None:
        """Everything as before, and the new descriptors are closed. Raises: OSError."""


def prepare_switch(chain: Chain, wanted: Exchange, *, pending_path: Callable[[int], str] | None, holder: str) -> Switch:
    """Do all that needs nobody to wait. `pending_path` makes the path of a file's pending log from its descriptor.

    The new descriptors become the switch's, and are closed when this raises.
    Raises: InvalidError for what is no exchange of this chain; DiskBusyError; LayerTooLargeError; VhdError; OSError.
    """
    try:
        if not wanted.collapse:
            wanted = replace(wanted, new=_without_known(chain, wanted.new))
        _check_names(chain, wanted)
        chain.complete()
        for path, fd in wanted.new.items():
            if not wanted.collapse:
                lock_file(fd, path, for_writing=path == wanted.paths[0])
        if wanted.collapse:
            return _Collapse(chain, wanted, pending_path, holder)
        images = [_image_of(chain, wanted, number, path) for number, path in enumerate(wanted.paths)]
        _check_images(images, wanted)
        if images[0] is chain.images[0]:
            return _Shorten(chain, wanted, images)
        return _Push(chain, wanted, images, pending_path, holder)
    except BaseException:
        _let_go(wanted.new.values())
        raise


def held_bytes(image: Image, writer: TopWriter | None) -> int:
    """How much a layer holds of its own. Raises: OSError; VhdError."""
    if image.header is None:
        return image.size_bytes
    sectors = image.block_bytes // SECTOR_BYTES
    if image.kind is not DiskType.DIFFERENCING:
        return image.allocated_bytes
    held = 0
    block = bat_table.next_allocated(image.bat, 0)
    while block < len(image.bat):
        start = image.block_start(block)
        assert start is not None
        bits = writer.bits(block) if writer is not None else image.read_bits(start, 0, sectors)
        held += bits.bit_count() * SECTOR_BYTES
        block = bat_table.next_allocated(image.bat, block + 1)
    return held


# ---------------------------------------------------------------------- the three kinds


class _Frozen:
    """An old top, which nobody writes any more: complete and clean is what it becomes."""

    def __init__(self, image: Image, writer: TopWriter | None, child: Image, file_io: FileIO) -> None:
        self.image = image
        self.writer = writer
        self._child = child
        self._io = file_io

    def complete(self) -> None:
        end_top(self.image, self.writer, self._io)
        lock_file(self.image.fd, self.image.path, for_writing=False)
        note_parent(self._child.fd, f"/proc/self/fd/{self.image.fd}")


class _Push(Switch):
    """One or more children over the top."""

    def __init__(
        self,
        chain: Chain,
        wanted: Exchange,
        images: list[Image],
        pending_path: Callable[[int], str] | None,
        holder: str,
    ) -> None:
        self._chain = chain
        self._images = images
        self._new_fds = tuple(wanted.new.values())
        self._io = chain.file_io
        self._top = images[0]
        chain.flush_ahead()  # so that little is left of the old top when first writes find room in the new one
        path = None if pending_path is None else pending_path(self._top.fd)
        self._writer, _ = open_top(self._top, pending_path=path, holder=holder, file_io=self._io)

    def settle(self) -> None:
        """Nothing: the old top is flushed when nobody waits for it."""

    def exchange(self) -> None:
        old = self._chain.images[0]
        place = next(number for number, image in enumerate(self._images) if image is old)
        child = self._images[place - 1]
        self._gone = _gone(self._chain, self._images)
        self._chain.exchange(self._images, self._writer, [_Frozen(old, self._chain.writer, child, self._io)])

    def finish(self) -> None:
        try:
            self._chain.complete()
        finally:
            with self._chain.between_flushes():
                _close_images(self._gone)

    def cancel(self) -> None:
        try:
            end_top(self._top, self._writer, self._io)
        finally:
            _let_go(self._new_fds)


class _Shorten(Switch):
    """The same top over other files."""

    def __init__(self, chain: Chain, wanted: Exchange, images: list[Image]) -> None:
        self._chain = chain
        self._images = images
        self._new_fds = tuple(wanted.new.values())
        self._has_renamed = wanted.set_parent
        if wanted.set_parent:
            name_other_parent(chain, images[1])

    def settle(self) -> None:
        """Nothing: what is read is the same with the old layers and without them."""

    def exchange(self) -> None:
        self._gone = _gone(self._chain, self._images)
        self._chain.exchange(self._images, self._chain.writer)

    def finish(self) -> None:
        with self._chain.between_flushes():
            _close_images(self._gone)

    def cancel(self) -> None:
        try:
            if self._has_renamed:
                name_other_parent(self._chain, self._chain.images[1])
        finally:
            _let_go(self._new_fds)


def name_other_parent(chain: Chain, parent: Image) -> None:
    """Make another file the parent of the top, durably; requests that change metadata wait. Raises: OSError.

    Also where the top names it already: an earlier attempt may have failed in the very write that was to make it last.
    """
    top = chain.images[0]
    chain.flush_ahead()  # so that little is left to be flushed while allocating writes wait
    with chain.settled():
        try:
            set_parent(top, parent.path, parent.footer.unique_id, chain.file_io)
        except OSError:
            reload(top)
            raise
    note_parent(top.fd, f"/proc/self/fd/{parent.fd}")


class _Emptied:
    """A top that holds nothing any more: that must be durable before anything is promised of what took its place."""

    writer: TopWriter | None = None

    def __init__(self, image: Image, file_io: FileIO) -> None:
        self.image = image
        self._io = file_io

    def complete(self) -> None:
        self._io.sync_file(self.image.fd)
        write_holder(self.image.fd, "")
        end_session(self.image.fd)
        _close_images([self.image])


class _Collapse(Switch):
    """The top into the file below it.

    All is copied once while requests go on, so that room, bitmaps and most of the data are there when they wait; what
    has changed since is found by comparing.
    """

    def __init__(self, chain: Chain, wanted: Exchange, pending_path: Callable[[int], str] | None, holder: str) -> None:
        self._chain = chain
        self._io = chain.file_io
        self._limit_bytes = wanted.limit_bytes
        self._upper, self._old = chain.images[:2]
        path = self._old.path
        fd = wanted.new[path]
        if identity_of(fd) != identity_of(self._old.fd):
            raise InvalidError(f"{path}: the descriptor is of another file", remedy="Open the file below the top.")
        self._check_limit()
        chain.flush_ahead()  # what the system could not write is told, and not read back and taken for what was written
        unlock_file(self._old.fd)  # our own lock for reading would keep us from writing
        try:
            lock_file(fd, path, for_writing=True)
            self._image = load_image(fd, path)
            check_parent(self._upper, self._image)
            self._check_sizes()
            log = None if pending_path is None else pending_path(fd)
            self._writer, _ = open_top(self._image, pending_path=log, holder=holder, file_io=self._io)
        except BaseException:
            self._lock_old(fd)
            raise
        try:
            self._lower = self._copy_ahead()
        except BaseException:
            self._undo()
            raise

    def _copy_ahead(self) -> LowerLayer:
        if self._image.size_bytes < self._upper.size_bytes:
            grow_file(self._image, self._upper.size_bytes, self._io)
            if self._writer is not None:
                self._writer.restart()
        lower = LowerLayer(self._image, self._writer, _ComparingIO(self._io))
        self._copy(lower)
        lower.flush()
        return lower

    def _check_limit(self) -> None:
        held = held_bytes(self._upper, self._chain.writer)
        if self._limit_bytes is not None and held > self._limit_bytes:
            raise LayerTooLargeError(
                f"{self._upper.path} holds {format_size(held)}, more than the {format_size(self._limit_bytes)} that "
                "may be merged while the disk waits",
                path=self._upper.path,
                held_bytes=held,
                limit_bytes=self._limit_bytes,
            )

    def _check_sizes(self) -> None:
        upper, lower = self._upper.size_bytes, self._image.size_bytes
        below = max((image.size_bytes for image in self._chain.images[2:]), default=0)
        is_fixed = self._image.header is None  # whose file may be cut off where a power cut meets its growth
        if upper < lower or (upper > lower and (is_fixed or lower < below)):
            raise InvalidError(
                f"{self._upper.path} has {upper} bytes, {self._image.path} {lower}: merging them in use would change "
                "the size of the disk, show what lies below, or grow a fixed disk",
                remedy="Put a child over the top, then merge the frozen layer in the background, as the deletion of a "
                "checkpoint does; or stop the partition, and merge them with mullion vhd merge.",
            )

    def _copy(self, lower: LowerLayer) -> None:
        upper = UpperLayers([self._upper], self._chain.writer)
        for offset, length in upper.blocks(self._upper.size_bytes):
            merge_block(upper, lower, offset, length)

    def settle(self) -> None:
        self._check_limit()
        self._copy(self._lower)
        self._lower.flush()

    def exchange(self) -> None:
        writer = self._chain.writer
        assert writer is not None, "a differencing disk that is written"
        with writer.retired():  # a flush that nobody waits for may still run
            self._io.ftruncate(self._upper.fd, 0)
        writer.close_log(remove=True)
        images = [self._image, *self._chain.images[2:]]
        self._chain.exchange(images, self._writer, [_Emptied(self._upper, self._io)])

    def finish(self) -> None:
        with self._chain.between_flushes():
            _close_images([self._old])
        self._chain.complete()

    def cancel(self) -> None:
        try:
            self._undo()
        finally:
            os.close(self._image.fd)

    def _undo(self) -> None:
        try:
            end_top(self._image, self._writer, self._io)
        finally:
            self._lock_old(self._image.fd)

    def _lock_old(self, fd: int) -> None:
        unlock_file(fd)
        lock_file(self._old.fd, self._old.path, for_writing=False)


class _ComparingIO(FileIO):
    """Copies only what is different, so that a second copy of the same costs reading."""

    is_threaded = False

    def __init__(self, below: FileIO) -> None:
        self._below = below

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        return self._below.pwritev(fd, buffers, offset)

    def sync_file(self, fd: int) -> None:
        self._below.sync_file(fd)

    def punch_hole(self, fd: int, offset: int, length: int) -> None:
        self._below.punch_hole(fd, offset, length)

    def copy_range(self, source_fd: int, source_offset: int, fd: int, offset: int, length: int) -> None:
        for done in range(0, length, _PIECE_BYTES):
            count = min(_PIECE_BYTES, length - done)
            new = os.pread(source_fd, count, source_offset + done)
            if len(new) != count or os.pread(fd, count, offset + done) != new:
                self._below.copy_range(source_fd, source_offset + done, fd, offset + done, count)


# ---------------------------------------------------------------------- checking


def _check_names(chain: Chain, wanted: Exchange) -> None:
    paths, old = wanted.paths, chain.paths
    problem = None
    if chain.read_only:
        problem = "it is read-only"
    elif not 0 < len(paths) <= CHAIN_LIMIT or len(set(paths)) != len(paths):
        problem = f"a chain has 1 to {CHAIN_LIMIT} files, each once"
    elif unknown := [path for path in paths if path not in old and path not in wanted.new]:
        problem = f"the descriptor of {unknown[0]} did not come along"
    elif wanted.collapse:
        if paths != old[1:] or tuple(wanted.new) != paths[:1]:
            problem = "a collapse takes the top away and needs a descriptor of the file below it, and no other"
        elif chain.images[1] is chain.filled:
            problem = f"blocks come home into {paths[0]}: nothing is merged into it before all are there"
    elif odd := [path for path in wanted.new if path not in paths]:
        problem = f"{odd[0]} is not a file of the chain"
    elif old[0] not in paths:
        problem = f"it would lose its top, {old[0]}"
    elif chain.filled is not None and chain.filled.path != paths[-1]:
        problem = f"blocks come home into {chain.filled.path}, which has to be at its bottom"
    if problem is not None:
        raise InvalidError(
            f"{old[0]}: its chain cannot be exchanged: {problem}", remedy="Ask for the disk's `status` first."
        )


def _without_known(chain: Chain, new: Mapping[str, int]) -> dict[str, int]:
    """Files that are in the chain already keep their descriptors: a command that is repeated brings them again."""
    for path, fd in new.items():
        if path in chain.paths:
            os.close(fd)
    return {path: fd for path, fd in new.items() if path not in chain.paths}


def _image_of(chain: Chain, wanted: Exchange, number: int, path: str) -> Image:
    """A file of the new chain: what is known of a file that a merge may have changed is read anew."""
    known = next((image for image in chain.images if image.path == path), None)
    if known is None:
        fd = wanted.new[path]
        return load_parent(fd, path) if number else load_image(fd, path)
    return known if known in (chain.images[0], chain.filled) else load_parent(known.fd, path)


def _check_images(images: Sequence[Image], wanted: Exchange) -> None:
    identities = [identity_of(image.fd) for image in images]
    if len(set(identities)) != len(identities):
        raise InvalidError(f"{images[0].path}: a file is twice in the chain", remedy="Give each file once.")
    for number in range(1, len(images)):
        if number == 1 and wanted.set_parent:
            if images[0].kind is not DiskType.DIFFERENCING:
                raise ParentMismatchError(f"{images[0].path} has no parent", path=images[0].path, structure="footer")
        else:
            check_parent(images[number - 1], images[number])
    if images[-1].kind is DiskType.DIFFERENCING:
        raise ParentNotFoundError(
            f"{images[-1].path}: its parent was not given", path=images[-1].path, structure="chain"
        )
    check_marks(images)


def _gone(chain: Chain, images: Sequence[Image]) -> list[Image]:
    kept = {image.fd for image in images}
    return [image for image in chain.images if image.fd not in kept]


def _close_images(images: Sequence[Image]) -> None:
    for image in images:
        if image.fd >= 0:
            with contextlib.suppress(OSError):
                unlock_file(image.fd)
            image.close()


def _let_go(fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            unlock_file(fd)
        os.close(fd)
