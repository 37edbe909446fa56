"""`mullion vhd`: virtual hard disks as files, without the service.

The table of commands is here; each lives in a module of this folder that is imported when it is called.
"""

from __future__ import annotations

from typing import Final

import click

from mullion.cli.lazy import Entry, LazyGroup

ENTRIES: Final = {
    "create": Entry("mullion.cli.vhd.create:create", "Create a fixed, dynamic or differencing disk."),
}


@click.group(cls=LazyGroup, entries=ENTRIES, short_help="Work on virtual hard disk files, without the service.")
def vhd() -> None:
    """Work on virtual hard disk files, without the service.

    PATH is a file. Sizes take K, M, G and T in powers of 1024. A disk that a partition or another program has open for
    writing is refused, and who holds it is said.
    """
