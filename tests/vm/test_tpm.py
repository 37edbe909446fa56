"""A partition with a TPM: the guest talks to it, it keeps what it knows, and it comes and goes with QEMU."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path

import pytest
from tests.framework.guest_console import logged_in
from tests.framework.service import Service

from mullion.base.process import ProcessIdentity, read_identity
from mullion.hypervisor.firmware_state import copy_firmware_state, restore_firmware_state

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

NAME = "web"

# TPM 2.0 Library, part 3: commands as the guest's kernel passes them on.
_EXTEND = bytes.fromhex("8002 00000041 00000182 00000010 00000009 40000009 0000 00 0000 00000001 000b")
"""TPM2_PCR_Extend of PCR 16, SHA-256, with an empty password; the digest follows."""
_READ = bytes.fromhex("8001 00000014 0000017e 00000001 000b 03 000001")
"""TPM2_PCR_Read of PCR 16, SHA-256."""
_CLOCK = bytes.fromhex("8001 0000000a 00000181")
"""TPM2_ReadClock."""


def ask(service: Service, command: bytes) -> bytes:
    """What the guest's TPM answers."""
    typed = "".join(f"\\x{byte:02x}" for byte in command)
    with logged_in(service, NAME) as console:
        console.command(f"printf '{typed}' >/run/ask; exec 3<>/dev/tpm0; cat /run/ask >&3")  # one write each
        printed = console.command("dd bs=4096 count=1 <&3 2>/dev/null | od -An -v -tx1; exec 3>&-")
    answer = bytes.fromhex(printed.rpartition("#")[2])
    assert answer[6:10] == bytes(4), f"the TPM refuses: {answer.hex()}"
    return answer


def register(service: Service) -> bytes:
    """PCR 16: gone with each start of the TPM."""
    return ask(service, _READ)[-32:]


def resets(service: Service) -> int:
    """How often this TPM was started: it remembers."""
    _time, _clock, count = struct.unpack_from(">QQI", ask(service, _CLOCK), 10)
    assert isinstance(count, int)
    return count


def process(service: Service) -> ProcessIdentity:
    identity = read_identity(service.paths.partition(NAME).tpm_identity)
    assert identity is not None
    return identity


def test_a_tpm_keeps_what_it_knows_through_saves_stops_and_its_own_death(service: Service, tmp_path: Path) -> None:
    service.start()
    disk = f"{NAME},parent=image:demo"
    service.cli("partition", "create", NAME, "--memory", "256M", "--disk", disk, "--tpm", "--start")
    service.wait_agent(NAME)
    paths = service.paths.partition(NAME)
    assert process(service).is_alive
    if (user := os.stat(paths.tpm_state).st_uid) != os.geteuid():
        assert os.stat(f"/proc/{process(service).pid}").st_uid == user, "it runs as its partition's user"
    ask(service, _EXTEND + os.urandom(32))
    known, started = register(service), resets(service)
    assert known != bytes(32)

    # A new parent finds it, and a saved state has what it holds in memory.
    before = process(service)
    service.kill()
    service.start()
    assert process(service) == before
    assert service.partition(NAME).reason is None
    service.cli("partition", "save", NAME)
    assert not before.is_alive
    service.cli("partition", "restore", NAME)
    service.wait_agent(NAME)
    assert (register(service), resets(service)) == (known, started)

    # It dies: the partition says so and goes on; the next start has it again.
    process(service).send_signal(signal.SIGKILL)
    while "its TPM has ended" not in (service.partition(NAME).reason or ""):
        assert service.partition(NAME).state.value == "running"
    service.cli("partition", "stop", NAME)
    assert not process_runs(service)
    copy_firmware_state(paths, str(tmp_path / "copy"))
    service.cli("partition", "start", NAME)
    service.wait_agent(NAME)
    assert resets(service) > started
    assert register(service) == bytes(32)

    # Taken back to the copy it has forgotten that start.
    later = resets(service)
    service.cli("partition", "stop", NAME)
    owner = os.stat(paths.tpm_state)
    restore_firmware_state(paths, str(tmp_path / "copy"), (owner.st_uid, owner.st_gid))
    service.cli("partition", "start", NAME)
    service.wait_agent(NAME)
    assert resets(service) == later
    service.cli("partition", "stop", NAME, "--force")
    service.cli("partition", "delete", NAME, "--yes")
    assert not Path(paths.tpm_state).exists()


def process_runs(service: Service) -> bool:
    identity = read_identity(service.paths.partition(NAME).tpm_identity)
    return identity is not None and identity.is_alive
