"""A checkpoint under a writing load: the longest request that it costs, against QEMU's `blockdev-snapshot`.

Over vhost-user: 4 KiB overwrites at random places, eight in flight, by the same load generator. Ours: an empty child is
made, durable, and a provider switches to it. Peer: an overlay is made by `qemu-img create`, not durable, and
`qemu-storage-daemon` takes it as its top. Over NBD: one such write after another while the service makes a whole
checkpoint of a partition: request, store, children, switch, store; its guest is paused, for its processor is this
host's. Peer: the same overlay, under the same load by NBD.

What is said is the longest request that was answered within a second from the command on (or until its answer, when
that takes longer), everything included that follows a checkpoint: the first writes to an empty layer find room in it.
What the longest is without a checkpoint, in the second before, is noted.
"""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Final, NamedTuple

from bench.disk.back_ends import BackEnd, OurProvider, StorageDaemon, build_loadgen
from bench.figures import BenchFault, Measure, Row
from bench.runner import Scale
from bench.scene import DISK_ID, small_partitions, start_paused, turn_off
from bench.vhd.scratch import disk_folder, run_program, scratch_folder

from mullion.base.units import KIB, MIB
from mullion.model.definition import Transport
from mullion.vhd import create_dynamic
from mullion.wire.nbd import NbdClient

DISK_BYTES: Final = 64 * MIB
BAR_MS: Final = 20.0
BAR: Final = 1.0
AROUND_S: Final = 1.0
_BLOCK_BYTES: Final = 4 * KIB
_PEER: Final = "blockdev-snapshot (QCOW2)"


class Found(NamedTuple):
    """The longest request in the second from the command on, and in the one before it, in milliseconds."""

    longest_ms: float
    calm_ms: float


Samples = list[tuple[float, float]]
"""Instants of the monotonic clock, and the longest request in ms that was answered between the one before and this."""


def run(scale: Scale) -> list[Row]:
    rounds = 5 if scale.quick else 9
    rows = []
    for name, options, is_promised in (("", (), True), (", every 64 a flush", ("flush=64",), False)):
        ours, peer = _over_vhost_user(rounds, options)
        rows += _rows(f"4K overwrites, depth 8{name}, vhost-user", ours, peer, is_promised=is_promised)
    ours, peer = _of_a_partition(rounds)
    return rows + _rows("4K overwrites, depth 1, NBD, the service's whole checkpoint", ours, peer, is_promised=True)


def _rows(what: str, ours: list[Found], peer: list[Found], *, is_promised: bool) -> list[Row]:
    longest = [found.longest_ms for found in ours]
    calm, peer_calm = (statistics.median(found.calm_ms for found in side) for side in (ours, peer))
    note = f"in the second before: {calm:.3g} ms, the peer's {peer_calm:.3g} ms"
    peer_longest = [found.longest_ms for found in peer]
    return [
        Row(f"longest: {what}", "ms", longest, BAR_MS if is_promised else None, Measure.MEDIAN, note=note),
        Row(f"the same: {what}", "ms", longest, BAR if is_promised else None, Measure.RATIO, peer_longest, _PEER),
    ]


# ---------------------------------------------------------------------- over vhost-user


def _over_vhost_user(rounds: int, options: tuple[str, ...]) -> tuple[list[Found], list[Found]]:
    with scratch_folder(disk_folder()) as folder:
        loadgen = build_loadgen(folder)
        create_dynamic(f"{folder}/disk.vhd", DISK_BYTES)
        run_program("qemu-img", "create", "-q", "-f", "qcow2", f"{folder}/disk.qcow2", str(DISK_BYTES))
        found: dict[str, list[Found]] = {}
        with (
            OurProvider(folder, {"d": [f"{folder}/disk.vhd"]}) as ours,
            StorageDaemon(folder, {"d": f"{folder}/disk.qcow2"}) as peer,
        ):
            for back_end in (ours, peer):
                argv = [loadgen, back_end.vhost["d"], str(back_end.pid), "fill", "bytes=1048576", "depth=8"]
                run_program(*argv, f"blocks={DISK_BYTES // _BLOCK_BYTES}")
            for number in range(rounds):
                for back_end, suffix in ((ours, "avhd"), (peer, "qcow2")):
                    path = f"{folder}/c{number}.{suffix}"
                    with _load(loadgen, back_end, options) as samples:
                        one = _watch(samples, lambda back_end=back_end, path=path: back_end.push("d", path))
                    found.setdefault(back_end.name, []).append(one)
        return found[ours.name], found[peer.name]


