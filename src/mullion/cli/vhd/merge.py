"""`mullion vhd merge`."""

from __future__ import annotations

import click

from mullion.base.units import format_size
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command
from mullion.cli.vhd.meter import metered
from mullion.cli.vhd.options import DISK, allow_option, allowed_dirs


@click.command("merge", cls=Command, short_help="Merge a differencing disk into its parent, or a range of a chain.")
@click.argument("top", type=DISK)
@click.option(
    "--from", "from_path", metavar="LAYER", type=DISK, help="The uppermost layer that is merged; TOP, if not given."
)
@click.option(
    "--into", "into_path", metavar="LAYER", type=DISK, help="The layer that gets the content; else the next one below."
)
@click.option("--keep", is_flag=True, help="Do not remove the merged file; for a single layer.")
@allow_option
@pass_face
def merge(
    face: Face, *, top: str, from_path: str | None, into_path: str | None, keep: bool, allow: tuple[str, ...]
) -> None:
    """Merge a differencing disk into its parent, or a range of a chain.

    TOP is the uppermost disk of the chain. What it and the layers hold, from LAYER of --from down to right above LAYER
    of --into, is written into the latter; then their files are removed. Where TOP itself is merged, the disk is read
    through the file that it was merged into from then on.

    The content stays the same at every instant. After ^C, an error or a power cut nothing is lost: give the same
    command again and it goes on. Refused while anybody uses one of these files, and when another disk is a child of
    one that would change.

    \b
    Examples:
      mullion vhd merge grandchild.vhd
      mullion vhd merge grandchild.vhd --from child.vhd --into base.vhd
      mullion vhd merge grandchild.vhd --keep
    """
    from mullion.vhd.merge import merge as merge_layers

    with metered(face, "merge", after="Nothing is lost: give the same command again and it goes on.") as progress:
        report = merge_layers(
            top,
            from_path=from_path,
            into_path=into_path,
            keep=keep,
            allowed_dirs=allowed_dirs(top, allow),
            progress=progress,
        )
    for note in report.notes:
        face.note(note)
    if face.is_json:
        face.emit_json(
            {
                "disk": report.disk,
                "into": report.into,
                "merged": report.merged,
                "removed": report.removed,
                "copied_bytes": report.copied_bytes,
                "resumed": report.resumed,
            }
        )
        return
    if report.resumed:
        face.note("an earlier merge had not come to its end: resumed")
    face.note(f"{', '.join(report.merged)}: merged into {report.into} ({format_size(report.copied_bytes)} copied)")
    if report.removed:
        face.note(f"removed: {', '.join(report.removed)}")
    face.note(f"the disk is {report.disk}")
