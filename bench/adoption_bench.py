"""The parent is killed with -9 under running guests that verify their own I/O: how soon it has all of them again.

From the start of the new service's process: until its log says that the partitions are adopted, and until the API gives
its first answer, which must show all of them running with the processes they had. Peer: the same service started where
there is nothing to adopt.
"""

from __future__ import annotations

import calendar
import re
import time

from bench.figures import BenchFault, Measure, Row
from bench.runner import Scale
from bench.scene import iocheck_image, service_at_home
from tests.framework.guest_console import logged_in
from tests.framework.iocheck import IocheckReport
from tests.framework.service import GUEST_S, Service

from mullion.base.units import MIB
from mullion.model.definition import DiskAttachment, PartitionDefinition
from mullion.model.states import PartitionState

BAR_S = 1.0
_ROUNDS = 7
_REST_S = 2.0
_STOPPED = "iocheck has stopped"
_CHECK = (
    "setsid sh -c 'n=1; while iocheck --device /dev/vdb --writes 40 --depth 2 --range 8388608 --seed $n >/dev/ttyS0"
    f" 2>&1; do n=$((n+1)); sleep 1; done; echo {_STOPPED} >/dev/ttyS0' &"
)
"""A guest's work: writes and reads verified, then a second of rest, so that ten guests fit on two cores. Its reports go
to the console, whose log QEMU writes itself, whoever watches."""
_ADOPTED = re.compile(r"^(\S+?)Z .*partitions are adopted", re.MULTILINE)


def run(scale: Scale) -> list[Row]:
    image = iocheck_image()
    with service_at_home(images=True) as service:
        service.start()
        names = [f"g{number}" for number in range(scale.guests)]
        with service.client() as client:
            for name in names:
                client.create_disk(path=name, parent=image.path)
                client.create_disk(path=f"{name}-data", size_bytes=64 * MIB)
                disks = (DiskAttachment(path=name), DiskAttachment(path=f"{name}-data"))
                client.create_partition(PartitionDefinition(name=name, memory_bytes=160 * MIB, disks=disks))
                client.partition_action(name, "start")
        for name in names:
            service.wait_agent(name)
            with logged_in(service, name) as console:
                console.type(f"{_CHECK}\n")
                console.wait_for('"wrong"')
        adopted, answered = _kill_and_restart(service, names)
        reports = [report for name in names for report in _reports_to_the_end(service, name)]
    with service_at_home() as empty:
        peer = []
        for _ in range(_ROUNDS + 1):
            peer.append(empty.start())
            empty.kill()
    wrong, errors = sum(report.wrong for report in reports), sum(report.errors for report in reports)
    note = (
        f"the guests' I/O: {sum(report.writes for report in reports)} writes verified, {wrong} wrong, {errors} errors, "
        f"longest pause {max(report.longest_pause_ms for report in reports)} ms"
    )
    peer_name = "the service with no partition"
    return [
        Row(f"{len(names)} running guests, until adopted", "s", adopted, BAR_S, Measure.MEDIAN, note=note),
        Row(f"{len(names)} running guests, first answer", "s", answered, BAR_S, Measure.MEDIAN, peer[1:], peer_name),
        Row("wrong bytes and I/O errors", "", [wrong + errors], 0, Measure.WORST),
    ]


def _kill_and_restart(service: Service, names: list[str]) -> tuple[list[float], list[float]]:
    """Seconds until adopted, by the log, and until the first answer, of each round."""
    adopted, answered = [], []
    for _ in range(_ROUNDS):
        before = {name: (service.qemu(name), service.provider(name)) for name in names}
        service.kill()
        begun_s = time.time()
        answered.append(service.start())
        with service.client() as client:
            views = client.partitions()
        for view in views:
            qemu, provider = before[view.name]
            if qemu is None or provider is None or view.state is not PartitionState.RUNNING:
                raise BenchFault(f"{view.name} is {view.state}: {view.reason}")
            if (view.qemu_pid, view.provider_pid) != (qemu.pid, provider.pid):
                raise BenchFault(f"{view.name} has other processes than before the parent was killed")
        if len(views) != len(names):
            raise BenchFault(f"{len(views)} of {len(names)} partitions are there after the restart")
        adopted.append(_adopted_at(service) - begun_s)
        time.sleep(_REST_S)  # the guests go on in between
    return adopted, answered


def _adopted_at(service: Service) -> float:
    """When the log says so, last: seconds since the epoch."""
    stamp = _ADOPTED.findall(service.tail("data/mullion.log", 20_000))[-1]
    whole, _, part = stamp.partition(".")
    return calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) + float(f"0.{part}")


def _reports_to_the_end(service: Service, name: str) -> list[IocheckReport]:
    """What the guest has found so far; two more rounds after the last restart show that it goes on."""
    before = len(_reports(service, name))
    until_s = time.monotonic() + GUEST_S
    while len(reports := _reports(service, name)) < before + 2:
        if time.monotonic() > until_s:
            raise BenchFault(f"the guest of {name} does not go on: {service.console(name)}")
        time.sleep(0.2)
    return reports


def _reports(service: Service, name: str) -> list[IocheckReport]:
    with open(service.paths.partition(name).console_log, encoding="utf-8", errors="replace") as log:
        printed = log.read()
    if f"\n{_STOPPED}" in printed:
        raise BenchFault(f"the guest of {name} found fault with its disk: {printed[-3000:]}")
    return [report for line in printed.splitlines() if (report := IocheckReport.find(line)) is not None]
