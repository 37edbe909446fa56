"""`mullion vhd`: virtual hard disks as files, without the service.

The table of commands is here; each lives in a module of this folder that is imported when it is called.
"""

from __future__ import annotations

import os
from typing import Final

import click

from mullion.cli.lazy import Entry, LazyGroup

ENTRIES: Final = {
    "create": Entry("mullion.cli.vhd.create:create", "Create a fixed, dynamic or differencing disk."),
    "convert": Entry("mullion.cli.vhd.convert:convert", "Copy a disk of any format into a new VHD or raw file."),
    "flatten": Entry("mullion.cli.vhd.convert:flatten", "Copy a chain into one file without parents."),
    "clone": Entry("mullion.cli.vhd.convert:clone", "Copy a disk file as it is, with an identity of its own."),
    "hash": Entry(
        "mullion.cli.vhd.content:hash_disks", "Print the SHA-256 of disks' contents, whatever files they are in."
    ),
    "read": Entry("mullion.cli.vhd.content:read", "Print bytes of a disk's content to standard output."),
    "write": Entry("mullion.cli.vhd.content:write", "Write standard input into a disk's content."),
    "info": Entry("mullion.cli.vhd.show:info", "Show what a disk says about itself: sizes, creator, blocks, parents."),
    "tree": Entry("mullion.cli.vhd.show:tree", "Draw a chain, or all disks of a folder, with what is wrong."),
    "check": Entry("mullion.cli.vhd.check:check", "Check every structure of a disk and of its parents."),
    "repair": Entry("mullion.cli.vhd.check:repair", "Mend a damaged disk file, without loss unless it is allowed."),
    "serve": Entry("mullion.cli.vhd.serve:serve", "Serve a disk to other programs as NBD, on a unix socket."),
    "mount": Entry("mullion.cli.vhd.mount:mount", "Mount a disk as a folder: its raw content, and its partitions."),
    "unmount": Entry("mullion.cli.vhd.mount:unmount", "Flush and unmount a disk that was mounted."),
    "merge": Entry("mullion.cli.vhd.merge:merge", "Merge a differencing disk into its parent, or a range of a chain."),
    "resize": Entry("mullion.cli.vhd.change:resize", "Make a disk larger, or smaller where it is empty."),
    "compact": Entry("mullion.cli.vhd.change:compact", "Make a disk's file as short as its content allows."),
    "rebase": Entry(
        "mullion.cli.vhd.change:rebase", "Give a differencing disk another parent, or its parent's new path."
    ),
    "diff": Entry("mullion.cli.vhd.diff:diff", "List the ranges of a disk that changed, or in which two disks differ."),
    "ls": Entry("mullion.cli.vhd.files:ls", "List the files inside a disk, or its volumes."),
    "cat": Entry("mullion.cli.vhd.files:cat", "Print a file inside a disk."),
    "get": Entry("mullion.cli.vhd.files:get", "Copy files and folders out of a disk."),
}


class VhdGroup(LazyGroup):
    """The commands, also under the names that Hyper-V's PowerShell module gives them."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from mullion.cli.vhd.powershell import find_cmdlet, translate

        cmdlet = find_cmdlet(args[0]) if "-" in args[0] else None
        if cmdlet is not None:
            args = [cmdlet.command, *translate(cmdlet, args[1:])]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """What the storage refuses, wherever in a command, is said as an error: it is no fault of ours."""
        words = list(ctx.args)
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except OSError as error:
            from mullion.vhd.storage import explained

            named = error.filename
            if not isinstance(named, str) or named.startswith("/proc/self/fd/"):
                named = next((word for word in words if os.path.exists(word)), "the disk")
            raise explained(error, named) from error


@click.group(cls=VhdGroup, entries=ENTRIES, short_help="Work on virtual hard disk files, without the service.")
def vhd() -> None:
    """Work on virtual hard disk files, without the service.

    PATH is a file. Sizes take K, M, G and T in powers of 1024. A disk that a partition or another program has open for
    writing is refused, and who holds it is said. The names of Hyper-V's PowerShell module (New-VHD, Get-VHD,
    Convert-VHD, Merge-VHD, Resize-VHD, Test-VHD, Optimize-VHD, Set-VHD) are accepted too, with their parameters.
    """
