"""`mullion disk`: virtual hard disks in the pool or anywhere else on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mullion.base.errors import InvalidError
from mullion.base.units import format_size
from mullion.cli import complete
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Group
from mullion.cli.values import SizeType, disk_path, parent_path

if TYPE_CHECKING:
    from mullion.model.views import DiskView


@click.group(cls=Group, short_help="Create and look at virtual hard disks (VHD).")
def disk() -> None:
    """Create and look at virtual hard disks (VHD).

    A DISK is a name in the service's pool (`web` is web.vhd there) or, with a slash, a path.
    """


@disk.command("list")
@pass_face
def list_disks(face: Face) -> None:
    """List the disks in the pool."""
    views = face.client.disks()
    if face.is_json:
        face.emit_json(views)
        return
    from mullion.cli.tables import NOTHING, table

    if not views:
        face.note(f"No disks. Create one: {face.command('disk', 'create', 'web', '--size', '40G')}")
        return
    rows = [
        (v.name, v.type, format_size(v.size_bytes), format_size(v.file_bytes), str(len(v.chain)), v.holder or NOTHING)
        for v in views
    ]
    face.say(table(("NAME", "TYPE", "SIZE", "FILE", "CHAIN", "HELD BY"), rows, right=(2, 3, 4)))


@disk.command("show")
@click.argument("name", metavar="DISK", shell_complete=complete.disks)
@pass_face
def show_disk(face: Face, name: str) -> None:
    """Show a disk and the files of its chain."""
    view = face.client.disk(disk_path(name))
    if face.is_json:
        face.emit_json(view)
    else:
        face.say(render(face, view))


@disk.command("create")
@click.argument("name", metavar="DISK")
@click.option(
    "--size", type=SizeType(), metavar="SIZE", help="What the guest sees, such as 40G; a child has its parent's."
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(["dynamic", "fixed"]),
    help="A file that grows with use (default), or one as long as the disk; sparse: space is taken when written.",
)
@click.option("--block-size", type=SizeType(), metavar="SIZE", help="The unit in which a dynamic disk grows.")
@click.option(
    "--parent", metavar="DISK|image:NAME", help="Make a differencing disk: it holds what differs from this one."
)
@pass_face
def create_disk(
    face: Face, *, name: str, size: int | None, kind: str | None, block_size: int | None, parent: str | None
) -> None:
    """Create a disk: dynamic, fixed, or differencing (with --parent)."""
    if parent is None and size is None:
        raise click.UsageError("missing option '--size' (or '--parent', whose size a child has)")
    if parent is not None and kind is not None:
        raise InvalidError("--type and --parent exclude each other", remedy="A disk with a parent is differencing.")
    view = face.client.create_disk(
        path=disk_path(name),
        size_bytes=size,
        type=kind or "dynamic",
        parent=parent_path(parent) if parent is not None else None,
        block_bytes=block_size,
    )
    if face.is_json:
        face.emit_json(view)
    else:
        face.say(render(face, view))


def render(face: Face, view: DiskView) -> str:
    from mullion.cli.tables import fields, printable, table

    facts = fields(
        [
            ("disk", view.name),
            ("path", view.path),
            ("type", view.type),
            ("size", f"{format_size(view.size_bytes)} ({view.size_bytes} bytes)"),
            ("file", format_size(view.file_bytes)),
            ("allocated", format_size(view.allocated_bytes)),
            ("held by", view.holder or ""),
            ("warnings", "\n".join(face.style(printable(warning), "yellow") for warning in view.warnings)),
        ]
    )
    if len(view.chain) < 2:
        return facts
    rows = [
        (
            str(depth),
            file.type,
            format_size(file.file_bytes),
            "read only" if file.read_only else "writable",
            printable(file.path),
        )
        for depth, file in enumerate(view.chain)
    ]
    return f"{facts}\n\n{table(('DEPTH', 'TYPE', 'FILE', 'ACCESS', 'PATH'), rows, right=(0, 2))}"
