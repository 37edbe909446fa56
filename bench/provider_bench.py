"""The provider against qemu-storage-daemon: CPU per request of the back-end's process, same load, same run.

Peer: `qemu-storage-daemon`, vpc driver, aio=io_uring, vhost-user-blk export. The load generator (`vhost_loadgen.c`) is
a front-end that checks every byte; a run with a wrong byte or a failed request is an error. Rounds are interleaved;
what is printed is the median of the rounds with the spread. Ratios are the promise, microseconds say what this machine
did.

Bars (exit status 1 when one is missed): 4K random read at depth 32, dynamic disk, warm, the guest sleeping between
interrupts as guests do: at most 0.9 times the peer; a chain of 8 at most 1.3 times a chain of 1; private memory at most
4 MiB a provider with 20 of them, each having served 20,000 reads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mullion.base.units import MIB
from mullion.provider.control_client import encode
from mullion.provider.spec import DiskSpec, ProviderSpec
from mullion.provider.zygote import spawn_argv
from mullion.vhd import create_differencing, create_dynamic, open_chain

SIZE_BYTES = 256 * MIB
BLOCKS = 60_000  # what QEMU 7.2, which rounds down to cylinders, has of it too
BLOCK_BYTES = 4096
DEPTH = 8
PROVIDERS = 20
READ_BAR, DEPTH_BAR, MEMORY_BAR_KIB = 0.9, 1.3, 4096

HERE = Path(__file__).parent


def pattern(block: int) -> bytes:
    """What the load generator expects in a block."""
    first = block * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    words = ((first ^ (number << 48) ^ block) & 0xFFFFFFFFFFFFFFFF for number in range(BLOCK_BYTES // 8))
    return b"".join(word.to_bytes(8, "little") for word in words)


class Bench:
    """The folder, the processes and the figures of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loadgen = str(folder / "loadgen")
        subprocess.run(["gcc", "-O2", "-o", self.loadgen, str(HERE / "vhost_loadgen.c")], check=True)
        self.parent, theirs = socket.socketpair()
        with theirs:
            self.zygote = subprocess.Popen(spawn_argv(theirs.fileno()), pass_fds=[theirs.fileno()])
        self.lines = self.parent.makefile("rb")
        self.peer: subprocess.Popen[bytes] | None = None
        self.pids: list[int] = []

    def spawn(self, name: str, chains: list[list[str]]) -> tuple[int, list[str]]:
        """A provider; its pid and the sockets of its disks."""
        home = self.folder / name
        home.mkdir()
        disks = tuple(
            DiskSpec(f"d{number}", tuple(chain), vhost_user=f"{home}/v{number}", nbd=f"{home}/n{number}")
            for number, chain in enumerate(chains)
        )
        spec = ProviderSpec(name, disks, f"{home}/control", f"{home}/log", f"{home}/pending")
        self.parent.sendall(encode({"id": name, "spawn": spec.to_wire()}))
        answer = json.loads(self.lines.readline())
        if not answer.get("ready"):
            raise SystemExit(f"the provider did not start: {answer}")
        self.pids.append(answer["pid"])
        return answer["pid"], [str(disk.vhost_user) for disk in disks]

    def start_peer(self, path: str) -> tuple[int, str]:
        address = str(self.folder / "peer")
        self.peer = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"driver=file,node-name=file,filename={path},aio=io_uring"),
                *("--blockdev", "driver=vpc,node-name=disk,file=file"),
                "--export",
                f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={address},writable=on",
            ]
        )
        while not os.path.exists(address):
            if self.peer.poll() is not None:
                raise SystemExit("qemu-storage-daemon did not start")
            time.sleep(0.02)
        return self.peer.pid, address

    def measure(self, target: tuple[int, str], kind: str, **options: object) -> float:
        """Microseconds of the back-end's CPU a request."""
        pid, address = target
        settings = [f"{name}={value}" for name, value in options.items()]
        done = subprocess.run([self.loadgen, address, str(pid), kind, *settings], check=False, capture_output=True)
        if done.returncode:
            raise SystemExit(f"the load generator found fault with {address}: {done}")
        return float(json.loads(done.stdout)["cpu_us"])

    def private_kib(self, pid: int) -> int:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("Private_"))

    def stop_providers(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGTERM)
        for _pid in self.pids:
            ended = json.loads(self.lines.readline())
            if ended.get("status") != 0:
                raise SystemExit(f"a provider ended badly: {ended}")
        self.pids.clear()

    def close(self) -> None:
        if self.peer is not None:
            self.peer.terminate()
            self.peer.wait()
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        self.lines.close()
        self.parent.close()
        self.zygote.wait()


