"""Merging a child of sparse changes into its parent, against `qemu-img commit` of the same changes in QCOW2.

A disk of 10 GiB, whose parent holds 2 MiB in every 20. The child holds pieces anywhere on it: sparse changes are pages
of 4 KiB, as guests leave them; two more workloads, of larger pieces, show where the storage sets the pace, and promise
nothing. Both sides end with the parent durable. The command of ours is run as a program too, and its child is gone at
the end; `-d` spares qemu-img from emptying its own.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from bench.figures import BenchFault, Measure, Row
from bench.runner import Scale
from bench.vhd.scratch import disk_folder, in_turns, run_program, scratch_folder, sync_file

from mullion.base.units import GIB, KIB, MIB, format_size
from mullion.vhd import create_differencing, create_dynamic, open_chain

DISK_BYTES = 10 * GIB
PARENT_STRIDE_BYTES = 20 * MIB
PARENT_PIECE_BYTES = 2 * MIB


class Workload(NamedTuple):
    """How much changed, in pieces of which sizes (powers of two, as many small as large ones), and the bar."""

    changed_bytes: int
    smallest_shift: int
    largest_shift: int
    bar: float | None = None


WORKLOADS = (Workload(80 * MIB, 12, 12, bar=1 / 2), Workload(256 * MIB, 12, 16), Workload(GIB, 12, 21))

Piece = tuple[int, int, int]
"""Offset, length, and the byte that fills it."""


def run(scale: Scale) -> list[Row]:
    workloads = WORKLOADS[:1] if scale.quick else WORKLOADS
    return [_measure(workload, 3 if scale.quick else 5) for workload in workloads]


def _measure(workload: Workload, rounds: int) -> Row:
    with scratch_folder(disk_folder()) as folder:
        pieces = list(changes(workload))
        make_vhd(folder, pieces)
        make_qcow2(folder, pieces)
        work = f"{folder}/work"

        def prepare() -> None:
            shutil.rmtree(work, ignore_errors=True)
            os.mkdir(work)
            for kind in ("vhd", "qcow2"):
                run_program("cp", "--sparse=always", f"{folder}/base.{kind}", work)
                os.link(f"{folder}/child.{kind}", f"{work}/child.{kind}")
                sync_file(f"{work}/base.{kind}")

        def merge() -> None:
            run_program(sys.executable, "-m", "mullion.cli", "vhd", "merge", f"{work}/child.vhd")

        def commit() -> None:
            run_program("qemu-img", "commit", "-q", "-d", "-f", "qcow2", f"{work}/child.qcow2")
            sync_file(f"{work}/base.qcow2")

        ours, peer = in_turns(merge, commit, rounds, before=prepare)
    what = f"merge {format_size(workload.changed_bytes)} in {len(pieces)} pieces over 10 GiB, durable"
    return Row(what, "s", ours, workload.bar, Measure.RATIO, peer, "qemu-img commit (QCOW2)")


def parent_pieces() -> Iterator[Piece]:
    for number, offset in enumerate(range(0, DISK_BYTES - PARENT_PIECE_BYTES, PARENT_STRIDE_BYTES)):
        yield offset, PARENT_PIECE_BYTES, 1 + number % 100


def changes(workload: Workload) -> Iterator[Piece]:
    choose = random.Random(1)
    left = workload.changed_bytes
    while left > 0:
        length = min(left, 1 << choose.randint(workload.smallest_shift, workload.largest_shift))
        offset = choose.randrange((DISK_BYTES - length) // (4 * KIB)) * 4 * KIB
        yield offset, length, choose.randint(101, 250)
        left -= length


def make_vhd(folder: str, pieces: list[Piece]) -> None:
    base, child = f"{folder}/base.vhd", f"{folder}/child.vhd"
    create_dynamic(base, DISK_BYTES)
    write_vhd(base, parent_pieces())
    create_differencing(child, base)
    write_vhd(child, pieces)


def write_vhd(path: str, pieces: Iterator[Piece] | list[Piece]) -> None:
    with open_chain(path) as chain:
        for offset, length, byte in pieces:
            chain.pwrite(offset, bytes([byte]) * length)


def make_qcow2(folder: str, pieces: list[Piece]) -> None:
    base, child = f"{folder}/base.qcow2", f"{folder}/child.qcow2"
    run_program("qemu-img", "create", "-q", "-f", "qcow2", base, str(DISK_BYTES))
    write_qcow2(base, parent_pieces())
    run_program("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", child)
    write_qcow2(child, pieces)


def write_qcow2(path: str, pieces: Iterator[Piece] | list[Piece]) -> None:
    script = "".join(f"write -q -P {byte} {offset} {length}\n" for offset, length, byte in pieces)
    line = ["qemu-io", "-f", "qcow2", path]
    done = subprocess.run(line, input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchFault(f"qemu-io failed: {done.stderr.strip()}")
