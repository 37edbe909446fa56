"""A provider is killed with -9 again and again during verified random writes in its guest: what the guest notices.

The guest runs `iocheck`, which writes random blocks, reads back what it wrote, compares every byte, and knows its
longest wait for a request. Peer: the same guest and the same load with nobody killing.
"""

from __future__ import annotations

import signal
import time

from bench.figures import BenchFault, Measure, Row
from bench.runner import Scale
from bench.scene import iocheck_image, service_at_home
from tests.framework.guest_console import INTERRUPT, GuestConsole, logged_in
from tests.framework.iocheck import IocheckProgress, IocheckReport
from tests.framework.service import GUEST_S, Service

from mullion.base.units import MIB
from mullion.hypervisor.cmdline import RECONNECT_S
from mullion.model.definition import DiskAttachment, PartitionDefinition, Transport

BARS_MS = {Transport.NBD: RECONNECT_S * 1000 + 100, Transport.VHOST_USER: 250}
"""Over vhost-user the next provider goes on with the connection, over NBD QEMU makes another."""
_CALM_LINES = 6
"""Progress lines, one a second, of the run in which nobody is killed."""
_STUCK_LINES = 60


def run(scale: Scale) -> list[Row]:
    image = iocheck_image()
    rows = []
    for transport in (Transport.NBD, Transport.VHOST_USER):
        with service_at_home(images=True) as service:
            service.start()
            rows += _measure(service, image.path, transport, scale.kills)
    return rows


def _measure(service: Service, parent: str, transport: Transport, kills: int) -> list[Row]:
    name = transport.value
    with service.client() as client:
        client.create_disk(path=name, parent=parent)
        client.create_disk(path=f"{name}-data", size_bytes=64 * MIB)
        disks = (DiskAttachment(path=name), DiskAttachment(path=f"{name}-data", transport=transport))
        client.create_partition(PartitionDefinition(name=name, memory_bytes=256 * MIB, disks=disks))
        client.wait(client.partition_action(name, "start"))
    service.wait_agent(name)
    with logged_in(service, name) as console:
        _begin(console, seed=1)
        for _ in range(_CALM_LINES):
            console.wait_for("alive")
        calm = _end(console)
        pauses, back_ms, reports = [], [], []
        for number in range(kills):
            _begin(console, seed=number + 2)
            back_ms.append(_kill(service, name))
            _next_writes(console)
            reports.append(_end(console))
            pauses.append(float(reports[-1].longest_pause_ms))
    wrong = sum(report.wrong for report in reports)
    errors = sum(report.errors for report in reports)
    writes = sum(report.writes for report in reports)
    return [
        Row(
            f"guest's pause, provider killed {kills} times, {name}",
            "ms",
            pauses,
            BARS_MS[transport],
            Measure.WORST,
            [float(calm.longest_pause_ms)],
            "no kill",
            note=f"{writes} writes verified",
        ),
        Row(f"from kill to another provider, {name}", "ms", back_ms),
        Row(f"wrong bytes and I/O errors, {name}", "", [wrong + errors], 0, Measure.WORST),
    ]


def _begin(console: GuestConsole, seed: int) -> None:
    line = f"iocheck --device /dev/vdb --seconds 3600 --depth 4 --range 33554432 --seed {seed} --progress\n"
    console.type(line)
    console.wait_for("alive")


def _end(console: GuestConsole) -> IocheckReport:
    console.type(INTERRUPT)
    report = IocheckReport.find(console.wait_for("}"))
    if report is None:
        raise BenchFault("iocheck printed no report")
    console.command("true")
    return report


def _next_writes(console: GuestConsole) -> None:
    """Return when the guest has written more than before: the requests that were under way have been answered."""
    before = None
    for _ in range(_STUCK_LINES):
        console.wait_for("alive")
        progress = IocheckProgress.find("iocheck: alive" + console.wait_for("\n"))
        if progress is None:
            raise BenchFault("a progress line of iocheck is not whole")
        if before is not None and progress.writes > before:
            return
        before = progress.writes
    raise BenchFault(f"the guest's I/O hangs since the provider was killed: {_STUCK_LINES} s without a write")


def _kill(service: Service, name: str) -> float:
    """Milliseconds from the kill until another provider has taken over."""
    old = service.provider(name)
    if old is None or not old.send_signal(signal.SIGKILL):
        raise BenchFault(f"{name} has no provider")
    begun_s = time.perf_counter()
    while True:
        new = service.provider(name)
        if new is not None and new != old and new.is_alive:
            return (time.perf_counter() - begun_s) * 1e3
        if time.perf_counter() - begun_s > GUEST_S:
            raise BenchFault("no provider took over")
        time.sleep(0.002)