def build_chain(base: str, folder: Path) -> list[str]:
    """Eight files whose 4 KiB pieces lie all over them; the content is the pattern everywhere."""
    choose = random.Random(8)
    chain = [base]
    for number in range(1, DEPTH):
        path = str(folder / f"child{number}.vhd")
        create_differencing(path, chain[0])
        chain.insert(0, path)
        with open_chain(path) as disk:
            for block in range(BLOCKS):
                if choose.randrange(DEPTH) == 0:
                    disk.pwrite(block * BLOCK_BYTES, pattern(block))
    return chain


def warm(paths: list[str]) -> None:
    """Bring files into the page cache alike, page by page as random reads do, whoever wrote them and however."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            for offset in range(0, os.fstat(fd).st_size, BLOCK_BYTES):
                os.pread(fd, BLOCK_BYTES, offset)
        finally:
            os.close(fd)


def spread(figures: list[float]) -> str:
    return f"{statistics.median(figures):.2f} ({min(figures):.2f} to {max(figures):.2f})"


def compare(bench: Bench, disks: dict[str, tuple[int, str]], rounds: int, count: int) -> bool:
    """Print the figures; whether the bars hold."""
    cases = {
        "4K random read, depth 32": ("read", {"wait": "eventfd"}),
        "4K random read, depth 32, polling guest": ("read", {"wait": "busy"}),
        "4K random read, depth 1": ("read", {"wait": "eventfd", "depth": 1, "count": count // 8}),
        "64K random read, depth 32": ("read", {"wait": "eventfd", "bytes": 65536, "count": count // 8}),
        "4K random overwrite, depth 32": ("randwrite", {"wait": "eventfd", "count": count // 4}),
    }
    holds = True
    for name, (kind, options) in cases.items():
        figures: dict[str, list[float]] = {disk: [] for disk in disks}
        for number in range(rounds):
            for disk, target in disks.items():
                if disk == "deep" and kind == "randwrite":
                    continue
                settings = {"count": count, "warm": count // 10, "blocks": BLOCKS, "seed": number, **options}
                figures[disk].append(bench.measure(target, kind, **settings))
        ours, peer, deep = figures["ours"], figures["peer"], figures["deep"]
        ratios = [mine / theirs for mine, theirs in zip(ours, peer, strict=True)]
        print(f"{name}: {spread(ours)} us, peer {spread(peer)} us, ratio {spread(ratios)}")
        if name == "4K random read, depth 32" and statistics.median(ratios) > READ_BAR:
            holds = False
        if deep:
            depths = [below / flat for below, flat in zip(deep, ours, strict=True)]
            print(f"    chain of {DEPTH}: {spread(deep)} us, ratio to a chain of 1 {spread(depths)}")
            if name == "4K random read, depth 32" and statistics.median(depths) > DEPTH_BAR:
                holds = False
    return holds


def weigh(bench: Bench) -> bool:
    """Private memory of 20 providers that have served; whether the bar holds."""
    started = []
    for number in range(PROVIDERS):
        path = str(bench.folder / f"small{number}.vhd")
        create_dynamic(path, 64 * MIB)
        begin = time.perf_counter()
        pid, (address,) = bench.spawn(f"m{number}", [[path]])
        started.append((time.perf_counter() - begin) * 1e3)
        bench.measure((pid, address), "fill", bytes=65536)
        bench.measure((pid, address), "read", count=20_000, wait="eventfd")
    weights = [bench.private_kib(pid) for pid in bench.pids]
    print(f"request to ready, {PROVIDERS} providers: {spread(started)} ms")
    print(f"private memory, {PROVIDERS} providers: {spread([float(weight) for weight in weights])} KiB")
    return statistics.median(weights) <= MEMORY_BAR_KIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=100_000, help="requests a measurement")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mpb-", dir="/tmp"))
    bench = Bench(folder)
    try:
        base = str(folder / "base.vhd")
        create_dynamic(base, SIZE_BYTES)
        pid, (address,) = bench.spawn("fill", [[base]])
        bench.measure((pid, address), "fill", bytes=MIB, depth=8)
        bench.stop_providers()
        for copy in ("peer.vhd", "flat.vhd"):
            shutil.copyfile(base, folder / copy)
        chain = build_chain(base, folder)
        warm([str(folder / "peer.vhd"), str(folder / "flat.vhd"), *chain])
        pid, (flat, deep) = bench.spawn("bench", [[str(folder / "flat.vhd")], chain])
        disks = {"peer": bench.start_peer(str(folder / "peer.vhd")), "ours": (pid, flat), "deep": (pid, deep)}
        holds = compare(bench, disks, arguments.rounds, arguments.count)
        bench.stop_providers()
        holds = weigh(bench) and holds
        bench.stop_providers()
        print("all bars hold" if holds else "a bar is missed")
        return 0 if holds else 1
    finally:
        bench.close()
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
