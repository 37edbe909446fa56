"""Metadata contexts of an export: what BLOCK_STATUS can tell about its ranges.

Spec: "The NBD protocol", section "Metadata querying"; "qemu" namespace: docs/interop/nbd.txt of QEMU.

| context | state of a run |
|---|---|
| `base:allocation` | bit 0 not allocated, bit 1 reads as zeros |
| `qemu:dirty-bitmap:NAME` | bit 0 changed since the point that NAME names |

Invariants: the runs of a context are ascending, without gaps, none of them empty, and computed only as far as they are
taken; a client may choose each of an export's contexts once.
Not handled: `qemu:allocation-depth`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from mullion.base.block import BlockDevice, ExtentKind
from mullion.wire.nbd.messages import ALLOCATION_CONTEXT, DIRTY_BITMAP_PREFIX, BlockState, DirtyState

_EXTENT_STATES: Final = {
    ExtentKind.DATA: int(BlockState(0)),
    ExtentKind.ZERO: int(BlockState.ZERO),
    ExtentKind.HOLE: int(BlockState.HOLE | BlockState.ZERO),
}


class DirtyBitmap(Protocol):
    """Which ranges of a device have changed since some point."""

    def runs(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """The range in order, without gaps: (length in bytes, whether it may have changed).

        Raises: OSError, MullionError.
        """
        ...


class Context(NamedTuple):
    """A context of one export: its name, and the runs of a range as (length in bytes, state)."""

    name: str
    runs: Callable[[int, int], Iterator[tuple[int, int]]]


def contexts_of(device: Callable[[], BlockDevice], bitmaps: Mapping[str, DirtyBitmap]) -> tuple[Context, ...]:
    """All contexts of a device, which may be exchanged while it is served; `bitmaps` by their names."""

    def allocation(offset: int, length: int) -> Iterator[tuple[int, int]]:
        for extent in device().extents(offset, length):
            yield extent.length, _EXTENT_STATES[extent.kind]

    found = [Context(ALLOCATION_CONTEXT, allocation)]
    found += [Context(DIRTY_BITMAP_PREFIX + name, _dirty_runs(bitmap)) for name, bitmap in bitmaps.items()]
    return tuple(found)


def _dirty_runs(bitmap: DirtyBitmap) -> Callable[[int, int], Iterator[tuple[int, int]]]:
    def runs(offset: int, length: int) -> Iterator[tuple[int, int]]:
        for run_bytes, is_dirty in bitmap.runs(offset, length):
            yield run_bytes, int(DirtyState.DIRTY) if is_dirty else 0

    return runs


def matching(contexts: Sequence[Context], queries: Collection[bytes], *, may_use_wildcards: bool) -> list[int]:
    """The places of the contexts that the queries ask for, in the contexts' order.

    Only a LIST may ask for everything (no query), a namespace (`base:`), or a part of one (`qemu:dirty-bitmap:`).
    """
    if may_use_wildcards and not queries:
        return list(range(len(contexts)))
    wanted = set(queries)
    found = []
    for place, context in enumerate(contexts):
        name = context.name.encode()
        namespace = name[: name.index(b":") + 1]
        wildcards = {namespace}
        if context.name.startswith(DIRTY_BITMAP_PREFIX):
            wildcards.add(DIRTY_BITMAP_PREFIX.encode())
        if name in wanted or (may_use_wildcards and wildcards & wanted):
            found.append(place)
    return found


def longest_runs(context: Context, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    """At most `limit` runs from the beginning of the range, neighbours of one state as one.

    Raises: OSError, MullionError.
    """
    found: list[tuple[int, int]] = []
    for run_bytes, state in context.runs(offset, length):
        if found and found[-1][1] == state:
            found[-1] = (found[-1][0] + run_bytes, state)
        elif len(found) == limit:
            break
        else:
            found.append((run_bytes, state))
    return found
