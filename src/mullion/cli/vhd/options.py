"""Options and small rules that several commands of `mullion vhd` share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., object])

DISK: Final = click.Path(dir_okay=True, path_type=str)
"""A path as it was typed; what is wrong with it is the engine's to say."""

FORMATS: Final = ("vhd", "raw", "vhdx", "vmdk", "qcow2", "qcow", "qed", "vdi", "parallels", "ova")
"""Those of `media.foreign.FORMATS` that a person may name, repeated here because importing them takes time."""


def allow_option(command: _Command) -> _Command:
    """Where parents may lie, beside the folder of the disk itself."""
    return click.option(
        "--allow",
        "allow",
        multiple=True,
        metavar="FOLDER",
        type=click.Path(exists=True, file_okay=False, path_type=str),
        help="A folder in which parents may lie, beside the disk's own and those its maker named. May be repeated.",
    )(command)


def from_option(command: _Command) -> _Command:
    """What the source is, for the rare file whose content does not say it."""
    return click.option(
        "--from",
        "source_format",
        metavar="FORMAT",
        type=click.Choice(FORMATS),
        help="The format of the file; default: what its content says. A raw disk may begin with anything.",
    )(command)


def allowed_dirs(path: str, allow: Sequence[str]) -> list[str] | None:
    """The folders for `open_chain`: None is its own rule."""
    if not allow:
        return None
    return [os.path.dirname(os.path.realpath(path)), *allow]
