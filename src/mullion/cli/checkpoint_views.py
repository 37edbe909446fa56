"""How checkpoints look in print."""

from __future__ import annotations

import os
from collections.abc import Iterator

from mullion.base.units import format_size
from mullion.cli.face import Face
from mullion.cli.tables import fields, printable, table
from mullion.model.views import CheckpointTreeView, CheckpointView, MergeView

_PRESENT = "present"


def drawn(face: Face, tree: CheckpointTreeView) -> str:
    """The tree of checkpoints with their facts, then the merges."""
    known = {view.id for view in tree.checkpoints}
    rows = [
        (
            f"{branch}{printable(view.name)}",
            f"{view.created_at[:19]}Z",
            _kind(view),
            format_size(sum(disk.held_bytes for disk in view.disks)),
            printable(view.description),
        )
        if view is not None
        else (branch + face.style(_PRESENT, "green"), "", "", "", "")
        for branch, view in _lines(tree, None, known, "")
    ]
    text = table(("CHECKPOINT", "MADE", "KIND", "HOLDS", "NOTE"), rows, right=(3,))
    return "\n".join([text, *(merge_line(merge) for merge in tree.merges)])


def _lines(
    tree: CheckpointTreeView, parent: str | None, known: set[str], indent: str
) -> Iterator[tuple[str, CheckpointView | None]]:
    """Depth first: what was made on `parent`, with the branch drawn before it; None is what is there now.

    What was made one after the other stands one below the other; only where several were made on one it branches.
    """
    below: list[CheckpointView | None] = [
        view for view in tree.checkpoints if (view.parent if view.parent in known else None) == parent
    ]
    if (tree.present if tree.present in known else None) == parent:
        below.append(None)
    forks = len(below) > 1
    for position, view in enumerate(below):
        is_last = position == len(below) - 1
        branch = ("└─ " if is_last else "├─ ") if forks else ""
        yield f"{indent}{branch}", view
        if view is not None:
            yield from _lines(tree, view.id, known, indent + (("   " if is_last else "│  ") if forks else ""))


def _kind(view: CheckpointView) -> str:
    if not view.is_ready:
        return "being made"
    return view.consistency


def merge_line(merge: MergeView) -> str:
    """`disk0: merging web-1a2b.avhd into web.vhd: 40 % of 2 GiB at 64 MiB/s`."""
    what = f"{merge.disk}: merging {_name(merge.upper)} into {_name(merge.lower)}"
    if merge.reason:
        return f"{what}: waits: {printable(merge.reason)}"
    if not merge.total_bytes:
        return f"{what}: {merge.state}"
    share = merge.done_bytes / merge.total_bytes
    limit = "" if merge.limit_bytes_per_s is None else f" ({rate_words(merge.limit_bytes_per_s)})"
    return f"{what}: {share:.0%} of {format_size(merge.total_bytes)} at {format_size(merge.bytes_per_s)}/s{limit}"


def rate_words(rate: int) -> str:
    """`at most 64 MiB/s`."""
    return f"at most {format_size(rate)}/s" if rate else "no limit"


def details(view: CheckpointView) -> str:
    """Everything about a checkpoint."""
    return fields(
        [
            ("name", printable(view.name)),
            ("id", view.id),
            ("partition", view.partition),
            ("description", printable(view.description)),
            ("made", view.created_at),
            ("by schedule", view.schedule),
            ("kind", _kind(view)),
            ("memory", _memory(view)),
            ("present", "was made from it" if view.is_present else ""),
            (
                "disks",
                "\n".join(
                    f"{disk.id}: {printable(disk.path)} ({format_size(disk.size_bytes)}, holds "
                    f"{format_size(disk.held_bytes)})"
                    for disk in view.disks
                ),
            ),
        ]
    )


def _memory(view: CheckpointView) -> str:
    if not view.has_memory:
        return ""
    if view.is_live:
        return "kept; the guest ran on while it was written"
    why = f": {printable(view.stood_still_because)}" if view.stood_still_because else ""
    return f"kept; the guest stood still while it was written{why}"


def _name(path: str) -> str:
    return printable(os.path.basename(path))
