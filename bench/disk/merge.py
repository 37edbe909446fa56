"""Merging a frozen layer of 2 GiB under a writing load, against QEMU's `block-commit` of the same layer in QCOW2.

A chain of three: base, a layer that holds 2 GiB of it, and the top, on which the load overwrites 4 KiB at a time, eight
requests in flight, all over 256 MiB that the top holds already. Ours: a provider serves the chain, the merge worker
merges at its default rate. Peer: `qemu-storage-daemon` serves the same in QCOW2 (io_uring, an iothread) and commits at
its default, which is no limit. The load is the same program on both sides. What is said is the slowdown: how much
longer a request takes while it is merged than before and after; less than nothing, which is noise, counts as nothing.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from bench.figures import BenchFault, Measure, Row
from bench.runner import Scale
from bench.vhd.scratch import disk_folder, run_program, scratch_folder, sync_file
from tests.framework.providers import ZygotePeer

from mullion.base.units import GIB, KIB, MIB, format_size
from mullion.provider.merge_spec import MergeSpec
from mullion.provider.spec import DiskSpec, ProviderSpec
from mullion.vhd import create_differencing, create_dynamic, open_chain

DISK_BYTES: Final = 4 * GIB
LOAD_BYTES: Final = 256 * MIB
LOAD_FIRST: Final = 3 * GIB // (4 * KIB)
"""The load's own part of the disk, in its blocks: the layer that is merged lies before it."""
PIECE_BYTES: Final = MIB
CALM_S: Final = 4.0
"""So long the load is watched alone, before the merge and after it; the first second of each does not count."""
LEAST_PERCENT: Final = 1.0
"""A peer that is slowed down by less is taken for one that is slowed down by this."""
BAR: Final = 0.5

LOADGEN: Final = Path(__file__).parents[1] / "vhost_loadgen.c"


def run(scale: Scale) -> list[Row]:
    layer_bytes = 512 * MIB if scale.quick else 2 * GIB
    rounds = 2 if scale.quick else 5
    with scratch_folder(disk_folder()) as folder:
        os.chmod(folder, 0o755)
        loadgen = f"{folder}/loadgen"
        run_program("gcc", "-O2", "-o", loadgen, str(LOADGEN))
        rows = []
        for name, options, bar in (
            ("4K overwrites", (), BAR),
            ("4K overwrites, every 64 a flush", ("flush=64",), None),
        ):
            ours: list[tuple[float, float]] = []
            peer: list[tuple[float, float]] = []
            for number in range(rounds):
                sides = [(measure_ours, ours), (measure_peer, peer)]
                for measure, figures in sides if number % 2 else reversed(sides):
                    figures.append(measure(folder, loadgen, layer_bytes, options))
            what = f"slowdown by merging {format_size(layer_bytes)}: {name}"
            took = f"the merge took {_seconds(ours)}, block-commit {_seconds(peer)}"
            rows.append(
                Row(
                    what,
                    "%",
                    [slowdown for slowdown, _ in ours],
                    bar,
                    Measure.RATIO,
                    [max(LEAST_PERCENT, slowdown) for slowdown, _ in peer],
                    "block-commit (QCOW2)",
                    took,
                )
            )
        return rows


def _seconds(figures: list[tuple[float, float]]) -> str:
    took = sorted(seconds for _, seconds in figures)
    return f"{took[len(took) // 2]:.1f} s ({took[0]:.1f} to {took[-1]:.1f})"


class Load:
    """The load generator, running; how many requests were done by when."""

    def __init__(self, loadgen: str, address: str, pid: int, options: tuple[str, ...]) -> None:
        self._times: list[float] = []
        self._counts: list[int] = []
        range_ = (f"first={LOAD_FIRST}", f"blocks={LOAD_BYTES // (4 * KIB)}")
        run_program(loadgen, address, str(pid), "fill", "bytes=1048576", "depth=8", *range_)
        argv = [loadgen, address, str(pid), "randwrite", "depth=8", "wait=eventfd", "count=1000000000000", "report=200"]
        self._process = subprocess.Popen([*argv, *range_, *options], stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read, name="load")
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            at, count = line.split()
            self._counts.append(int(count))
            self._times.append(float(at))

    def request_s(self, begin_s: float, end_s: float) -> float:
        """Seconds of the clock for a request, on the average between two instants."""
        first, last = bisect_left(self._times, begin_s), bisect_left(self._times, end_s) - 1
        if last <= first:
            raise BenchFault(f"the load did nothing for {end_s - begin_s:.2f} s")
        return (self._times[last] - self._times[first]) / (self._counts[last] - self._counts[first])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_there = self._process.poll() is None
        self._process.kill()
        self._process.wait()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        if error is None and not is_there:
            raise BenchFault("the load generator ended before the merge")


def slowdown(load: Load, merge: Callable[[], None]) -> tuple[float, float]:
    """Percent by which a request takes longer while `merge` runs, and the seconds that it runs."""
    time.sleep(CALM_S)
    begun_s = time.monotonic()
    merge()
    ended_s = time.monotonic()
    time.sleep(CALM_S + 0.1)
    before, after = load.request_s(begun_s - CALM_S + 1, begun_s), load.request_s(ended_s + 1, ended_s + CALM_S)
    while_merged = load.request_s(begun_s, ended_s)
    return max(0.0, (while_merged / ((before + after) / 2) - 1) * 100), ended_s - begun_s