@contextmanager
def _load(loadgen: str, back_end: BackEnd, options: tuple[str, ...]) -> Iterator[Samples]:
    """A load until the end of the block."""
    argv = [loadgen, back_end.vhost["d"], str(back_end.pid), "randwrite", "depth=8", "wait=eventfd", *options]
    argv += ["count=1000000000000", "report=16", "longest=1", f"blocks={DISK_BYTES // _BLOCK_BYTES}"]
    samples: Samples = []
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    thread = threading.Thread(target=_collect, args=(process, samples), name="load")
    thread.start()
    try:
        yield samples
        if process.poll() is not None:
            raise BenchFault(f"the load ended early, with status {process.returncode}")
    finally:
        process.terminate()
        thread.join()
        process.wait()


def _collect(process: subprocess.Popen[str], samples: Samples) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        at, _, longest_us = line.split()
        samples.append((float(at), float(longest_us) / 1000))


def _watch(samples: Samples, checkpoint: Callable[[], object]) -> Found:
    time.sleep(AROUND_S + 0.5)
    begun_s = time.monotonic()
    checkpoint()
    ended_s = max(time.monotonic(), begun_s + AROUND_S)
    time.sleep(max(0.0, ended_s - time.monotonic()) + 0.2)
    return Found(_longest(samples, begun_s, ended_s), _longest(samples, begun_s - AROUND_S, begun_s))


def _longest(samples: Samples, begin_s: float, end_s: float) -> float:
    """Of the requests of the reports between two instants; a report that has just passed the end counts too."""
    later = [(at_s, longest_ms) for at_s, longest_ms in samples if at_s >= begin_s]
    inside = [longest_ms for at_s, longest_ms in later if at_s <= end_s]
    if len(later) == len(inside):
        raise BenchFault("the load did not go on")
    return max([*inside, later[len(inside)][1]])


# ---------------------------------------------------------------------- a whole checkpoint


def _of_a_partition(rounds: int) -> tuple[list[Found], list[Found]]:
    ours, peer = [], []
    with scratch_folder(disk_folder()) as folder, small_partitions(1, transport=Transport.NBD) as (service, names):
        name = names[0]
        run_program("qemu-img", "create", "-q", "-f", "qcow2", f"{folder}/disk.qcow2", str(DISK_BYTES))
        with service.client() as client, StorageDaemon(folder, {"d": f"{folder}/disk.qcow2"}, with_nbd=True) as daemon:
            start_paused(client, names)
            sockets = (service.paths.partition(name).nbd(DISK_ID), daemon.nbd["d"])
            for socket in sockets:
                _fill(socket)
            for number in range(rounds):
                with _nbd_load(sockets[0]) as samples:
                    ours.append(
                        _watch(samples, lambda number=number: client.wait(client.create_checkpoint(name, f"c{number}")))
                    )
                with _nbd_load(sockets[1]) as samples:
                    peer.append(_watch(samples, lambda number=number: daemon.push("d", f"{folder}/c{number}.qcow2")))
            turn_off(client, names)
    return ours, peer


def _fill(socket: str) -> None:
    with NbdClient(socket) as client:
        for offset in range(0, DISK_BYTES, MIB):
            client.pwrite(offset, b"\x5a" * MIB)
        client.flush()


@contextmanager
def _nbd_load(socket: str) -> Iterator[Samples]:
    """Writes one after another until the end of the block."""
    samples: Samples = []
    is_over = threading.Event()
    thread = threading.Thread(target=_write_on, args=(socket, samples, is_over), name="load")
    thread.start()
    try:
        yield samples
        if not thread.is_alive():
            raise BenchFault("the load ended early")
    finally:
        is_over.set()
        thread.join()


def _write_on(socket: str, samples: Samples, is_over: threading.Event) -> None:
    random = Random(1)
    content = bytes(range(256)) * (_BLOCK_BYTES // 256)
    with NbdClient(socket) as client:
        while not is_over.is_set():
            begun_s = time.monotonic()
            client.pwrite(random.randrange(DISK_BYTES // _BLOCK_BYTES) * _BLOCK_BYTES, content)
            ended_s = time.monotonic()
            samples.append((ended_s, (ended_s - begun_s) * 1000))
