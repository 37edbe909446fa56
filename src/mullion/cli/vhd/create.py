"""`mullion vhd create`."""

from __future__ import annotations

import click

from mullion.base.errors import InvalidError
from mullion.base.units import MIB, format_size
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command
from mullion.cli.values import SizeType
from mullion.cli.vhd.options import DISK, align_option, aligned, check_name


@click.command("create", cls=Command, short_help="Create a fixed, dynamic or differencing disk.")
@click.argument("path", type=DISK)
@click.option(
    "--size", type=SizeType(), metavar="SIZE", help="What a guest sees, such as 40G; a child has its parent's."
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(["dynamic", "fixed"]),
    help="A file that grows with use (default), or one as long as the disk, sparse.",
)
@click.option("--block-size", type=SizeType(), metavar="SIZE", help="The unit in which a disk grows: 2M, or 512K.")
@click.option(
    "--parent", type=DISK, metavar="PARENT", help="Make a differencing disk: it holds what differs from this."
)
@align_option
@pass_face
def create(
    face: Face, *, path: str, size: int | None, kind: str | None, block_size: int | None, parent: str | None, align: int
) -> None:
    """Create a fixed, dynamic or differencing disk: of exactly the size asked for, whole or not at all.

    \b
    Examples:
      mullion vhd create new.vhd --size 40G
      mullion vhd create new-fixed.vhd --size 64M --type fixed
      mullion vhd create new-child.vhd --parent base.vhd
    """
    from mullion.vhd import create_differencing, create_dynamic, create_fixed, inspect_chain
    from mullion.vhd.storage import storage_explained

    if parent is None and size is None:
        raise click.UsageError("missing option '--size' (or '--parent', whose size a child has)")
    if parent is not None and kind is not None:
        raise InvalidError("--type and --parent exclude each other", remedy="A disk with a parent is differencing.")
    if kind == "fixed" and block_size is not None:
        raise InvalidError("a fixed disk has no blocks", remedy="Leave --block-size out, or say --type dynamic.")
    check_name(path)
    if size is not None:
        size = aligned(face, size, align)
    with storage_explained(path):
        if parent is not None:
            create_differencing(path, parent, size_bytes=size, block_bytes=block_size)
        elif kind == "fixed":
            assert size is not None
            create_fixed(path, size)
        else:
            assert size is not None
            create_dynamic(path, size, block_bytes=2 * MIB if block_size is None else block_size)
    info = inspect_chain(path).files[0]
    if face.is_json:
        face.emit_json({"path": path, "type": info.type.word, "size_bytes": info.size_bytes})
    else:
        face.note(f"{path}: {info.type.word}, {format_size(info.size_bytes)} ({info.size_bytes} bytes)")
