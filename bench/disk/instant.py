"""Instant restore: how much later than from a full restore does a guest's agent answer, when its blocks are not there?

Both are restored from the same backup in a local folder. The clock runs from the start of the partition, not from the
restore, so the peer's side is its boot alone: the bar of two seconds is for reading through the backup.
"""

from __future__ import annotations

import time
from typing import Final

from bench.figures import BenchFault, Measure, Row
from bench.runner import Scale
from bench.scene import demo_image, service_at_home
from tests.framework.service import Service

from mullion.base.units import MIB
from mullion.model.definition import DiskAttachment, PartitionDefinition

LATER_BAR_S: Final = 2.0
_NAME: Final = "bench"


def run(scale: Scale) -> list[Row]:
    rounds = 2 if scale.quick else 5
    later, boots, restores = [], [], []
    with service_at_home(images=True) as service:
        service.start()
        backup = _backed_up(service)
        for number in range(rounds):
            service.cli("backup", "restore", backup, "--as", f"full{number}")
            full_s = _boot(service, f"full{number}")
            begun_s = time.perf_counter()
            service.cli("backup", "restore", backup, "--as", f"instant{number}", "--instant")
            restores.append(time.perf_counter() - begun_s)
            later.append(_boot(service, f"instant{number}") - full_s)
            boots.append(full_s)
    return [
        Row("agent answers, later than from a full restore", "s", later, LATER_BAR_S, Measure.MEDIAN),
        Row("boot from a full restore", "s", boots, None, Measure.MEDIAN),
        Row("the command of an instant restore", "s", restores, None, Measure.MEDIAN),
    ]


def _backed_up(service: Service) -> str:
    """A backup of a partition with the demo guest, which has run once."""
    image = demo_image()
    with service.client() as client:
        client.create_disk(path=_NAME, parent=image.path)
        client.create_partition(
            PartitionDefinition(name=_NAME, memory_bytes=256 * MIB, disks=(DiskAttachment(path=_NAME),))
        )
        client.wait(client.partition_action(_NAME, "start"))
        service.wait_agent(_NAME)
        client.wait(client.partition_action(_NAME, "stop"))
        client.add_repository("near", f"{service.home}/repository", "a passphrase", create=True)
        done = client.wait(client.create_backup(_NAME))
    backup = (done.result or {}).get("backup")
    if not isinstance(backup, str):
        raise BenchFault(f"no backup was made: {done}")
    return backup


def _boot(service: Service, name: str) -> float:
    """Seconds from the start until the agent answers; then the partition goes, so that the next has the host alone."""
    begun_s = time.perf_counter()
    service.cli("partition", "start", name)
    service.wait_agent(name)
    took_s = time.perf_counter() - begun_s
    service.cli("partition", "stop", name, "--force")
    service.cli("partition", "delete", name, "--with-disks", "--yes")
    return took_s
