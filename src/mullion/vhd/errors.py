"""What the VHD engine refuses, and how each refusal is known.

`VhdError` is the root of everything that is wrong with a file; its context says which file (`path`), which structure of
the specification (`structure`) and where (`offset`, bytes from the start of the file).
"""

from __future__ import annotations

from mullion.base.errors import ConflictError, MullionError


class VhdError(MullionError):
    """A disk file is not what it should be."""

    code = "vhd"
    exit_code = 8
    http_status = 422
    default_remedy = "Restore the file from a backup, or choose another file."

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        structure: str | None = None,
        offset: int | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy, path=path, structure=structure, offset=offset)
        self.path = path
        self.structure = structure
        self.offset = offset


class NotVhdError(VhdError):
    """The file is no VHD at all."""

    code = "not-a-vhd"
    default_remedy = "Choose a VHD file; another format becomes one with `mullion vhd convert`."


class VhdDamagedError(VhdError):
    """A structure of the file is missing, broken or contradicts another."""

    code = "vhd-damaged"
    default_remedy = "Mend it with `mullion vhd repair`, or open it read-only, or restore the file from a backup."


class VhdUnsupportedError(VhdError):
    """The file is valid, or may be, but asks for more than is supported."""

    code = "vhd-unsupported"
    default_remedy = "Convert it to an ordinary dynamic disk with 2 MiB blocks."


class ParentNotFoundError(VhdError):
    """The parent of a differencing disk is not where the child says."""

    code = "vhd-parent-missing"
    default_remedy = "Put the parent back beside the child, under the name that the message gives."


class ParentMismatchError(VhdError):
    """The file in the parent's place is another disk: its unique id is not the one that the child was made on."""

    code = "vhd-parent-mismatch"
    default_remedy = "Put the original parent back; a child is worthless on any other disk."


class ParentRefusedError(VhdError):
    """The child names a parent that must not be opened: remote, or outside the allowed folders."""

    code = "vhd-parent-refused"
    default_remedy = (
        "If you trust the file that names it: allow the parent's folder (`--allow`), or move it to the child."
    )


class ChainCycleError(VhdError):
    """A disk is its own ancestor."""

    code = "vhd-chain-cycle"
    default_remedy = "One of these files was overwritten: restore it from a backup."


class ChainTooDeepError(VhdError):
    """The chain has more files than the limit."""

    code = "vhd-chain-too-deep"
    default_remedy = "Use an older disk of the chain, or copy the content of one to a new disk over NBD."


class HalfMergedError(VhdError):
    """A merge into this file was begun and is not finished: by itself it is a mixture of two disks."""

    code = "vhd-half-merged"
    http_status = 409
    default_remedy = "Open the disk through the layer that is merged, or finish the merge with `mullion vhd merge`."


class DiskBusyError(ConflictError):
    """Somebody else has the disk open in a way that excludes this use."""

    code = "disk-busy"
    default_remedy = "Stop the partition or the program that uses the disk, then try again."


class DiskReadOnlyError(ConflictError):
    """A write to a disk that was opened for reading."""

    code = "disk-read-only"
    default_remedy = "Open the disk for writing, or write to a differencing child of it."
