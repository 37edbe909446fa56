"""A yard of machines for a test: short paths below /tmp, and nothing is left behind, not even by a run that died.

from tests.framework.machines import yard  # the fixture
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator

import pytest

from mullion.base.paths import HostPaths, PartitionPaths
from mullion.base.process import ProcessIdentity, read_identity, write_identity
from mullion.base.units import MIB
from mullion.hypervisor.cmdline import MachineSpec, ResolvedDisk
from mullion.model.definition import Accelerator, DirectBoot, Firmware, Machine, PartitionDefinition

_PREFIX = "/tmp/mullion-yard-"
_OWNER = "owner.pid"


class Yard:
    """Specifications of machines below one folder; `close` ends what still runs there."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix=_PREFIX)
        mine = ProcessIdentity.of(os.getpid())
        assert mine is not None
        write_identity(f"{self.folder}/{_OWNER}", mine)
        self.host = HostPaths(f"{self.folder}/data", f"{self.folder}/run")

    def paths(self, name: str = "p") -> PartitionPaths:
        return self.host.partition(name)

    def spec(
        self,
        name: str = "p",
        *,
        memory_bytes: int = 64 * MIB,
        machine: Machine = Machine.Q35,
        firmware: Firmware = Firmware.BIOS,
        direct_boot: DirectBoot | None = None,
        disks: tuple[ResolvedDisk, ...] = (),
        run_as: tuple[int, int] | None = None,
    ) -> MachineSpec:
        definition = PartitionDefinition(
            name, memory_bytes=memory_bytes, machine=machine, firmware=firmware, direct_boot=direct_boot
        )
        return MachineSpec(definition, str(uuid.uuid4()), self.paths(name), Accelerator.TCG, disks=disks, run_as=run_as)

    def close(self) -> None:
        _clear(self.folder)


@pytest.fixture
def yard() -> Iterator[Yard]:
    """A yard; first those of test runs that died are cleared."""
    for folder in glob.glob(f"{_PREFIX}*"):
        owner = read_identity(f"{folder}/{_OWNER}")
        if owner is not None and not owner.is_alive:
            _clear(folder)
    with contextlib.closing(Yard()) as made:
        yield made


def _clear(folder: str) -> None:
    for path in glob.glob(f"{folder}/run/p/*/*.pid"):
        identity = read_identity(path)
        if identity is not None:
            identity.send_signal(signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)
