"""Filesystems inside disks: their volumes, their files, and what they do not use."""

from mullion.media.filesystems.entries import FileEntry
from mullion.media.filesystems.extract import extract
from mullion.media.filesystems.freespace import free_extents, free_extents_of
from mullion.media.filesystems.reader import VolumeReader, open_volume
from mullion.media.filesystems.volumes import Volume, choose_volume, list_volumes

__all__ = [
    "FileEntry",
    "Volume",
    "VolumeReader",
    "choose_volume",
    "extract",
    "free_extents",
    "free_extents_of",
    "list_volumes",
    "open_volume",
]
