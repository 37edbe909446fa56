"""`mullion vhd resize`, `compact` and `rebase`: the file changes, what a guest sees stays, or grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mullion.base.units import format_size
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command
from mullion.cli.values import SizeType
from mullion.cli.vhd.meter import metered
from mullion.cli.vhd.options import DISK, align_option, aligned, allow_option, allowed_dirs

if TYPE_CHECKING:
    from mullion.vhd.compact import FindFree
    from mullion.vhd.resize import Resized


@click.command("resize", cls=Command, short_help="Make a disk larger, or smaller where it is empty.")
@click.argument("path", type=DISK)
@click.option("--size", required=True, type=SizeType(), metavar="SIZE", help="What a guest is to see, such as 80G.")
@align_option
@click.option("--force", is_flag=True, help="Let a disk grow on which others were made.")
@allow_option
@pass_face
def resize(face: Face, *, path: str, size: int, align: int, force: bool, allow: tuple[str, ...]) -> None:
    """Make a disk larger, or smaller where it is empty.

    New room reads as zeros. A disk gets smaller only when what is cut off holds nothing and no partition reaches into
    it; otherwise it is said how far it can shrink. A GPT has its backup at the disk's end: it is moved there, and no
    filesystem is changed: let the guest grow its partition. An MBR needs nothing.

    The size of a disk on which others were made must not change; --force lets it grow, its content stays as it is then.
    After ^C or a power cut the disk has its old size or the new one: give the same command again and it goes on.

    \b
    Examples:
      mullion vhd resize files.vhd --size 80G
      mullion vhd resize fixed.vhd --size 50M
      mullion vhd resize grandchild.vhd --size 41943552 --align 512
    """
    from mullion.vhd.resize import resize as resize_disk

    size = aligned(face, size, align)
    with metered(face, "resize", after="The disk is sound: give the same command again and it goes on.") as progress:
        done = resize_disk(path, size, force=force, allowed_dirs=allowed_dirs(path, allow), progress=progress)
    if face.is_json:
        face.emit_json(
            {
                "path": done.path,
                "old_size_bytes": done.old_bytes,
                "size_bytes": done.size_bytes,
                "partition_table": done.table,
                "table_problem": done.table_problem,
            }
        )
        return
    if done.old_bytes == done.size_bytes:
        face.note(f"{path}: has {format_size(done.size_bytes)} ({done.size_bytes} bytes) already")
    else:
        face.note(f"{path}: {format_size(done.old_bytes)} -> {format_size(done.size_bytes)} ({done.size_bytes} bytes)")
    if says := _about_table(done):
        face.note(says)


def _about_table(done: Resized) -> str | None:
    match done.table:
        case "gpt":
            return "partition table: GPT; its backup is at the end of the disk"
        case "gpt-left":
            return (
                f"partition table: GPT, left as it is: {done.table_problem}. Its backup has to be moved to the end, in "
                f"the guest: sgdisk -e /dev/DISK"
            )
        case "mbr":
            return "partition table: MBR, which has nothing at the end of the disk"
        case _:
            return None


@click.command("compact", cls=Command, short_help="Make a disk's file as short as its content allows.")
@click.argument("path", type=DISK)
@click.option(
    "--free-space", is_flag=True, help="Give up what no filesystem of the disk uses (NTFS, FAT, exFAT, ext2 to ext4)."
)
@click.option(
    "--against-parent", is_flag=True, help="Of a differencing disk, take out blocks that read the same in its parent."
)
@click.option("--force", is_flag=True, help="With --free-space, also when other disks were made on this one.")
@allow_option
@pass_face
def compact(
    face: Face, *, path: str, free_space: bool, against_parent: bool, force: bool, allow: tuple[str, ...]
) -> None:
    """Make a disk's file as short as its content allows.

    Blocks of zeros are taken out of a dynamic disk, and of a differencing disk those that hold nothing; the last blocks
    fill their places, and the file is cut. A fixed disk keeps its length, but zeros take no room on the filesystem any
    more. The content stays the same, but for --free-space: what no file uses reads as anything afterwards. A volume
    counts as used whole when its filesystem is not known, or was not unmounted; it is said then.

    After ^C or a power cut the disk is sound and complete: give the same command again and it goes on.

    \b
    Examples:
      mullion vhd compact base.vhd
      mullion vhd compact files.vhd --free-space
      mullion vhd compact grandchild.vhd --against-parent
    """
    from mullion.vhd.compact import compact as compact_disk

    with metered(face, "compact", after="The disk is sound: give the same command again and it goes on.") as progress:
        done = compact_disk(
            path,
            find_free=_find_free(face) if free_space else None,
            against_parent=against_parent,
            force=force,
            allowed_dirs=allowed_dirs(path, allow),
            progress=progress,
        )
    if face.is_json:
        face.emit_json(
            {
                "path": done.path,
                "old_file_bytes": done.old_file_bytes,
                "file_bytes": done.file_bytes,
                "old_room_bytes": done.old_room_bytes,
                "room_bytes": done.room_bytes,
                "blocks_removed": done.blocks_removed,
                "blocks_moved": done.blocks_moved,
            }
        )
        return
    face.note(
        f"{path}: {format_size(done.old_file_bytes)} -> {format_size(done.file_bytes)}, of it on the filesystem "
        f"{format_size(done.old_room_bytes)} -> {format_size(done.room_bytes)} "
        f"({done.blocks_removed} blocks removed, {done.blocks_moved} moved)"
    )


def _find_free(face: Face) -> FindFree:
    from mullion.media.filesystems.freespace import free_extents_of

    return lambda device: free_extents_of(device, doubt=lambda text: face.note(f"counts as used: {text}"))


@click.command("rebase", cls=Command, short_help="Give a differencing disk another parent, or its parent's new path.")
@click.argument("child", type=DISK)
@click.option("--parent", required=True, type=DISK, metavar="PARENT", help="The disk that is the parent from now on.")
@click.option("--unsafe", is_flag=True, help="Change the name alone: what the child reads is what PARENT has then.")
@allow_option
@pass_face
def rebase(face: Face, *, child: str, parent: str, unsafe: bool, allow: tuple[str, ...]) -> None:
    """Give a differencing disk another parent, or its parent's new path.

    When PARENT is the same disk at another path, only names change. Otherwise the old parents are read too, and what
    they have and PARENT has not is copied into CHILD first: CHILD reads the same before, afterwards and at every
    instant between. After ^C or a power cut give the same command again and it goes on.

    To make a disk without any parent: mullion vhd flatten.

    \b
    Examples:
      mullion vhd rebase grandchild.vhd --parent base.vhd
      mullion vhd rebase child.vhd --parent base.vhd
      mullion vhd rebase child.vhd --parent fixed.vhd --unsafe
    """
    from mullion.vhd.rebase import rebase as rebase_disk

    after = "The disk is sound, over its old parent: give the same command again and it goes on."
    with metered(face, "rebase", after=after) as progress:
        done = rebase_disk(child, parent, unsafe=unsafe, allowed_dirs=allowed_dirs(child, allow), progress=progress)
    if face.is_json:
        face.emit_json(
            {
                "path": done.path,
                "parent": done.parent,
                "is_same_disk": done.is_same_disk,
                "copied_bytes": done.copied_bytes,
            }
        )
        return
    if done.is_same_disk:
        face.note(f"{child}: finds its parent at {parent} now")
    elif unsafe:
        face.note(f"{child}: has the parent {parent} now; nothing was compared")
    else:
        face.note(f"{child}: has the parent {parent} now; {format_size(done.copied_bytes)} copied into it")
