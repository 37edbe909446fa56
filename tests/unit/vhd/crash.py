"""One change of a disk file, ended at every instant: by a kill, and by power cuts of several kinds."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.contract.block_device import all_of
from tests.unit.vhd.power_cut import KilledError, RecordingIO

from mullion.base.errors import NoSpaceError
from mullion.vhd import open_chain

Operation = Callable[[str, RecordingIO], object]
Check = Callable[[str, bool], None]
"""Of the disk's path and whether the operation had ended."""

POWER_CUTS = 2


def content_of(path: str) -> bytes:
    with open_chain(path, read_only=True) as chain:
        return bytes(all_of(chain))


def end_everywhere(folder: Path, name: str, operation: Operation, check: Check) -> int:
    """Run an operation on copies of a folder, with an end before each change of the file; returns how many there are.

    After each end the disk is checked as it is, opened for writing and checked again, and the operation is repeated to
    its end.
    """
    fuse = 0
    while True:
        for cut in range(POWER_CUTS + 1):
            copy = folder.with_name(f"{folder.name}-{fuse}-{cut}")
            shutil.copytree(folder, copy)
            path = str(copy / name)
            recording = RecordingIO()
            recording.fuse = fuse
            try:
                operation(path, recording)
            except KilledError:
                pass
            else:
                check(path, True)
                return fuse
            if cut:
                recording.cut_power(random.Random(fuse * 100 + cut))
            check(path, False)
            with open_chain(path) as chain:
                chain.flush()
            check(path, False)
            operation(path, RecordingIO())
            check(path, True)
            shutil.rmtree(copy)
        fuse += 1


def fill_everywhere(folder: Path, name: str, operation: Operation, check: Check) -> None:
    """The same, with a filesystem that is full at each change once: refused by name, and it can be repeated."""
    fuse = 0
    while True:
        copy = folder.with_name(f"{folder.name}-full-{fuse}")
        shutil.copytree(folder, copy)
        path = str(copy / name)
        recording = RecordingIO()
        recording.fuse, recording.fuse_kills = fuse, False
        try:
            operation(path, recording)
        except NoSpaceError:
            check(path, False)
            operation(path, RecordingIO())
        check(path, True)
        shutil.rmtree(copy)
        if recording.fuse is not None:
            return
        fuse += 1
