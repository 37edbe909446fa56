"""Merging: what some layers of a chain hold is written into the layer below them, and the layers are taken out.

    before   TOP ... ABOVE  FROM ...  INTO ... base         after   TOP ... ABOVE  INTO ... base

The layers from FROM down to right above INTO are merged. Where FROM is the top, INTO is the disk afterwards. What is
read through the top is the same before, during and after it.

Durability: each step is durable before the next begins.

    1  the journal (`merge_journal`)
    2  INTO holds what the layers hold (`merge_copy`); the layers still hide it
    3  the lowest layer that remains above names INTO as its parent (`parent_header`): ABOVE, or FROM while it is there
    4  the files of the layers go, FROM last
    5  the journal goes

A crash before 3 leaves the chain as it was, and the next merge copies again, from the start: whoever wrote to the top
meanwhile loses nothing. Later it leaves the shorter chain, and the next merge removes what is left over. FROM is never
removed while it is in the chain, unless it was copied in the same call.

Refused: when anybody has one of these files open; when another disk, in the folders of the chain, is a child of INTO or
of a merged layer, since its content would change; when one of the files is damaged.

Not handled: children in other folders are not known. What the pending log of a killed provider holds is not part of the
files; the report says where the last writer of a layer did not end cleanly.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from mullion.base.errors import ConflictError, NoSpaceError, NotFoundError
from mullion.base.progress import Progress, no_progress
from mullion.vhd.errors import VhdError
from mullion.vhd.fileio import SYSTEM, FileIO
from mullion.vhd.image import Image, load_image, open_file
from mullion.vhd.layer_journal import check_marks, check_whole, layer_journal_path, remove_journal
from mullion.vhd.locking import lock_file, unlock_file
from mullion.vhd.merge_copy import LowerLayer, UpperLayers, merge_block
from mullion.vhd.merge_journal import Journal, Layer, journal_path, read_journal, write_journal
from mullion.vhd.merge_plan import Range, check_range, check_same, choose_range, find_begun
from mullion.vhd.offline import reload
from mullion.vhd.parent_header import set_parent
from mullion.vhd.parents import check_parent, open_parents, real_path
from mullion.vhd.pending import has_session
from mullion.vhd.recovery import end_top, open_top
from mullion.vhd.resize import resize
from mullion.vhd.storage import has_lacked_room

HOLDER: Final = "mullion vhd merge"
_PROGRESS_STEPS: Final = 200


@dataclass(slots=True)
class MergeReport:
    """What a merge did."""

    disk: str = ""
    """The file through which the disk is read from now on."""
    into: str = ""
    merged: list[str] = field(default_factory=list)
    """The layers whose content went into it, top first."""
    removed: list[str] = field(default_factory=list)
    copied_bytes: int = 0
    resumed: bool = False
    """Was it begun by an earlier call that did not come to its end?"""
    notes: list[str] = field(default_factory=list)


def merge(
    top_path: str,
    *,
    from_path: str | None = None,
    into_path: str | None = None,
    keep: bool = False,
    allowed_dirs: Sequence[str] | None = None,
    progress: Progress = no_progress,
    file_io: FileIO = SYSTEM,
) -> MergeReport:
    """Merge layers of the chain whose top is given, or finish the merge of it that was begun.

    `from_path` is the topmost layer that is merged (default: the top), `into_path` the layer that gets its content
    (default: the parent of the former). `keep` leaves the file of the one merged layer where it is. After an error,
    or an exception from `progress`, nothing is lost and the same call goes on.

    Raises: InvalidError, ConflictError, DiskBusyError, NoSpaceError; VhdError for what is wrong with a file; OSError.
    """
    place = journal_path(top_path)
    journal = read_journal(place)
    if journal is not None and not os.path.exists(top_path):
        return _finish(journal, place, journal.into_path, allowed_dirs, file_io)
    with _opened_chain(top_path, allowed_dirs) as images:
        if journal is not None and journal.top_id != images[0].footer.unique_id:
            _finish(journal, place, top_path, allowed_dirs, file_io)  # that of an earlier disk of this name
            journal = None
        if journal is None:
            chosen: Range | None = choose_range(images, from_path, into_path)
        else:
            check_same(journal, top_path, from_path, into_path, keep=keep)
            keep = journal.keep
            chosen = find_begun(journal, images, place)
            if chosen is None:
                _end_child(images, journal, file_io)
                return _finish(journal, place, top_path, allowed_dirs, file_io)
        assert chosen is not None
        check_whole(images[chosen[0]], None)
        _lock(images, chosen)
        check_range(images, chosen, leftovers=journal, keep=keep)
        report = MergeReport(resumed=journal is not None)
        with _room_is_missing(images[chosen[1]].path):
            _fit_size(images, chosen, allowed_dirs, file_io)
            if journal is None:
                journal = _begin(images, chosen, place, keep, file_io)
            _note_unclean(images, chosen, report)
            _copy(images, chosen, report, progress, file_io)
            remove_journal(layer_journal_path(images[chosen[1]].path), file_io)  # of a merge while it was in use
            progress("taking the layers out", 0, 0)
            _shorten(images, chosen, report, file_io)
            if not keep:
                folders = _folders(place, allowed_dirs)
                _remove_layers(images[chosen[0] : chosen[1]], journal, report, folders, file_io)
            _remove(place, file_io)
        first, into = chosen
        report.disk = images[0].path if first or keep else images[into].path
        report.into = images[into].path
        report.merged = [layer.path for layer in journal.layers]
        return report


@contextlib.contextmanager
def _opened_chain(top_path: str, allowed_dirs: Sequence[str] | None) -> Iterator[list[Image]]:
    """The chain, neither locked nor opened for writing yet: which files are to be written is what it tells."""
    fd = open_file(top_path)
    images: list[Image] = []
    try:
        images = open_parents(load_image(fd, top_path), allowed_dirs=allowed_dirs)
        check_marks(images)
        yield images
    finally:
        for image in images[1:]:
            image.close()
        os.close(fd)


def _lock(images: Sequence[Image], chosen: Range) -> None:
    """Open what changes or goes for writing and keep everybody out; keep writers out of the rest. Read all anew.

    The descriptors keep their numbers. Raises: DiskBusyError; DeniedError; VhdError.
    """
    first, into = chosen
    for index, image in enumerate(images):
        is_ours = max(0, first - 1) <= index <= into
        if is_ours:
            fd = open_file(f"/proc/self/fd/{image.fd}", writable=True)
            os.dup2(fd, image.fd, inheritable=False)
            os.close(fd)
        lock_file(image.fd, image.path, for_writing=is_ours)
        reload(image)
    for child, parent in itertools.pairwise(images):
        check_parent(child, parent)


def _fit_size(images: Sequence[Image], chosen: Range, allowed_dirs: Sequence[str] | None, file_io: FileIO) -> None:
    """A layer that is larger than INTO: INTO grows first, which changes nothing that can be read above it."""
    first, into = chosen
    wanted = images[first].size_bytes
    if images[into].size_bytes >= wanted:
        return
    for image in images:
        unlock_file(image.fd)
    resize(images[into].path, wanted, force=True, allowed_dirs=allowed_dirs, file_io=file_io)
    _lock(images, chosen)


def _begin(images: Sequence[Image], chosen: Range, place: str, keep: bool, file_io: FileIO) -> Journal:
    first, into = chosen
    journal = Journal(
        images[0].footer.unique_id,
        real_path(images[into].fd),
        images[into].footer.unique_id,
        tuple(Layer.of(image) for image in images[first:into]),
        keep,
    )
    write_journal(place, journal, file_io)
    return journal


def _note_unclean(images: Sequence[Image], chosen: Range, report: MergeReport) -> None:
    report.notes.extend(
        f"{image.path}: its last writer did not end cleanly; what it had not flushed may be missing"
        for image in images[chosen[0] : chosen[1]]
        if has_session(image.fd)
    )


def _copy(images: Sequence[Image], chosen: Range, report: MergeReport, progress: Progress, file_io: FileIO) -> None:
    """Step 2. INTO is closed well afterwards, also after an error: what is in it then is hidden."""
    first, into = chosen
    lower_image = images[into]
    upper = UpperLayers(images[first:into])
    writer, said = open_top(lower_image, pending_path=None, holder=HOLDER, file_io=file_io)
    report.notes.extend(f"{lower_image.path}: {text}" for text in said)
    lower = LowerLayer(lower_image, writer, file_io)
    try:
        total = sum(length for _, length in upper.blocks(lower.size_bytes))
        done, told = 0, -1
        for offset, length in upper.blocks(lower.size_bytes):
            report.copied_bytes += merge_block(upper, lower, offset, length)
            done += length
            if done * _PROGRESS_STEPS // total > told:
                told = done * _PROGRESS_STEPS // total
                progress("copying", done, total)
        progress("making durable", total, total)
        lower.flush()
    except (Exception, KeyboardInterrupt):
        lower.close()
        with contextlib.suppress(OSError):
            end_top(lower_image, writer, file_io)
        raise
    finally:
        lower.close()
    end_top(lower_image, writer, file_io)


def _shorten(images: Sequence[Image], chosen: Range, report: MergeReport, file_io: FileIO) -> None:
    """Step 3. Nothing to do where the only merged layer is the top: it names INTO already."""
    first, into = chosen
    if first == 0 and into == 1:
        return
    child, parent = images[max(0, first - 1)], images[into]
    writer, said = open_top(child, pending_path=None, holder=HOLDER, file_io=file_io)
    report.notes.extend(f"{child.path}: {text}" for text in said)
    set_parent(child, real_path(parent.fd), parent.footer.unique_id, file_io)
    end_top(child, writer, file_io)


def _end_child(images: Sequence[Image], journal: Journal, file_io: FileIO) -> None:
    """A death at the end of step 3 may have left the file above INTO without a footer at its end: write that."""
    above = [image.footer.unique_id for image in images].index(journal.into_id) - 1
    if above >= 0 and not images[above].has_tail:
        _lock(images, (above + 1, above))
        writer, _ = open_top(images[above], pending_path=None, holder=HOLDER, file_io=file_io)
        end_top(images[above], writer, file_io)


def _remove_layers(
    layers: Sequence[Image], journal: Journal, report: MergeReport, folders: set[str], file_io: FileIO
) -> None:
    """Step 4. What an earlier call left over goes as well; FROM goes last."""
    there = {image.footer.unique_id for image in layers}
    for image in reversed(layers[1:]):
        report.removed.append(_remove(real_path(image.fd), file_io))
    gone = [layer for layer in journal.layers if layer.unique_id not in there]
    _remove_leftovers(gone, report, folders, file_io)
    report.removed.append(_remove(real_path(layers[0].fd), file_io))


def _finish(
    journal: Journal, place: str, disk: str, allowed_dirs: Sequence[str] | None, file_io: FileIO
) -> MergeReport:
    """Steps 4 and 5 of a merge whose layers are out of the chain."""
    report = MergeReport(disk, journal.into_path, [layer.path for layer in journal.layers], resumed=True)
    if not journal.keep:
        _remove_leftovers(journal.layers, report, _folders(place, allowed_dirs), file_io)
    _remove(place, file_io)
    return report


def _folders(place: str, allowed_dirs: Sequence[str] | None) -> set[str]:
    """The folders in which a journal may have files removed: its own, and those that a person allowed."""
    return {os.path.dirname(place), *(os.path.realpath(allowed) for allowed in allowed_dirs or ())}


def _remove_leftovers(layers: Sequence[Layer], report: MergeReport, folders: set[str], file_io: FileIO) -> None:
    """Remove files on a journal's word: only where parents may lie, and only what nobody has touched since."""
    for layer in reversed(layers):
        try:
            fd = open_file(layer.path, writable=True, follow=False)
        except NotFoundError:
            continue
        try:
            lock_file(fd, layer.path, for_writing=True)
            is_same = layer.is_same(load_image(fd, layer.path)) and os.path.dirname(real_path(fd)) in folders
            why = "it lies elsewhere, or was changed since"
            if is_same:
                report.removed.append(_remove(layer.path, file_io))
        except (VhdError, ConflictError) as error:
            is_same, why = False, error.message
        finally:
            os.close(fd)
        if not is_same:
            report.notes.append(f"{layer.path} was merged and is not needed any more, but was not removed: {why}")


def _remove(path: str, file_io: FileIO) -> str:
    """Remove a file, durable when this returns; its path."""
    file_io.remove_file(path)
    file_io.sync_folder(os.path.dirname(path))
    remove_journal(layer_journal_path(path), file_io)
    return path


@contextlib.contextmanager
def _room_is_missing(into: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not has_lacked_room(error):
            raise
        raise NoSpaceError(
            f"there is no room to merge into {into}: {error}; no data was lost, and the chain is as it was",
            remedy="Make room on its filesystem, then give the same command again: it goes on.",
            path=into,
        ) from error
