"""`mullion vhd mount` and `mullion vhd unmount`."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import click

from mullion.cli.face import Face, pass_face
from mullion.cli.lazy import Command
from mullion.cli.vhd.options import DISK, allow_option, allowed_dirs, size_from_option

if TYPE_CHECKING:
    from mullion.media.mount import MountSpec

_LOG_NAME_CHARS: Final = 200


@click.command("mount", cls=Command, short_help="Mount a disk as a folder: its raw content, and its partitions.")
@click.argument("path", type=DISK)
@click.argument("mountpoint", type=DISK)
@click.option("--writable", is_flag=True, help="Let programs write to the disk; without it they can only read.")
@click.option("--foreground", is_flag=True, help="Stay until it is unmounted or ^C, instead of in the background.")
@click.option("--allow-other", is_flag=True, help="Let other users in; for all but root /etc/fuse.conf must permit it.")
@size_from_option
@allow_option
@pass_face
def mount(
    face: Face,
    *,
    path: str,
    mountpoint: str,
    writable: bool,
    foreground: bool,
    allow_other: bool,
    size_source: str,
    allow: tuple[str, ...],
) -> None:
    """Mount a disk as a folder: its raw content, and its partitions.

    MOUNTPOINT gets disk.raw, and partition1.raw and so on where the disk has a partition table; the folder is made when
    it is missing. The command returns when the mount works, and leaves a process that `mullion vhd unmount` ends.

    \b
    Examples:
      mullion vhd mount child.vhd mnt && cmp mnt/disk.raw mnt/disk.raw && mullion vhd unmount mnt
    """
    from mullion.media.mount import MountSpec, resolve_mountpoint, start_mount

    folder = resolve_mountpoint(mountpoint)
    allowed = allowed_dirs(path, allow)
    folders = None if allowed is None else tuple(allowed)
    spec = MountSpec(os.path.abspath(path), folder, writable, allow_other, folders, size_source)
    if foreground:
        _stay(face, spec)
        return
    log_name = f"{quote(folder, safe='')[-_LOG_NAME_CHARS:]}.log"
    start_mount(spec, log_path=f"{face.paths.run_dir}/mounts/{log_name}")
    if face.is_json:
        face.emit_json({"mountpoint": folder, "files": sorted(os.listdir(folder)), "writable": writable})
    else:
        names = " ".join(sorted(os.listdir(folder)))
        face.note(
            f"{path} is mounted on {mountpoint}: {names}\nEnd it with: mullion vhd unmount {shlex.quote(mountpoint)}"
        )


def _stay(face: Face, spec: MountSpec) -> None:
    """Answer for the mount in this process."""
    from mullion.base import log
    from mullion.base.errors import UnavailableError
    from mullion.media.mount import fuse_remedy, prepare_mountpoint
    from mullion.media.mount_process import serve_mount
    from mullion.vhd.storage import storage_explained

    def ready(warnings: list[str]) -> None:
        for warning in warnings:
            face.note(f"note: {warning}")
        face.note(f"{spec.path} is mounted on {spec.mountpoint}. ^C ends it.")

    log.set_up("warning")
    prepare_mountpoint(spec.mountpoint)
    try:
        with storage_explained(spec.path):
            serve_mount(spec, ready)
    except RuntimeError as error:
        raise UnavailableError(
            f"{spec.path} could not be mounted on {spec.mountpoint}", remedy=fuse_remedy(), path=spec.path
        ) from error


@click.command("unmount", cls=Command, short_help="Flush and unmount a disk that was mounted.")
@click.argument("mountpoint", type=DISK)
@pass_face
def unmount(face: Face, *, mountpoint: str) -> None:
    """Flush and unmount a disk that was mounted.

    It returns when the disk is written and closed, and free for others. What is left of a mount whose process was
    killed is cleared away.

    \b
    Examples:
      mullion vhd mount base.vhd mnt; mullion vhd unmount mnt
    """
    from mullion.media.mount import unmount as unmount_disk

    unmount_disk(os.path.realpath(mountpoint))
    face.note(f"{mountpoint} is unmounted")
