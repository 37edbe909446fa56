"""`mullion vhd diff`."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from mullion.base.errors import InvalidError
from mullion.base.progress import no_progress
from mullion.base.units import format_size
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command
from mullion.cli.vhd.meter import metered
from mullion.cli.vhd.options import DISK, allow_option, allowed_dirs

if TYPE_CHECKING:
    from mullion.vhd.diff import Change


@click.command("diff", cls=Command, short_help="List the ranges of a disk that changed, or in which two disks differ.")
@click.argument("path", type=DISK)
@click.argument("other", type=DISK, required=False)
@click.option(
    "--since", metavar="ANCESTOR", type=DISK, help="A disk of the chain of PATH: what changed in the layers above it."
)
@allow_option
@pass_face
def diff(face: Face, *, path: str, other: str | None, since: str | None, allow: tuple[str, ...]) -> None:
    """List the ranges of a disk that changed, or in which two disks differ.

    Of one disk: what its file alone holds, or with --since what the layers above ANCESTOR hold, exact to the sector and
    without reading any content. Of two disks: where their contents differ; what both have from the same file is not
    read, and past the end of the shorter one it reads as zeros.

    Offsets and lengths are in bytes of the disk. `zero` says that a range is known to read as zeros, in PATH or in
    OTHER. With --format json: a list of {offset, length, zero}, ascending.

    \b
    Examples:
      mullion vhd diff child.vhd
      mullion vhd diff grandchild.vhd --since base.vhd --format json
      mullion vhd diff base.vhd fixed.vhd
    """
    from mullion.vhd.diff import changed, differences
    from mullion.vhd.storage import storage_explained

    if other is not None and since is not None:
        raise InvalidError(
            "two disks and --since exclude each other",
            remedy="Leave out OTHER, or --since: see mullion vhd diff --help.",
        )
    folders = [*allow, os.path.dirname(os.path.realpath(other))] if other is not None and allow else allow
    allowed = allowed_dirs(path, folders)
    with storage_explained(path), metered(face, "diff", after="Nothing was changed.") as progress:
        if other is None:
            changes = changed(path, since=since, allowed_dirs=allowed)
        else:
            changes = differences(
                path, other, allowed_dirs=allowed, progress=no_progress if sys.stdout.isatty() else progress
            )
        (_print_json if face.is_json else _print_table)(face, changes)


def _print_json(face: Face, changes: Iterator[Change]) -> None:
    """One line a range, as they are found: a disk may have millions."""
    before = "["
    for offset, length, zero in changes:
        face.say(f'{before}{{"offset": {offset}, "length": {length}, "zero": {"true" if zero else "false"}}}')
        before = ","
    face.say("]" if before == "," else "[]")


def _print_table(face: Face, changes: Iterator[Change]) -> None:
    first = list(itertools.islice(changes, 1))  # what refuses the disk comes before the heading
    face.say(f"{'OFFSET':>15} {'LENGTH':>15}  KIND")
    ranges, total, zeros = 0, 0, 0
    for offset, length, zero in itertools.chain(first, changes):
        face.say(f"{offset:>15} {length:>15}  {'zero' if zero else 'data'}")
        ranges, total, zeros = ranges + 1, total + length, zeros + (length if zero else 0)
    face.note(f"{ranges} ranges, {format_size(total)} ({total} bytes), of it {format_size(zeros)} zeros")
