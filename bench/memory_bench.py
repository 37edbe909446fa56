"""Memory of the parent and of the providers at twenty partitions with a disk each, their guests paused.

A provider's memory is what it has alone (Private_Clean + Private_Dirty of smaps_rollup): the rest is the zygote's, once
for all. Peers: a Python that has imported what the parent serves with; `qemu-storage-daemon` on a disk like it.
"""

from __future__ import annotations

import os
import subprocess
import sys

from bench.figures import BenchFault, Measure, Row
from bench.runner import Scale
from bench.scene import MULLION, connect, small_partitions, start_paused, time_command

from mullion.base.units import MIB
from mullion.vhd import create_dynamic

PARENT_BAR_MIB = 80.0
PROVIDER_BAR_MIB = 4.0
_LISTS = 20
_GREETING_BYTES = 18
_IMPORTS = "import asyncio, litestar, uvicorn, msgspec, sqlite3, qemu.qmp, sys; print(); sys.stdin.read()"


def run(scale: Scale) -> list[Row]:
    with small_partitions(scale.partitions) as (service, names):
        with service.client() as client:
            start_paused(client, names)
            for _ in range(_LISTS):
                client.partitions()
        time_command(service, MULLION, "partition", "list")
        assert service.process is not None
        providers = [service.provider(name) for name in names]
        private = [_private_mib(provider.pid) for provider in providers if provider is not None]
        if len(private) != len(names):
            raise BenchFault("not every partition has a provider")
        parent = [_resident_mib(service.process.pid)]
        return [
            Row(
                f"parent, resident, {len(names)} partitions",
                "MiB",
                parent,
                PARENT_BAR_MIB,
                Measure.WORST,
                [_libraries_mib()],
                "Python with the libraries",
            ),
            Row(
                f"provider, private, {len(names)} of them",
                "MiB",
                private,
                PROVIDER_BAR_MIB,
                Measure.WORST,
                [_storage_daemon_mib(f"{service.home}/peer")],
                "qemu-storage-daemon",
            ),
        ]


def _resident_mib(pid: int) -> float:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:")) / 1024


def _private_mib(pid: int) -> float:
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        kib = sum(int(line.split()[1]) for line in file if line.startswith(("Private_Clean:", "Private_Dirty:")))
    return kib / 1024


def _libraries_mib() -> float:
    with subprocess.Popen([sys.executable, "-c", _IMPORTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        return _resident_mib(child.pid)


def _storage_daemon_mib(folder: str) -> float:
    os.makedirs(folder)
    create_dynamic(f"{folder}/disk.vhd", 64 * MIB)
    with subprocess.Popen(
        [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=file,filename={folder}/disk.vhd"),
            *("--blockdev", "driver=vpc,node-name=disk,file=file"),
            *("--nbd-server", f"addr.type=unix,addr.path={folder}/nbd"),
            *("--export", "type=nbd,id=e,node-name=disk,name=disk0,writable=on"),
        ],
        stderr=subprocess.DEVNULL,  # it complains that the client hangs up
    ) as child:
        try:
            with connect(f"{folder}/nbd") as client:
                client.recv(_GREETING_BYTES)
            return _private_mib(child.pid)
        finally:
            child.terminate()
