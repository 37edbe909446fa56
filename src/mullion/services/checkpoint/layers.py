"""What is to be done with the layers of a disk. Pure: no I/O, no clock.

    base ◄── a ◄── b ◄── head          each file differs from its parent; checkpoints pin base, a or b
                ◄── c                   and what is neither pinned nor the head is there only for those above it

A layer that nobody needs goes: at once when nothing lies above it, by a merge when one layer does. One with several
children stays until only one of them is left. So a chain is never longer than checkpoints make it.

Invariants: what can be read through a pinned layer or the head is the same before and after every step; planning on the
result of all steps gives nothing to do; every step may be repeated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import msgspec

from mullion.services.partition.record import DiskLayers, Merging


@dataclass(frozen=True, slots=True)
class Drop:
    """Remove a file that nothing lies on and nobody needs."""

    path: str


@dataclass(frozen=True, slots=True)
class Merge:
    """Write what `upper` holds into `lower`, its parent, and take `upper` out."""

    upper: str
    lower: str


Act = Drop | Merge


def plan_layers(layers: DiskLayers, pinned: Collection[str], in_use: Collection[str] = ()) -> Act | None:
    """The next thing to do; None when there is nothing. A merge that was begun comes first.

    `pinned` are the files that checkpoints name, `in_use` the tops that somebody reads just now: neither changes nor
    goes. What lies above a file that changes hides it, so that one may be read meanwhile. Nothing is merged into the
    definition's file of a disk that is coming home from a backup, because blocks come there: that waits until all are.
    """
    if layers.merging is not None:
        return Merge(layers.merging.upper, layers.merging.lower)
    children = children_of(layers.parents)
    kept = {layers.head, *pinned, *in_use}
    if layers.is_coming_home:
        kept.update(path for path, parent in layers.parents.items() if parent is None)
    free = [path for path in layers.parents if path not in kept]
    for path in free:
        if not children[path] and layers.parents[path] is not None:
            return Drop(path)
    for path in free:
        if len(children[path]) == 1:
            return Merge(children[path][0], path)
    return None


def children_of(parents: Mapping[str, str | None]) -> dict[str, list[str]]:
    """For each file those that lie right on it."""
    children: dict[str, list[str]] = {path: [] for path in parents}
    for path, parent in parents.items():
        if parent is not None:
            children[parent].append(path)
    return children


def with_child(layers: DiskLayers, child: str, parent: str) -> DiskLayers:
    """The layers with one more file; the head stays."""
    return msgspec.structs.replace(layers, parents={**layers.parents, child: parent})


def without(layers: DiskLayers, path: str) -> DiskLayers:
    """The layers without a file on which nothing lies."""
    return msgspec.structs.replace(layers, parents={one: up for one, up in layers.parents.items() if one != path})


def begin_merge(layers: DiskLayers, merge: Merge) -> DiskLayers:
    return msgspec.structs.replace(layers, merging=Merging(merge.upper, merge.lower))


def end_copy(layers: DiskLayers) -> DiskLayers:
    """The lower layer holds everything."""
    assert layers.merging is not None, "a merge that was begun"
    return msgspec.structs.replace(layers, merging=msgspec.structs.replace(layers.merging, is_copied=True))


def end_merge(layers: DiskLayers) -> DiskLayers:
    """What lay on the upper layer lies on the lower one; the upper one is a leaf of its own until it is dropped."""
    assert layers.merging is not None, "a merge that was begun"
    upper, lower = layers.merging.upper, layers.merging.lower
    parents = {path: lower if parent == upper else parent for path, parent in layers.parents.items()}
    return msgspec.structs.replace(
        layers, parents=parents, merging=None, head=lower if layers.head == upper else layers.head
    )


def chain_of(layers: DiskLayers, top: str) -> tuple[str, ...]:
    """The files of ours from a top down to the definition's file."""
    chain = [top]
    while (parent := layers.parents[chain[-1]]) is not None:
        chain.append(parent)
    return tuple(chain)