# ---------------------------------------------------------------------- ours


def measure_ours(folder: str, loadgen: str, layer_bytes: int, options: tuple[str, ...]) -> tuple[float, float]:
    with scratch_folder(folder) as work:
        base, layer, top = (f"{work}/{name}.vhd" for name in ("base", "layer", "top"))
        create_dynamic(base, DISK_BYTES)
        create_differencing(layer, base)
        with open_chain(layer) as chain:
            for offset in range(0, layer_bytes, PIECE_BYTES):
                chain.pwrite(offset, bytes([1 + offset // PIECE_BYTES % 250]) * PIECE_BYTES)
        create_differencing(top, layer)
        settle(base, layer)
        zygote = ZygotePeer()
        try:
            disk = DiskSpec("d", (top, layer, base), vhost_user=f"{work}/v", nbd=f"{work}/n")
            provider = zygote.spawn(ProviderSpec("p", (disk,), f"{work}/c", f"{work}/log", f"{work}/pending"))
            if not provider.get("ready"):
                raise BenchFault(f"the provider did not start: {provider}")
            with Load(loadgen, f"{work}/v", provider["pid"], options) as load:
                return slowdown(load, lambda: merge_ours(zygote, work, layer, base))
        finally:
            zygote.end()


def merge_ours(zygote: ZygotePeer, work: str, upper: str, lower: str) -> None:
    spec = MergeSpec("p", upper, lower, f"{work}/m", f"{work}/m.pid", f"{work}/m.result", f"{work}/m.log")
    zygote.send({"id": 2, "merge": spec.to_wire()})
    answer = zygote.receive()
    if not answer.get("ready") or zygote.receive().get("status") != 0:
        raise BenchFault(f"the merge failed: {answer}; {Path(spec.result).read_text()}")


# ---------------------------------------------------------------------- the peer


def measure_peer(folder: str, loadgen: str, layer_bytes: int, options: tuple[str, ...]) -> tuple[float, float]:
    with scratch_folder(folder) as work:
        names = ("base", "layer", "top")
        for number, name in enumerate(names):
            backing = ("-b", f"{names[number - 1]}.qcow2", "-F", "qcow2") if number else ()
            run_program("qemu-img", "create", "-q", "-f", "qcow2", *backing, f"{work}/{name}.qcow2", str(DISK_BYTES))
        script = "".join(
            f"write -q -P {1 + offset // PIECE_BYTES % 250} {offset} {PIECE_BYTES}\n"
            for offset in range(0, layer_bytes, PIECE_BYTES)
        )
        line = ["qemu-io", "-f", "qcow2", f"{work}/layer.qcow2"]
        if subprocess.run(line, input=script, text=True, stdout=subprocess.DEVNULL, check=False).returncode:
            raise BenchFault("qemu-io failed")
        settle(f"{work}/base.qcow2", f"{work}/layer.qcow2")
        with Daemon(work) as daemon, Load(loadgen, f"{work}/v", daemon.pid, options) as load:
            return slowdown(load, daemon.commit)


class Daemon:
    """`qemu-storage-daemon` that serves the chain."""

    def __init__(self, work: str) -> None:
        nodes: list[str] = []
        for name, backing in (("base", ""), ("layer", ",backing=base"), ("top", ",backing=layer")):
            file = f"file.driver=file,file.filename={work}/{name}.qcow2,file.aio=io_uring"
            nodes += ["--blockdev", f"driver=qcow2,node-name={name},{file}{backing}"]
        export = f"type=vhost-user-blk,id=e,node-name=top,addr.type=unix,addr.path={work}/v,writable=on,iothread=io"
        monitor = ("--chardev", f"socket,id=c,path={work}/qmp,server=on,wait=off", "--monitor", "chardev=c")
        argv = ["qemu-storage-daemon", *monitor, *nodes, "--object", "iothread,id=io", "--export", export]
        self._process = subprocess.Popen(argv)
        self.pid = self._process.pid
        while not os.path.exists(f"{work}/v"):
            if self._process.poll() is not None:
                raise BenchFault("qemu-storage-daemon did not start")
            time.sleep(0.02)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(f"{work}/qmp")
        self._lines = self._socket.makefile("rw", encoding="utf-8")
        self._lines.readline()
        self._execute("qmp_capabilities")

    def commit(self) -> None:
        """Merge the layer into the base, durable at the end, as ours is: `block-commit` flushes when it is done."""
        self._execute("block-commit", **{"job-id": "j", "device": "top", "top-node": "layer", "base-node": "base"})
        while True:
            message = json.loads(self._lines.readline())
            if message.get("event") == "BLOCK_JOB_COMPLETED":
                if "error" in message["data"]:
                    raise BenchFault(f"block-commit failed: {message}")
                return

    def _execute(self, command: str, **arguments: Any) -> None:
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._lines.flush()
        while True:
            message = json.loads(self._lines.readline())
            if "error" in message:
                raise BenchFault(f"{command}: {message['error']}")
            if "return" in message:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._lines.close()
        self._socket.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


def settle(*paths: str) -> None:
    """Nothing of making the disks is still to be written."""
    for path in paths:
        sync_file(path)


if __name__ == "__main__":
    for row in run(Scale(quick=True)):
        print(row.lines())
