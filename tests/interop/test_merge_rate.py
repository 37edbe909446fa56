"""A merge that is going on keeps another rate at once, and the next service keeps it too."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.framework.service import Service

from mullion.base.errors import InvalidError
from mullion.base.units import KIB, MIB
from mullion.model.states import OperationState
from mullion.model.views import MergeView
from mullion.vhd import inspect_chain, open_chain

pytestmark = pytest.mark.interop

SLOW = 64 * KIB
HELD = 32 * MIB
"""At the slow rate it takes eight minutes: longer than any test waits."""


@pytest.fixture
def service(short_tmp: Path) -> Iterator[Service]:
    made = Service(str(short_tmp), environ={"MULLION_MERGE_RATE": str(SLOW)})
    made.start()
    yield made
    made.end()


def merge_of(service: Service) -> MergeView:
    """The merge, when its worker says its rate."""
    while True:
        with service.client() as client:
            merges = client.checkpoints("web").merges
        if merges and merges[0].limit_bytes_per_s is not None and merges[0].total_bytes:
            return merges[0]
        time.sleep(0.05)


def test_a_merge_keeps_another_rate_at_once(service: Service) -> None:
    service.cli("partition", "create", "web", "--memory", "128M", "--disk", "web,size=64M")
    service.cli("checkpoint", "create", "web", "first")
    content = os.urandom(HELD)
    service.write("web", 0, content)
    service.cli("checkpoint", "create", "web", "second")
    begun = service.cli("checkpoint", "delete", "web", "first", "--no-wait").stdout.strip()

    assert merge_of(service).limit_bytes_per_s == SLOW
    assert "at most 64 KiB/s, as the service is set" in service.cli("checkpoint", "merge-rate", "web").stdout
    with service.client() as client:
        with pytest.raises(InvalidError):
            client.set_merge_rate("web", 1)
        assert client.set_merge_rate("web", 2 * SLOW).merges[0].limit_bytes_per_s == 2 * SLOW
        while "of at most 128 KiB/s" not in client.operation(begun).stage:  # it is told now and then
            time.sleep(0.05)

    service.kill()
    service.start()
    assert merge_of(service).limit_bytes_per_s == 2 * SLOW
    assert service.cli("checkpoint", "merge-rate", "web", "--format", "json").json == {
        "bytes_per_s": 2 * SLOW,
        "is_own": True,
    }
    assert "at most 128 KiB/s" in service.cli("checkpoint", "list", "web").stdout

    assert "web: at most 64 KiB/s, as" in service.cli("checkpoint", "merge-rate", "web", "default").stdout
    assert merge_of(service).limit_bytes_per_s == SLOW
    service.cli("checkpoint", "merge-rate", "web", "unlimited")
    while service.cli("checkpoint", "list", "web", "--format", "json").json["merges"]:
        time.sleep(0.05)
    with service.client() as client:
        ended = client.operation(begun)
        (left,) = client.checkpoints("web").checkpoints
    assert ended.state is not OperationState.RUNNING
    assert [file.path for file in inspect_chain(left.disks[0].path).files] == [f"{service.paths.disks}/web.vhd"]
    found = bytearray(HELD)
    with open_chain(left.disks[0].path, read_only=True) as chain:
        chain.pread(0, found)
    assert found == content
