"""UEFI firmware: finding OVMF on the host, and a partition's own copy of its variables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from mullion.base.errors import MissingToolError
from mullion.base.files import replace_file
from mullion.base.paths import PartitionPaths
from mullion.hypervisor.cmdline import FirmwareFiles

OVMF_PAIRS: Final = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
)
"""Code and template of the variables, which must be of one build: Debian's 4 MiB and 2 MiB builds, Fedora's."""


def prepare_uefi(
    paths: PartitionPaths, owner: tuple[int, int] | None = None, pairs: Sequence[tuple[str, str]] = OVMF_PAIRS
) -> FirmwareFiles:
    """The files of a UEFI partition; its variables are made at the first start and kept ever after.

    A size that differs from the template's means that the host's build has changed: the old variables would not be
    understood, so they are put aside as `firmware-vars.fd.old` and fresh ones made.
    Raises: MissingToolError when no OVMF is installed; OSError.
    """
    code, template = _find(pairs)
    variables = paths.firmware_vars
    with open(template, "rb") as file:
        fresh = file.read()
    try:
        present_bytes: int | None = os.stat(variables).st_size
    except FileNotFoundError:
        present_bytes = None
    if present_bytes != len(fresh):
        if present_bytes is not None:
            os.replace(variables, f"{variables}.old")
        os.makedirs(paths.data, mode=0o750, exist_ok=True)
        replace_file(variables, fresh, mode=0o600)
    if owner is not None:
        os.chown(variables, *owner, follow_symlinks=False)
    return FirmwareFiles(code, variables)


def _find(pairs: Sequence[tuple[str, str]]) -> tuple[str, str]:
    for code, template in pairs:
        if os.path.exists(code) and os.path.exists(template):
            return code, template
    raise MissingToolError(
        "UEFI firmware (OVMF) is not installed",
        remedy="Install it: apt-get install ovmf; or choose firmware = bios.",
        package="ovmf",
    )
