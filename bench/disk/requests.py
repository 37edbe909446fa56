"""CPU of the back end a request, over vhost-user: a dynamic disk and a chain of 8 against QCOW2 of the same depth.

Peer: `qemu-storage-daemon`, every file by io_uring. The load (`vhost_loadgen.c`) sleeps between interrupts, as guests
do, and checks every byte. In the chains each layer holds an eighth of the 64 KiB pieces, at random places, the same
on both sides. Writes are 4 KiB at random places of the disk, with a flush after every 32: both sides make them
durable by fdatasync. The rounds of both take turns, the page cache is warm.

What one write at a time costs at least is measured too (`request_floor.c`): a process that waits, writes the file and
wakes the load, and does nothing else.

Where there are two cores the back end, whichever it is, has the first and the load the second. Left to the kernel they
land on one core or on two, and at depth 1 that alone makes a difference of up to eight times.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from bench.disk.back_ends import BackEnd, OurProvider, StorageDaemon, build_loadgen
from bench.figures import BenchFault, Row
from bench.provider_bench import pattern
from bench.runner import Scale
from bench.vhd.scratch import disk_folder, run_program, scratch_folder, sync_file

from mullion.base.units import KIB, MIB
from mullion.vhd import create_differencing, create_dynamic, open_chain
from mullion.wire.nbd import NbdClient

DISK_BYTES: Final = 256 * MIB
DEPTH: Final = 8
_BLOCK_BYTES: Final = 4 * KIB
_PIECE_BYTES: Final = 64 * KIB
_FLUSH: Final = 32
_BLOCKS: Final = DISK_BYTES // _BLOCK_BYTES
_CORES: Final = sorted(os.sched_getaffinity(0))
_LOAD_CORE: Final = ("taskset", "--cpu-list", str(_CORES[1])) if len(_CORES) > 1 else ()


class Case(NamedTuple):
    """What is asked, and how much CPU of the peer's it may take."""

    name: str
    options: tuple[str, ...]
    count: int
    bar: float | None


CASES: Final = (
    Case("4K random read, depth 32", ("read", "depth=32"), 60_000, 0.9),
    Case("4K random read, depth 1", ("read", "depth=1"), 10_000, 1.25),
    Case("4K random write, depth 32, every 32 a flush", ("randwrite", "depth=32", f"flush={_FLUSH}"), 10_000, 0.6),
    Case("4K random write, depth 1, every 32 a flush", ("randwrite", "depth=1", f"flush={_FLUSH}"), 5_000, 0.6),
    Case("1M sequential read, depth 4", ("seqread", "depth=4", "bytes=1048576"), 240, None),
)


FLOOR: Final = Path(__file__).parents[1] / "request_floor.c"
FLOOR_CASE: Final = CASES[3]


def run(scale: Scale) -> list[Row]:
    with scratch_folder(disk_folder()) as folder:
        loadgen = build_loadgen(folder)
        vhds, qcows = _build(folder, loadgen)
        with (
            OurProvider(folder, {"flat": vhds[-1:], "deep": vhds[:-1]}) as ours,
            StorageDaemon(folder, {"flat": qcows[-1], "deep": qcows[0]}) as peer,
        ):
            if _LOAD_CORE:
                for back_end in (ours, peer):
                    back_end.pin(_CORES[0])
            floor = _measure_floor(folder, scale)
            return [
                row
                for case in CASES
                for disk, depth in (("flat", "1 file"), ("deep", f"{DEPTH} files"))
                for row in _compare(ours, peer, loadgen, disk, depth, case, scale, floor)
            ]


