"""From nothing to a monitor that answers: `Machine.start` against the same command line without us.

Bars (issue 2): one start at most 1.5 x a bare QEMU; 20 paused ones at once at most 2 x. Both sides are timed to the
reply to `query-status`, in turns, so that a busy host slows both; printed are medians, spread and the ratio.

    python bench/start_bench.py [--rounds 9] [--burst 20] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence

from mullion.base.paths import HostPaths
from mullion.base.units import MIB
from mullion.hypervisor import Machine, MachineSpec, cmdline
from mullion.model.definition import Accelerator, PartitionDefinition

BAR_ONE = 1.5
BAR_BURST = 2.0


def spec_of(host: HostPaths, name: str) -> MachineSpec:
    definition = PartitionDefinition(name, memory_bytes=128 * MIB)
    return MachineSpec(definition, str(uuid.uuid4()), host.partition(name), Accelerator.TCG)


def bare(specs: Sequence[MachineSpec]) -> float:
    """Start all, then talk to each in turn, as the plainest program would. Returns seconds."""
    for spec in specs:
        os.makedirs(spec.paths.run, exist_ok=True)
        os.makedirs(spec.paths.data, exist_ok=True)
    begun = time.perf_counter()
    children = []
    for spec in specs:
        with open(spec.paths.qemu_log, "ab") as log:
            # A session each, as ours: the scheduler gives shares to sessions (autogroup).
            children.append(
                subprocess.Popen(
                    cmdline(spec), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            )
    for spec in specs:
        ask(spec.paths.qmp)
    took_s = time.perf_counter() - begun
    for child in children:
        child.kill()
    for child in children:
        child.wait()
    for spec in specs:
        shutil.rmtree(spec.paths.run)
    return took_s


def ask(path: str) -> None:
    """Wait for the socket, a millisecond at a time; agree on capabilities; ask for the state."""
    with socket.socket(socket.AF_UNIX) as client:
        while True:
            try:
                client.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.001)
        with client.makefile("rwb") as stream:
            stream.readline()
            for command in ("qmp_capabilities", "query-status"):
                stream.write(json.dumps({"execute": command}).encode())
                stream.flush()
                assert b"return" in stream.readline()


async def ours(specs: Sequence[MachineSpec]) -> float:
    begun = time.perf_counter()
    machines = await asyncio.gather(*(Machine.start(spec) for spec in specs))
    took_s = time.perf_counter() - begun
    for machine in machines:
        await machine.kill()
        await machine.close()
    return took_s


def compare(host: HostPaths, count: int, rounds: int) -> dict[str, float]:
    pairs = []
    with asyncio.Runner() as runner:
        for turn in range(rounds + 1):
            specs = [spec_of(host, f"p{number}") for number in range(count)]
            pair = bare(specs), runner.run(ours(specs))
            if turn:  # the first turn fills the caches
                pairs.append(pair)
    bare_s, ours_s = zip(*pairs, strict=True)
    return {
        "machines": count,
        "bare_ms": statistics.median(bare_s) * 1000,
        "bare_min_ms": min(bare_s) * 1000,
        "bare_max_ms": max(bare_s) * 1000,
        "mullion_ms": statistics.median(ours_s) * 1000,
        "mullion_min_ms": min(ours_s) * 1000,
        "mullion_max_ms": max(ours_s) * 1000,
        "ratio": statistics.median(ours_s) / statistics.median(bare_s),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--burst", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="mullion-bench-")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        host = HostPaths(f"{folder}/d", f"{folder}/r")
        results = [
            {**compare(host, 1, options.rounds), "bar": BAR_ONE},
            {**compare(host, options.burst, max(5, options.rounds // 2)), "bar": BAR_BURST},
        ]
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        for row in results:
            print(
                f"start of {row['machines']:.0f} to a monitor that answers: "
                f"bare QEMU {row['bare_ms']:.0f} ms ({row['bare_min_ms']:.0f}-{row['bare_max_ms']:.0f}), "
                f"Machine.start {row['mullion_ms']:.0f} ms ({row['mullion_min_ms']:.0f}-{row['mullion_max_ms']:.0f}), "
                f"ratio {row['ratio']:.2f}, bar {row['bar']:.1f}"
            )
    return int(any(row["ratio"] > row["bar"] for row in results))


if __name__ == "__main__":
    sys.exit(main())
