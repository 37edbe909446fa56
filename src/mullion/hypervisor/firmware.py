"""UEFI firmware: finding OVMF on the host, and a partition's own copy of its variables."""

from __future__ import annotations

import os
from collections.abc import Sequence

from mullion.base.errors import MissingToolError
from mullion.base.files import replace_file
from mullion.base.paths import OVMF_PAIRS, PartitionPaths, find_ovmf
from mullion.hypervisor.cmdline import FirmwareFiles


def prepare_uefi(
    paths: PartitionPaths, owner: tuple[int, int] | None = None, pairs: Sequence[tuple[str, str]] = OVMF_PAIRS
) -> FirmwareFiles:
    """The files of a UEFI partition; its variables are made at the first start and kept ever after.

    A size that differs from the template's means that the host's build has changed: the old variables would not be
    understood, so they are put aside as `firmware-vars.fd.old` and fresh ones made.
    Raises: MissingToolError when no OVMF is installed; OSError.
    """
    found = find_ovmf(pairs)
    if found is None:
        raise MissingToolError(
            "UEFI firmware (OVMF) is not installed",
            remedy="Install it: apt-get install ovmf; or choose firmware = bios.",
            package="ovmf",
        )
    code, template = found
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