def _measure_floor(folder: str, scale: Scale) -> list[float]:
    """Microseconds of a process that does no more than the system calls of a write at a time."""
    if not _LOAD_CORE:
        return []
    program, path = f"{folder}/floor", f"{folder}/floor.raw"
    run_program("gcc", "-O2", "-o", program, str(FLOOR))
    with open(path, "wb") as file:
        for _ in range(DISK_BYTES // _PIECE_BYTES):
            file.write(os.urandom(_PIECE_BYTES))
    sync_file(path)
    argv = (program, path, _BLOCKS, FLOOR_CASE.count, _FLUSH, _CORES[0], _CORES[1])
    figures = [float(subprocess.check_output([*map(str, argv)])) for _ in range(scale.rounds)]
    os.unlink(path)
    return figures


def _compare(
    ours: BackEnd, peer: BackEnd, loadgen: str, disk: str, depth: str, case: Case, scale: Scale, floor: list[float]
) -> list[Row]:
    count = case.count // 3 if scale.quick else case.count
    cpu: dict[str, list[float]] = {ours.name: [], peer.name: []}
    wall: dict[str, list[float]] = {ours.name: [], peer.name: []}
    for number in range(scale.rounds):
        for back_end in (ours, peer) if number % 2 else (peer, ours):
            options = (*case.options, f"count={count}", f"warm={count // 10}", f"seed={number + 1}", "wait=eventfd")
            argv = [loadgen, back_end.vhost[disk], str(back_end.pid), *options, f"blocks={_BLOCKS}"]
            done = subprocess.run([*_LOAD_CORE, *argv], capture_output=True, check=False)
            if done.returncode:
                raise BenchFault(f"the load found fault with {back_end.name}: {done}")
            figures = json.loads(done.stdout)
            cpu[back_end.name].append(figures["cpu_us"])
            wall[back_end.name].append(figures["wall_us"])
    row = Row(f"{case.name}, {depth}", "us", cpu[ours.name], case.bar, peer=cpu[peer.name], peer_name=peer.name)
    wall_row = Row(f"  wall of the same, {depth}", "us", wall[ours.name], peer=wall[peer.name], peer_name=peer.name)
    if case is not FLOOR_CASE or not floor:
        return [row, wall_row]
    floor_row = Row(f"  the least for the same, {depth}", "us", floor, peer=cpu[peer.name], peer_name=peer.name)
    return [row, wall_row, floor_row]


def _build(folder: str, loadgen: str) -> tuple[list[str], list[str]]:
    """The chains, tops first, and last a disk of one file, the same on both sides."""
    vhds = [f"{folder}/{number}.vhd" for number in range(DEPTH)] + [f"{folder}/flat.vhd"]
    qcows = [f"{folder}/{number}.qcow2" for number in range(DEPTH)] + [f"{folder}/flat.qcow2"]
    for base, flat in ((-2, -1),):
        for number in (base, flat):
            create_dynamic(vhds[number], DISK_BYTES)
            run_program("qemu-img", "create", "-q", "-f", "qcow2", qcows[number], str(DISK_BYTES))
    os.mkdir(f"{folder}/fill")
    with (
        OurProvider(f"{folder}/fill", {"base": vhds[-2:-1], "flat": vhds[-1:]}) as ours,
        StorageDaemon(f"{folder}/fill", {"base": qcows[-2], "flat": qcows[-1]}) as peer,
    ):
        for back_end in (ours, peer):
            for address in back_end.vhost.values():
                run_program(loadgen, address, str(back_end.pid), "fill", "bytes=1048576", "depth=8")
    choose = random.Random(8)
    for number in reversed(range(DEPTH - 1)):
        pieces = [place for place in range(DISK_BYTES // _PIECE_BYTES) if choose.randrange(DEPTH) == 0]
        create_differencing(vhds[number], vhds[number + 1])
        with open_chain(vhds[number]) as chain:
            for place in pieces:
                chain.pwrite(place * _PIECE_BYTES, _content(place))
        backing = ("-b", qcows[number + 1], "-F", "qcow2")
        run_program("qemu-img", "create", "-q", "-f", "qcow2", *backing, qcows[number])
        _fill_qcow(folder, qcows[number], pieces)
    for path in (*vhds, *qcows):
        sync_file(path)
        with open(path, "rb") as file:
            while file.read(MIB):
                pass
    return vhds, qcows


def _fill_qcow(folder: str, path: str, pieces: list[int]) -> None:
    address = f"{folder}/qemu-nbd"
    process = subprocess.Popen(["qemu-nbd", "-f", "qcow2", "-k", address, "-t", path])
    try:
        while not os.path.exists(address):
            if process.poll() is not None:
                raise BenchFault("qemu-nbd did not start")
            time.sleep(0.02)
        with NbdClient(address) as client:
            for place in pieces:
                client.pwrite(place * _PIECE_BYTES, _content(place))
            client.flush()
    finally:
        process.terminate()
        process.wait()
        with suppress(FileNotFoundError):
            os.unlink(address)


def _content(place: int) -> bytes:
    first = place * _PIECE_BYTES // _BLOCK_BYTES
    return b"".join(pattern(first + number) for number in range(_PIECE_BYTES // _BLOCK_BYTES))
