"""Checking a dynamic disk of 127 GiB with 50,000 blocks; `qemu-img check` cannot check a VHD, so QCOW2 is its peer.

The whole command is timed, with the start of its process. The blocks lie in the file in random order, as they do after
years of use; they are holes, which a check never reads.
"""

from __future__ import annotations

import random
import sys
from array import array

from bench.figures import Measure, Row
from bench.runner import Scale
from bench.vhd.scratch import disk_folder, in_turns, run_program, scratch_folder

from mullion.base.units import GIB, MIB, SECTOR_BYTES
from mullion.vhd import create_dynamic
from mullion.vhd.bat import UNALLOCATED

SIZE_BYTES = 127 * GIB
BLOCKS = 50_000
BAR_S = 1.0

_BAT_OFFSET = 1536
_FIRST_BLOCK = MIB
_STRIDE = 2 * MIB + 4096


def run(scale: Scale) -> list[Row]:
    with scratch_folder(disk_folder()) as folder:
        path, peer = f"{folder}/disk.vhd", f"{folder}/disk.qcow2"
        make_used_disk(path)
        options = "preallocation=metadata,cluster_size=2M"
        run_program("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, peer, str(BLOCKS * 2 * MIB))

        def check() -> None:
            run_program(sys.executable, "-m", "mullion.cli", "vhd", "check", path)

        def check_qcow2() -> None:
            run_program("qemu-img", "check", "-q", "-f", "qcow2", peer)

        ours, theirs = in_turns(check, check_qcow2, 3 if scale.quick else 7, before=lambda: None)
        what = f"check a dynamic disk of 127 GiB with {BLOCKS} blocks"
        return [Row(what, "s", ours, BAR_S, Measure.MEDIAN, theirs, "qemu-img check of QCOW2 with as many clusters")]


def make_used_disk(path: str) -> None:
    """A dynamic disk with `BLOCKS` blocks in random order, without writing their data."""
    create_dynamic(path, SIZE_BYTES, durable=False)
    choose = random.Random(127)
    entries = -(-SIZE_BYTES // (2 * MIB))
    places = choose.sample(range(BLOCKS), BLOCKS)
    table = array("I", [UNALLOCATED]) * entries
    for block, place in zip(sorted(choose.sample(range(entries), BLOCKS)), places, strict=True):
        table[block] = (_FIRST_BLOCK + place * _STRIDE + 3584) // SECTOR_BYTES
    if sys.byteorder == "little":
        table.byteswap()
    with open(path, "r+b") as file:
        footer = file.read(512)
        file.seek(_BAT_OFFSET)
        file.write(table.tobytes())
        end = _FIRST_BLOCK + BLOCKS * _STRIDE
        file.seek(end + 3584)
        file.write(footer)
