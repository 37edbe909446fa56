"""`mullion disk`: virtual hard disks in the pool or anywhere else on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mullion.base.errors import InvalidError
from mullion.base.units import format_size
from mullion.cli import complete
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Group
from mullion.cli.progress import conclude, wait_option
from mullion.cli.values import SizeType, disk_path, parent_path

if TYPE_CHECKING:
    from mullion.model.views import DiskView, OperationView


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


@disk.command("resize")
@click.argument("partition", shell_complete=complete.partitions)
@click.argument("disk_id", metavar="DISK")
@click.argument("size", type=SizeType(), metavar="SIZE")
@wait_option
@pass_face
def resize_disk(face: Face, partition: str, disk_id: str, size: int, wait: bool) -> None:
    """Make a disk of a running partition larger; the guest sees it at once.

    DISK is the id in the definition, such as disk0. Partitions and file systems on it are the guest's to grow. The disk
    of a stopped partition is resized with `mullion vhd resize`.

    \b
    Examples:
      mullion disk resize web disk0 60G
    """

    def sentence(operation: OperationView) -> str:
        result = operation.result or {}
        return f"{partition}: {disk_id} has {format_size(size)} now; {result.get('note', '')}"

    conclude(face, face.client.resize_disk(partition, disk_id, size), wait=wait, sentence=sentence)


@disk.command("limit")
@click.argument("partition", shell_complete=complete.partitions)
@click.argument("disk_id", metavar="[DISK]", required=False)
@click.option("--iops", type=click.IntRange(min=0), help="Requests a second, reads and writes together.")
@click.option("--read-iops", type=click.IntRange(min=0), help="Reads a second.")
@click.option("--write-iops", type=click.IntRange(min=0), help="Writes a second.")
@click.option("--bandwidth", type=SizeType(), metavar="SIZE", help="Bytes a second, such as 10M.")
@click.option("--read-bandwidth", type=SizeType(), metavar="SIZE", help="Bytes read a second.")
@click.option("--write-bandwidth", type=SizeType(), metavar="SIZE", help="Bytes written a second.")
@click.option(
    "--burst-iops", type=click.IntRange(min=0), help="So many a second for a while, after a time below --iops."
)
@click.option("--burst-bandwidth", type=SizeType(), metavar="SIZE", help="The same for --bandwidth.")
@click.option(
    "--burst-seconds", type=click.FloatRange(min=0, min_open=True, max=3600), help="How long a burst may last."
)
@click.option("--none", "without", is_flag=True, help="Take all caps away.")
@pass_face
def limit_disk(face: Face, /, *, partition: str, disk_id: str | None, without: bool, **given: float | None) -> None:
    """Cap the requests and bytes of a partition's disk, or of all its disks together.

    DISK is the id in the definition, such as disk0. The caps given replace those that are there; they hold at once if
    the partition runs, and stay in its definition.

    \b
    Examples:
      mullion disk limit web disk0 --iops 500 --burst-iops 2000 --burst-seconds 10
      mullion disk limit web --bandwidth 50M
      mullion disk limit web disk0 --none
    """
    from mullion.cli.disk_limits import change_limits, limits_words

    names = {
        "iops": "iops",
        "read_iops": "read_iops",
        "write_iops": "write_iops",
        "bandwidth": "bytes_per_s",
        "read_bandwidth": "read_bytes_per_s",
        "write_bandwidth": "write_bytes_per_s",
        "burst_iops": "iops_burst",
        "burst_bandwidth": "bytes_per_s_burst",
        "burst_seconds": "burst_s",
    }
    fields = {names[option]: value for option, value in given.items() if value is not None}
    if bool(fields) is without:
        raise click.UsageError("give at least one cap, or --none to take all away")
    view = change_limits(face.client, partition, disk_id, fields)
    if face.is_json:
        face.emit_json(view)
        return
    for disk in view.definition.disks:
        if disk_id in (None, disk.id) and (disk.limits is not None or disk_id is not None):
            face.say(f"{partition}: {disk.id}: {limits_words(disk.limits)}")
    if disk_id is None:
        face.say(f"{partition}: all disks together: {limits_words(view.definition.disk_limits)}")


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
