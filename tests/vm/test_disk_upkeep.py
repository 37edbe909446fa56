"""What is done to the disks of a partition that runs: another provider, a larger size. The guest checks what it reads."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from tests.framework.boot_sector import assemble
from tests.framework.service import Service

from mullion.base.errors import InvalidError, NotFoundError, StateError
from mullion.base.units import MIB
from mullion.model.definition import DiskAttachment, Firmware, PartitionDefinition, Transport
from mullion.vhd import inspect_chain, open_chain

pytestmark = pytest.mark.vm

DEADLINE_S = 120.0
OLD, NEW = 32 * MIB, 64 * MIB


def guest_works(service: Service, name: str, more: int = 3) -> None:
    """Until the guest has verified some more rounds."""
    log = Path(service.paths.partition(name).console_log)

    def dots() -> bytes:
        """What the guest says, behind the BIOS's last words."""
        return (log.read_bytes() if log.exists() else b"").partition(b"Booting from Hard Disk...")[2]

    before = dots().count(b".")
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        said = dots()
        assert not {*b"FB"} & {*said}, said
        if said.count(b".") >= before + more:
            return
        assert time.monotonic() < deadline_s, f"the guest stands still after {said!r}"
        time.sleep(0.05)


@pytest.fixture(params=[Transport.NBD, Transport.VHOST_USER])
def name(request: pytest.FixtureRequest, shared_service: Service, tmp_path: Path) -> str:
    """A partition whose guest writes and reads for ever."""
    service, name = shared_service, f"busy-{request.param.value.replace('_', '-')}"
    with service.client() as client:
        path = client.create_disk(path=name, size_bytes=OLD).path
        with open_chain(path) as disk:
            disk.pwrite(0, assemble(tmp_path))
        client.create_partition(
            PartitionDefinition(
                name=name,
                memory_bytes=64 * MIB,
                firmware=Firmware.BIOS,
                disks=(DiskAttachment(path=name, transport=request.param),),
            )
        )
        client.wait(client.partition_action(name, "start"))
    guest_works(service, name)
    return name


def test_provider_is_upgraded_and_a_disk_grows_under_the_guest(shared_service: Service, name: str) -> None:
    service = shared_service
    first = service.partition(name).provider_pid
    for _ in range(2):
        before = service.partition(name).provider_pid
        done = service.cli("provider", "upgrade", name)
        after = service.partition(name).provider_pid
        assert after not in (before, first, None)
        assert f"provider {before} became {after}" in done.stderr
        with service.client() as client:
            result = client.wait(client.upgrade_provider(name)).result
        assert result is not None
        assert result["is_handed_over"] is True, result
        guest_works(service, name)
    with service.client() as client:
        disk_id = client.partition(name).definition.disks[0].id
        result = client.wait(client.resize_disk(name, disk_id, NEW)).result
    assert result is not None
    assert (result["old_bytes"], result["size_bytes"], result["seen"]) == (OLD, NEW, True), result
    guest_works(service, name)
    path = f"{service.paths.disks}/{name}.vhd"
    assert inspect_chain(path).size_bytes == NEW
    with service.client() as client:
        with pytest.raises(InvalidError, match="cannot become smaller"):
            client.wait(client.resize_disk(name, disk_id, OLD))
        with pytest.raises(NotFoundError, match="without a disk"):
            client.wait(client.resize_disk(name, "none", NEW))
        client.wait(client.partition_action(name, "stop", force=True))
        for refused in (lambda: client.resize_disk(name, disk_id, NEW), lambda: client.upgrade_provider(name)):
            with pytest.raises(StateError):
                refused()
    assert os.stat(path).st_uid == os.geteuid()
    with open_chain(path, read_only=True) as disk:
        assert disk.warnings == []


def test_all_are_upgraded(shared_service: Service) -> None:
    done = shared_service.cli("provider", "upgrade", "--all")
    assert "No partition runs." in done.stderr
    assert shared_service.cli("provider", "upgrade", check=False).status == 2
