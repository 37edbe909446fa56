"""What is refused of disks in other formats, and of the filesystems inside disks."""

from __future__ import annotations

from mullion.base.errors import MullionError


class ForeignDiskError(MullionError):
    """A disk in another format cannot be read."""

    code = "foreign-disk"
    exit_code = 8
    http_status = 422
    default_remedy = "Restore the file from a backup, or look at it with `qemu-img check`."


class ForeignUnsupportedError(ForeignDiskError):
    """The file is of a kind, or uses a feature, that is not read here."""

    code = "foreign-disk-unsupported"
    default_remedy = "Convert it to a plain image of the same format with the program that made it."


class ForeignReferenceError(ForeignDiskError):
    """A disk names another file that would have to be opened: a backing file, a data file, an extent elsewhere.

    It is never followed: a hostile file could name any file of the host and have its content shown.
    """

    code = "foreign-disk-reference"
    default_remedy = "Make one file of the chain first, with the program that made it, where it was made."


class FilesystemError(MullionError):
    """The files inside a disk cannot be read."""

    code = "filesystem"
    exit_code = 8
    http_status = 422
    default_remedy = "Check the filesystem with its own tools: `mullion vhd mount` shows the disk to them."


class VolumeChoiceError(FilesystemError):
    """The disk has several volumes, or none that can be read: one must be chosen."""

    code = "filesystem-volume"
    exit_code = 5
    http_status = 400
    default_remedy = "Choose one with --volume N."


class ReaderDiedError(FilesystemError):
    """The confined process that reads a filesystem ended, was too slow, or said what it must not."""

    code = "filesystem-reader"
    default_remedy = "The filesystem is damaged or hostile: mount the disk with `mullion vhd mount` and repair a copy."
