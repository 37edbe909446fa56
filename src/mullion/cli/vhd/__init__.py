"""`mullion vhd`: virtual hard disks as files, without the service.

The table of commands is here; each lives in a module of this folder that is imported when it is called.
"""

from __future__ import annotations

from typing import Final

import click

from mullion.cli.lazy import Entry, LazyGroup

ENTRIES: Final = {
    "create": Entry("mullion.cli.vhd.create:create", "Create a fixed, dynamic or differencing disk."),
    "serve": Entry("mullion.cli.vhd.serve:serve", "Serve a disk to other programs as NBD, on a unix socket."),
    "merge": Entry("mullion.cli.vhd.merge:merge", "Merge a differencing disk into its parent, or a range of a chain."),
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


@click.group(cls=VhdGroup, entries=ENTRIES, short_help="Work on virtual hard disk files, without the service.")
def vhd() -> None:
    """Work on virtual hard disk files, without the service.

    PATH is a file. Sizes take K, M, G and T in powers of 1024. A disk that a partition or another program has open for
    writing is refused, and who holds it is said. The names of Hyper-V's PowerShell module (New-VHD, Get-VHD,
    Convert-VHD, Merge-VHD, Resize-VHD, Test-VHD, Optimize-VHD, Set-VHD) are accepted too, with their parameters.
    """
