"""Which layers of a chain a merge is about, and what speaks against it. Nothing here writes.

A chain is a list of open images, top first; a range (first, into) is the layers `first` to `into - 1`, merged into
layer `into`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import Final

from mullion.base.errors import ConflictError, InvalidError, NotFoundError
from mullion.base.units import format_size
from mullion.vhd.children import find_children
from mullion.vhd.errors import VhdDamagedError
from mullion.vhd.image import Image
from mullion.vhd.merge_journal import Journal
from mullion.vhd.parents import real_path

Range = tuple[int, int]

_NAMED_CHILDREN: Final = 5


def choose_range(images: Sequence[Image], from_path: str | None, into_path: str | None) -> Range:
    """The range that a person asked for: by default the top into its parent.

    Raises: InvalidError; NotFoundError.
    """
    if len(images) == 1:
        raise InvalidError(
            f"{images[0].path} is {images[0].kind.word} and has no parent to be merged into",
            remedy="Name the child: mullion vhd merge CHILD.",
        )
    first = 0 if from_path is None else _find(images, from_path)
    into = first + 1 if into_path is None else _find(images, into_path)
    if first >= into or into >= len(images):
        what = "is the base of the chain" if first == len(images) - 1 else f"does not lie above {into_path}"
        raise InvalidError(f"{images[first].path} {what}: there is nothing to merge it into", remedy=_layers(images))
    return first, into


def find_begun(journal: Journal, images: Sequence[Image], journal_path: str) -> Range | None:
    """The range of a merge that was begun; None when its layers are no longer in the chain, so that files may be left.

    Raises: ConflictError when the chain is another than that which the journal is about.
    """
    ids = [image.footer.unique_id for image in images]
    layers = {layer.unique_id for layer in journal.layers}
    if journal.into_id in ids:
        into = ids.index(journal.into_id)
        there = [index for index in range(len(ids)) if ids[index] in layers]
        if not there:
            return None
        if there == list(range(there[0], into)) and ids[there[0]] == journal.layers[0].unique_id:
            return there[0], into
    raise ConflictError(
        f"{images[0].path}: the chain was changed since a merge into {journal.into_path} was begun",
        remedy=f"If it is right as it is: remove {journal_path}, then merge again.",
        path=journal_path,
    )


def check_same(journal: Journal, top_path: str, from_path: str | None, into_path: str | None, *, keep: bool) -> None:
    """Is the merge that is asked for the one that was begun? Raises: ConflictError."""
    begun = journal.layers[0].path
    is_same = from_path is None or os.path.realpath(from_path) == begun
    is_same = is_same and (into_path is None or os.path.realpath(into_path) == os.path.realpath(journal.into_path))
    if not is_same or (keep and not journal.keep):
        raise ConflictError(
            f"{top_path}: a merge of {begun} into {journal.into_path} was begun and must be finished first",
            remedy="Finish it: mullion vhd merge with the top of the chain alone.",
            path=top_path,
        )


def check_range(images: Sequence[Image], chosen: Range, *, leftovers: Journal | None, keep: bool) -> None:
    """Refuse a merge that would lose something, or change what another disk reads.

    `leftovers` is the journal of a merge that was begun: its files are nobody's children any more.
    Raises: InvalidError; ConflictError; VhdDamagedError.
    """
    first, into = chosen
    if keep and into - first > 1:
        raise InvalidError(
            "only the file of a single layer can be kept",
            remedy="Merge without --keep: the layers between would show another content than before.",
        )
    for image in images[max(0, first - 1) : into + 1]:
        if image.damage:
            raise VhdDamagedError(
                f"{image.path} is damaged, and would be changed or removed: {'; '.join(image.damage)}",
                path=image.path,
                structure="file",
                remedy=f"Mend it first: mullion vhd repair {shlex.quote(image.path)}",
            )
    if first == 0 and images[into].size_bytes > images[0].size_bytes:
        raise InvalidError(
            f"{images[into].path} has {format_size(images[into].size_bytes)} and {images[0].path} only "
            f"{format_size(images[0].size_bytes)}: after the merge the disk would be larger than it is",
            remedy="Make them equal: "
            f"mullion vhd resize {shlex.quote(images[0].path)} --size {images[into].size_bytes} --align 512",
        )
    below = max((image.size_bytes for image in images[into + 1 :]), default=0)
    if images[first].size_bytes > images[into].size_bytes < below:
        raise InvalidError(
            f"{images[into].path} is smaller than the disks above and below it: growing it would show what lies below",
            remedy=f"Copy the disk instead: mullion vhd flatten {shlex.quote(images[0].path)} NEW.vhd",
        )
    _check_children(images, chosen, leftovers)


def _check_children(images: Sequence[Image], chosen: Range, leftovers: Journal | None) -> None:
    first, into = chosen
    ours = {real_path(image.fd) for image in images[: into + 1]}
    if leftovers is not None:
        ours.update(layer.path for layer in leftovers.layers)
    beside = {os.path.dirname(path): path for path in sorted(ours)}
    for image in images[first : into + 1]:
        found = {child for path in beside.values() for child in find_children(path, image.footer.unique_id)}
        others = sorted(path for path in found if os.path.realpath(path) not in ours)
        if not others:
            continue
        named = ", ".join(others[:_NAMED_CHILDREN]) + (" and more" if len(others) > _NAMED_CHILDREN else "")
        remedy = "Merge or delete these first, or make them independent with mullion vhd flatten."
        if image is images[0]:
            remedy = (
                f"Name the top of the chain: mullion vhd merge {shlex.quote(others[0])} "
                f"--from {shlex.quote(image.path)} --into {shlex.quote(images[into].path)}"
            )
        raise ConflictError(
            f"{image.path} is the parent of other disks, which would read another content after the merge: {named}",
            remedy=remedy,
            path=image.path,
        )


def _find(images: Sequence[Image], path: str) -> int:
    try:
        wanted = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no file {path}", remedy=_layers(images), path=path) from error
    except OSError as error:
        raise InvalidError(f"{path}: {error.strerror}", remedy=_layers(images), path=path) from error
    for index, image in enumerate(images):
        if os.path.samestat(wanted, os.fstat(image.fd)):
            return index
    raise InvalidError(f"{path} is no layer of {images[0].path}", remedy=_layers(images), path=path)


def _layers(images: Sequence[Image]) -> str:
    return f"Name layers of this chain, the upper with --from: {', '.join(image.path for image in images)}."
