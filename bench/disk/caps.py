"""Caps on requests and bytes, changed while a load runs, against QEMU's throttle groups.

Ours: a provider; peer: `qemu-storage-daemon` with a throttle group over QCOW2. Over vhost-user the load is 32 requests
in flight, over NBD one after another, random reads. Each round sets a cap, then a lower and a higher one, under the
same load. What is said: by how much the rate of three seconds, from 100 ms after the change, is off the cap; and how
long after the command was given begin the first 200 ms whose rate is within 10 % of the new cap.
"""

from __future__ import annotations

import subprocess
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from bench.disk.back_ends import BackEnd, OurProvider, StorageDaemon, build_loadgen
from bench.figures import BenchFault, Measure, Row
from bench.runner import Scale
from bench.vhd.scratch import disk_folder, run_program, scratch_folder

from mullion.base.units import KIB, MIB
from mullion.vhd import create_dynamic
from mullion.wire.nbd import NbdClient

DISK_BYTES: Final = 64 * MIB
SPAN_S: Final = 3.0
DEVIATION_BAR_PERCENT: Final = 3.0
EFFECT_BAR_MS: Final = 100.0
_WINDOW_S: Final = 0.2
_STEP_S: Final = 0.02
_NEAR: Final = 0.1


class Case(NamedTuple):
    """A load and its caps, one after another, in requests a second."""

    name: str
    is_nbd: bool
    request_bytes: int
    in_bytes: bool
    rates: tuple[int, ...]


CASES: Final = (
    Case("4K reads, vhost-user", False, 4 * KIB, False, (2000, 500, 3000)),
    Case("64K reads by bytes, vhost-user", False, 64 * KIB, True, (400, 100, 600)),
    Case("4K reads, NBD", True, 4 * KIB, False, (400, 100, 600)),
)


def run(scale: Scale) -> list[Row]:
    rounds = 1 if scale.quick else 3
    rows = []
    with scratch_folder(disk_folder()) as folder:
        loadgen = build_loadgen(folder)
        create_dynamic(f"{folder}/disk.vhd", DISK_BYTES)
        run_program("qemu-img", "create", "-q", "-f", "qcow2", f"{folder}/disk.qcow2", str(DISK_BYTES))
        with (
            OurProvider(folder, {"d": [f"{folder}/disk.vhd"]}) as ours,
            StorageDaemon(folder, {"d": f"{folder}/disk.qcow2"}, with_caps=True) as peer,
        ):
            blocks = f"blocks={DISK_BYTES // (4 * KIB)}"
            for back_end in (ours, peer):
                run_program(loadgen, back_end.vhost["d"], str(back_end.pid), "fill", "bytes=1048576", "depth=8", blocks)
            for case in CASES:
                found: dict[str, list[tuple[float, float]]] = {ours.name: [], peer.name: []}
                for _ in range(rounds):
                    for back_end in (ours, peer):
                        found[back_end.name] += _measure(back_end, loadgen, case)
                ours_found, peer_found = found[ours.name], found[peer.name]
                rows.append(
                    Row(
                        f"off the cap, {case.name}",
                        "%",
                        [deviation for deviation, _ in ours_found],
                        DEVIATION_BAR_PERCENT,
                        Measure.MEDIAN,
                        note=f"throttle group: {_summary([deviation for deviation, _ in peer_found], '%')}",
                    )
                )
                rows.append(
                    Row(
                        f"change in force, {case.name}",
                        "ms",
                        [effect for _, effect in ours_found],
                        EFFECT_BAR_MS,
                        Measure.MEDIAN,
                        note=f"throttle group: {_summary([effect for _, effect in peer_found], 'ms')}",
                    )
                )
    return rows


def _summary(figures: list[float], unit: str) -> str:
    ordered = sorted(figures)
    return f"{ordered[len(ordered) // 2]:.3g} {unit} ({ordered[0]:.3g} to {ordered[-1]:.3g})"


def _measure(back_end: BackEnd, loadgen: str, case: Case) -> list[tuple[float, float]]:
    """Percent off and milliseconds until in force, for each change after the first cap."""
    _set(back_end, case, case.rates[0])
    figures = []
    with _load(back_end, loadgen, case) as times:
        time.sleep(1.0)
        for rate in case.rates[1:]:
            given_s = time.monotonic()
            _set(back_end, case, rate)
            time.sleep(SPAN_S + 0.5)
            figures.append(_judge(list(times), given_s, rate))
        _set(back_end, case, 0)
    return figures


def _set(back_end: BackEnd, case: Case, rate: int) -> None:
    if case.in_bytes:
        back_end.set_caps("d", bytes_per_s=rate * case.request_bytes)
    else:
        back_end.set_caps("d", iops=rate)


def _judge(times: list[float], given_s: float, rate: int) -> tuple[float, float]:
    """How far off the cap, in percent, and after how many milliseconds it was in force."""

    def count(begin_s: float, length_s: float) -> int:
        return bisect_left(times, begin_s + length_s) - bisect_left(times, begin_s)

    begin_s = given_s + EFFECT_BAR_MS / 1000
    deviation = abs(count(begin_s, SPAN_S) - rate * SPAN_S) / (rate * SPAN_S)
    expected = rate * _WINDOW_S
    for step in range(int((SPAN_S - _WINDOW_S) / _STEP_S)):
        after_s = step * _STEP_S
        if abs(count(given_s + after_s, _WINDOW_S) - expected) <= max(_NEAR * expected, 2):
            return deviation * 100, after_s * 1000
    return deviation * 100, SPAN_S * 1000


@contextmanager
def _load(back_end: BackEnd, loadgen: str, case: Case) -> Iterator[list[float]]:
    """A load until the end of the block; the instants at which its requests were answered."""
    times: list[float] = []
    if case.is_nbd:
        is_over = threading.Event()
        thread = threading.Thread(target=_read_nbd, args=(back_end.nbd["d"], case.request_bytes, times, is_over))
        thread.start()
        try:
            yield times
        finally:
            is_over.set()
            thread.join()
        return
    argv = [loadgen, back_end.vhost["d"], str(back_end.pid), "read", "wait=eventfd", "count=1000000000000", "report=1"]
    argv += [f"bytes={case.request_bytes}", f"blocks={DISK_BYTES // (4 * KIB)}"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    thread = threading.Thread(target=_collect, args=(process, times))
    thread.start()
    try:
        yield times
        if process.poll() is not None:
            raise BenchFault(f"the load ended early, with status {process.returncode}")
    finally:
        process.terminate()
        thread.join()
        process.wait()


def _collect(process: subprocess.Popen[str], times: list[float]) -> None:
    assert process.stdout is not None
    counted = 0
    for line in process.stdout:
        at, count = line.split()
        times.extend([float(at)] * (int(count) - counted))
        counted = int(count)


def _read_nbd(path: str, size_bytes: int, times: list[float], is_over: threading.Event) -> None:
    with NbdClient(path) as client:
        buffer = bytearray(size_bytes)
        place = 0
        while not is_over.is_set():
            client.pread(place, buffer)
            times.append(time.monotonic())
            place = (place + 7 * size_bytes) % (DISK_BYTES - size_bytes) // 4096 * 4096
