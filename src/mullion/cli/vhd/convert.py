"""`mullion vhd convert`, `mullion vhd flatten` and `mullion vhd clone`: a disk's content in a new file."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

import click

from mullion.base.errors import InvalidError
from mullion.base.units import format_size
from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command
from mullion.cli.values import SizeType
from mullion.cli.vhd.meter import metered
from mullion.cli.vhd.options import (
    DISK,
    allow_option,
    allowed_dirs,
    check_name,
    disk_option,
    from_option,
    size_from_option,
)

if TYPE_CHECKING:
    from mullion.media.source import OpenSource
    from mullion.vhd.copying import TargetKind

_Command = TypeVar("_Command", bound=Callable[..., object])

_NOTHING_LEFT: Final = "Nothing was left behind: run it again to begin anew."
_RAW_NAMES: Final = (".img", ".raw")
_STANDARD_OUTPUT: Final = "-"


def _target_options(command: _Command) -> _Command:
    for option in (
        click.option("--force", is_flag=True, help="Replace the file that is there, if nobody uses it."),
        click.option("--verify", is_flag=True, help="Read the new file back and compare it before it gets its name."),
        click.option("--block-size", type=SizeType(), metavar="SIZE", help="Of a dynamic disk: 2M (default), or 512K."),
        click.option(
            "--to",
            "kind",
            type=click.Choice(["fixed", "dynamic", "raw"]),
            help="What DST is to be: dynamic, or raw when its name ends in .img or .raw.",
        ),
    ):
        command = option(command)
    return command


@click.command("convert", cls=Command, short_help="Copy a disk of any format into a new VHD or raw file.")
@click.argument("source", metavar="SRC", type=DISK)
@click.argument("target", metavar="DST", type=DISK)
@_target_options
@from_option
@disk_option
@size_from_option
@allow_option
@pass_face
def convert(
    face: Face,
    *,
    source: str,
    target: str,
    kind: str | None,
    block_size: int | None,
    verify: bool,
    force: bool,
    source_format: str | None,
    member: str | None,
    size_source: str,
    allow: tuple[str, ...],
) -> None:
    """Copy a disk of any format into a new VHD or raw file.

    SRC is a VHD, which is read with its parents, a raw file, a VHDX, VMDK, QCOW2, VDI or OVA; what it is, its content
    says. DST has the same size and content, and room only for what is not zero. It is there when it is whole, or not at
    all. DST may be a pipe, or - for standard output: then it is raw, or fixed.

    \b
    Examples:
      mullion vhd convert fixed.vhd dynamic.vhd
      mullion vhd convert child.vhd whole.img --verify
      mullion vhd convert base.vhd - --to raw | sha256sum
    """
    _copy(
        face, "convert", source, target, kind, block_size=block_size, verify=verify, force=force,
        source_format=source_format, member=member, size_source=size_source, allow=allow,
    )  # fmt: skip


@click.command("flatten", cls=Command, short_help="Copy a chain into one file without parents.")
@click.argument("source", metavar="CHAIN", type=DISK)
@click.argument("target", metavar="DST", type=DISK)
@_target_options
@size_from_option
@allow_option
@pass_face
def flatten(
    face: Face,
    *,
    source: str,
    target: str,
    kind: str | None,
    block_size: int | None,
    verify: bool,
    force: bool,
    size_source: str,
    allow: tuple[str, ...],
) -> None:
    """Copy a chain into one file without parents: what CHAIN, its topmost file, shows as a disk.

    The files of the chain stay as they are. DST is a new dynamic disk unless --to says otherwise.

    \b
    Examples:
      mullion vhd flatten grandchild.vhd whole.vhd
      mullion vhd flatten child.vhd whole.vhd --to fixed --verify
    """
    _copy(
        face, "flatten", source, target, kind or "dynamic", block_size=block_size, verify=verify, force=force,
        source_format="vhd", size_source=size_source, allow=allow,
    )  # fmt: skip


@click.command("clone", cls=Command, short_help="Copy a disk file as it is, with an identity of its own.")
@click.argument("source", metavar="SRC", type=DISK)
@click.argument("target", metavar="DST", type=DISK)
@click.option("--force", is_flag=True, help="Replace the file that is there, if nobody uses it.")
@allow_option
@pass_face
def clone(face: Face, *, source: str, target: str, force: bool, allow: tuple[str, ...]) -> None:
    """Copy a disk file as it is, with an identity of its own: the same type and content, another unique id.

    A child's clone is a child of the same parent, wherever the clone lies. Where the filesystem can share room between
    files (XFS, Btrfs) it takes no time and no room.

    \b
    Examples:
      mullion vhd clone base.vhd copy.vhd
      mullion vhd clone child.vhd old-parent-moved/second.vhd
    """
    from mullion.vhd.cloning import clone_disk

    check_name(target)
    with metered(face, "clone", after=_NOTHING_LEFT) as progress:
        made = clone_disk(
            source, target, allowed_dirs=allowed_dirs(source, allow), replace_target=force, progress=progress
        )
    if face.is_json:
        face.emit_json({"path": target, "unique_id": made.unique_id.hex(), "shared": made.is_shared})
    else:
        shares = ", shares its room until one of the two is written" if made.is_shared else ""
        face.note(f"{target}: clone of {source}, id {made.unique_id.hex()}{shares}")


def _copy(
    face: Face,
    title: str,
    source: str,
    target: str,
    kind_word: str | None,
    *,
    block_size: int | None,
    verify: bool,
    force: bool,
    source_format: str | None,
    size_source: str,
    allow: tuple[str, ...],
    member: str | None = None,
) -> None:
    from mullion.media.source import open_source
    from mullion.vhd.copying import TargetKind, check_target, copy_disk
    from mullion.vhd.geometry import SizeFrom

    is_stream = target == _STANDARD_OUTPUT or _is_pipe(target)
    kind = TargetKind(kind_word or _kind_for(target, is_stream=is_stream))
    if is_stream:
        _check_stream(kind, block_size, verify=verify)
    else:
        check_name(target)
        check_target(target, [source], replace=force)  # before a foreign disk is opened, which may take long
    folders, size_from = allowed_dirs(source, allow), SizeFrom(size_source)
    with open_source(
        source, source_format=source_format, allowed_dirs=folders, disk=member, size_from=size_from
    ) as disk:
        for warning in disk.warnings:
            face.note(f"warning: {warning}")
        if is_stream:
            _stream(face, title, disk, target, kind)
            return
        with metered(face, title, after=_NOTHING_LEFT) as progress:
            made = copy_disk(
                disk.device,
                target,
                kind,
                block_bytes=block_size,
                keep_from=disk.paths,
                replace=force,
                verify=verify,
                progress=progress,
            )
    if face.is_json:
        face.emit_json(
            {
                "path": target,
                "type": kind.value,
                "source_format": disk.format,
                "size_bytes": made.size_bytes,
                "data_bytes": made.data_bytes,
                "padding_bytes": made.padding_bytes,
                "verified": made.verified,
            }
        )
        return
    if made.padding_bytes:
        face.note(f"{source} is no multiple of 512 bytes: {made.padding_bytes} zero bytes were added at its end")
    checked = ", read back and compared" if made.verified else ""
    face.note(
        f"{target}: {kind.value}, {format_size(made.size_bytes)} ({made.size_bytes} bytes), "
        f"{format_size(made.data_bytes)} of data from {_described(disk)}{checked}"
    )


def _described(disk: OpenSource) -> str:
    if len(disk.paths) > 1:
        return f"a chain of {len(disk.paths)} files"
    return {"vhd": "a VHD", "raw": "a raw file", "ova": "an OVA"}.get(disk.format, f"a {disk.format.upper()}")


def _kind_for(target: str, *, is_stream: bool) -> str:
    return "raw" if is_stream or target.lower().endswith(_RAW_NAMES) else "dynamic"


def _is_pipe(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False


def _check_stream(kind: TargetKind, block_size: int | None, *, verify: bool) -> None:
    from mullion.vhd.copying import TargetKind

    if kind is TargetKind.DYNAMIC:
        raise InvalidError(
            "a dynamic disk cannot be written into a pipe: its table comes before what it describes",
            remedy="Say --to raw or --to fixed, or name a file.",
        )
    if block_size is not None:
        raise InvalidError(f"a {kind.value} disk has no blocks", remedy="Leave --block-size out.")
    if verify:
        raise InvalidError("what went into a pipe cannot be read back", remedy="Leave --verify out, or name a file.")


def _stream(face: Face, title: str, disk: OpenSource, target: str, kind: TargetKind) -> None:
    from mullion.vhd.storage import storage_explained
    from mullion.vhd.streaming import stream_disk

    if target == _STANDARD_OUTPUT:
        refuse_terminal()
        fd = os.dup(sys.stdout.fileno())
    else:
        fd = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
    try:
        with metered(face, title, after="The reader got only a part.") as progress, storage_explained(target):
            stream_disk(disk.device, fd, kind, progress=progress)
    finally:
        os.close(fd)


def refuse_terminal() -> None:
    """Raises: InvalidError when standard output is a terminal: a disk's bytes would wreck it."""
    if sys.stdout.isatty():
        raise InvalidError(
            "a disk's content is not for a terminal", remedy="Send it to a file or a program with > or |."
        )
