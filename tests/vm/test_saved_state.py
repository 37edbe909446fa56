"""A saved partition: its memory in a file, no process left; restored, it goes on in the middle of a line."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from tests.framework.guest_console import GuestConsole, logged_in
from tests.framework.service import GUEST_S, Service
from tests.vm.test_survival import begin_iocheck, end_iocheck, start_guest, wait_for_writes

from mullion.base.errors import StateError
from mullion.model.definition import Transport
from mullion.model.views import PartitionView
from mullion.services.image.build import BuiltImage

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

NAME = "web"
COUNT = "i=0; while :; do i=$((i+1)); echo $i >/run/counter.new; mv /run/counter.new /run/counter; done"


def states(service: Service) -> list[str]:
    """The state files of the partition, finished or not."""
    return sorted(name for name in os.listdir(service.paths.partition(NAME).data) if name.startswith("saved-"))


def state_file(service: Service) -> Path:
    [name] = states(service)
    return Path(service.paths.partition(NAME).data, name)


def counter(service: Service) -> tuple[int, str]:
    """How far the guest has counted, in its memory alone, and which boot of it that is."""
    with logged_in(service, NAME) as console:
        printed = console.command("cat /run/counter /proc/sys/kernel/random/boot_id")
    number, boot = printed.split()[-2:]
    return int(number), boot


def is_gone(service: Service) -> bool:
    return not any(identity and identity.is_alive for identity in (service.qemu(NAME), service.provider(NAME)))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.fixture
def counting(service: Service, iocheck_image: BuiltImage) -> Service:
    """A guest that counts in memory."""
    begin_counting(service, iocheck_image)
    return service


def begin_counting(service: Service, image: BuiltImage, transport: Transport = Transport.NBD) -> None:
    service.start()
    start_guest(service, image, NAME, transport)
    with logged_in(service, NAME) as console:
        console.command(f"({COUNT}) >/dev/null 2>&1 </dev/null & true")


@pytest.mark.parametrize("transport", [Transport.NBD, Transport.VHOST_USER])
def test_a_guest_under_verified_load_goes_on_after_a_save_and_restarts_of_the_parent(
    service: Service, iocheck_image: BuiltImage, transport: Transport
) -> None:
    begin_counting(service, iocheck_image, transport)
    with logged_in(service, NAME) as console:
        begin_iocheck(console)
        wait_for_writes(console)
        before = service.partition(NAME)
        # While it writes: what is on its way to the disk belongs to the memory that is saved.
        assert service.cli("--format", "json", "partition", "save", NAME).json["result"]["state"] == "saved"
    view = service.partition(NAME)
    assert view.state.value == "saved"
    assert is_gone(service)
    assert view.saved is not None
    assert Path(view.saved.path) == state_file(service)
    assert view.saved.file_bytes == state_file(service).stat().st_size
    assert "saved" in service.cli("partition", "show", NAME).stdout

    for act in ("stop", "pause", "save"):
        refused = service.cli("partition", act, NAME, check=False)
        assert refused.status == 6
        assert f" partition restore {NAME}" in refused.stderr

    service.kill()
    service.start()
    assert service.partition(NAME).state.value == "saved", "a saved partition stays so"
    with service.client() as client:  # the definition changes meanwhile: what was saved goes on
        view = client.partition(NAME)
        client.update_partition(NAME, msgspec.structs.replace(view.definition, vcpus=2), view.etag)
    restored = service.cli("--format", "json", "partition", "restore", NAME).json
    assert "takes effect at the next start" in restored["result"]["note"]
    after = service.partition(NAME)
    assert after.state.value == "running"
    assert after.saved is None
    assert after.boot_s == before.boot_s
    assert states(service) == []
    assert service.wait_agent(NAME).agent_answers
    with GuestConsole(service, NAME) as console:
        wait_for_writes(console)
        report = end_iocheck(console)
        assert (report.wrong, report.errors) == (0, 0)
        assert console.command("nproc").split()[-1] == "1"
    service.cli("partition", "stop", NAME)
    assert service.partition(NAME).state.value == "stopped"


def test_a_damaged_or_unfit_state_is_refused_and_the_disks_stay_usable(counting: Service) -> None:
    service = counting
    counted, boot = counter(service)
    service.cli("partition", "save", NAME)
    path = state_file(service)
    size = path.stat().st_size
    for offset in (3, 60, size // 2, size - 1):
        flip(path, offset)
        refused(service, 8, "state-damaged", str(path))
        flip(path, offset)
    os.truncate(path, size - 1)
    refused(service, 8, "state-damaged", "cut off")
    path.write_bytes(path.read_bytes() + b"?")
    refused(service, 8, "state-damaged", "checksum")
    # Nothing of all this has touched the disks: whole again it would be restored, were they not written to.
    disk = f"{service.paths.disks}/{NAME}-data.vhd"
    service.cli("vhd", "write", disk, stdin=b"changed behind its back")
    service.kill()
    service.start()
    refused(service, 8, "state-damaged", "checksum")
    service.cli("partition", "start", NAME, "--discard-state")
    assert states(service) == []
    service.wait_agent(NAME)
    with logged_in(service, NAME) as console:
        assert console.command("cat /proc/sys/kernel/random/boot_id").split()[-1] != boot, "it has booted"
    assert counted > 0

    # A whole state over newer disks.
    service.cli("partition", "save", NAME)
    service.cli("vhd", "write", disk, stdin=b"and again")
    refused(service, 4, "state-unfit", "has been written to since")
    service.cli("partition", "discard-state", NAME)
    assert service.partition(NAME).state.value == "stopped"
    assert states(service) == []
    nothing = service.cli("partition", "restore", NAME, check=False)
    assert nothing.status == 6
    assert f" partition start {NAME}" in nothing.stderr


def refused(service: Service, status: int, code: str, words: str) -> None:
    """Restoring fails before QEMU starts, says why and what helps, and leaves the partition saved."""
    done = service.cli("--format", "json", "partition", "restore", NAME, check=False)
    assert done.status == status, done
    assert code in done.stdout + done.stderr
    view = service.partition(NAME)
    assert view.state.value == "saved"
    assert words in (view.reason or "")
    assert "discard-state" in (view.remedy or "")
    assert is_gone(service)


def test_no_room_while_saving_leaves_the_guest_running_and_nothing_behind(
    service: Service, iocheck_image: BuiltImage
) -> None:
    folder = service.paths.partition(NAME).data
    os.makedirs(folder)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=750", "none", folder], check=True)
    try:
        begin_counting(service, iocheck_image)
        counted, boot = counter(service)
        failed = service.cli("partition", "save", NAME, check=False)
        assert failed.status == 9, failed
        assert folder in failed.stderr
        assert states(service) == []
        assert service.wait_state(NAME, "running").saved is None
        later, same_boot = counter(service)
        assert same_boot == boot
        assert later > counted
        subprocess.run(["mount", "-o", "remount,size=400m", folder], check=True)
        service.cli("partition", "save", NAME)
        assert service.partition(NAME).state.value == "saved"
        service.end()
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_paused_partition_is_paused_again_and_can_be_saved_again(counting: Service) -> None:
    service = counting
    service.cli("partition", "pause", NAME)
    service.cli("partition", "save", NAME)
    first = state_file(service)
    service.cli("partition", "restore", NAME)
    view = service.partition(NAME)
    assert view.state.value == "paused"
    assert view.saved is not None, "it has not run yet: its state is still good"
    service.cli("partition", "save", NAME)
    assert not first.exists()
    # Restored and standing still, its QEMU is killed: the state is as good as before.
    service.cli("partition", "restore", NAME)
    qemu = service.qemu(NAME)
    assert qemu is not None
    qemu.send_signal(signal.SIGKILL)
    assert "SIGKILL" in (service.wait_state(NAME, "saved").reason or "")
    service.cli("partition", "start", NAME)
    before, boot = counter(service)
    after, same_boot = counter(service)
    assert same_boot == boot
    assert after > before
    assert states(service) == []


def while_saving(service: Service, act: Callable[[], bool]) -> bool:
    """Save, and do something while QEMU, stopped in the middle, has not sent all; False when that was too late."""
    qemu = service.qemu(NAME)
    assert qemu is not None
    saving = threading.Thread(target=service.cli, args=("partition", "save", NAME), kwargs={"check": False})
    saving.start()
    try:
        deadline_s = time.monotonic() + GUEST_S
        while not any(name.endswith(".new") for name in states(service)):
            assert time.monotonic() < deadline_s
        qemu.send_signal(signal.SIGSTOP)
        time.sleep(0.1)  # what is in the pipe is taken out of it
        # A save that waits for the storage looks the same: what is done to it comes too late then.
        return any(name.endswith(".new") for name in states(service)) and act()
    finally:
        qemu.send_signal(signal.SIGCONT)
        saving.join()


def catch(service: Service, act: Callable[[], bool]) -> None:
    for _ in range(10):
        is_caught = while_saving(service, act)
        if service.process is None or service.process.poll() is not None:
            service.start()
        if is_caught and service.partition(NAME).state.value != "saved":
            return
        service.cli("partition", "restore", NAME)
    pytest.fail("never caught in the middle")


def test_killed_in_the_middle_of_a_save_nothing_is_left_of_it(counting: Service) -> None:
    service = counting
    with logged_in(service, NAME) as console:  # so that there is something to write
        console.command(f"dd if=/dev/urandom of=/run/much bs=1M count={64}")
    counted, boot = counter(service)

    def kill_parent() -> bool:
        service.kill()
        return True

    catch(service, kill_parent)
    assert service.wait_state(NAME, "running").saved is None
    assert states(service) == []
    later, same_boot = counter(service)
    assert same_boot == boot
    assert later > counted

    def cancel() -> bool:
        with service.client() as client, contextlib.suppress(StateError):
            [saving] = [
                view for view in client.operations() if view.kind == "partition.save" and not view.state.is_final
            ]
            client.cancel(saving.id)
            return True
        return False

    catch(service, cancel)
    assert service.wait_state(NAME, "running").saved is None
    assert states(service) == []

    def kill_qemu() -> bool:
        qemu = service.qemu(NAME)
        return qemu is not None and qemu.send_signal(signal.SIGKILL)

    catch(service, kill_qemu)
    view = service.wait_state(NAME, "failed")
    assert view.saved is None
    assert states(service) == []
    service.cli("partition", "start", NAME)
    assert service.wait_agent(NAME).state.value == "running"


def test_a_record_that_could_not_be_changed_never_lets_an_old_state_be_restored(counting: Service) -> None:
    """QEMU, the provider and the parent end at once, right after the guest was let go."""
    service = counting
    service.cli("partition", "save", NAME)
    kept = state_file(service)
    copy = kept.read_bytes()
    record_before: PartitionView = service.partition(NAME)
    assert record_before.saved is not None
    service.end()
    database = Path(service.paths.database).read_bytes()
    service.start()
    service.cli("partition", "restore", NAME)
    with logged_in(service, NAME) as console:
        console.command("dd if=/dev/zero of=/dev/vdb bs=1M count=1 conv=fsync")
    service.kill()
    for identity in (service.qemu(NAME), service.provider(NAME)):
        assert identity is not None
        identity.send_signal(signal.SIGKILL)
    # As if the power had gone before the record was durable: the store and the state are as they were.
    for name in ("-wal", "-shm"):
        Path(service.paths.database + name).unlink(missing_ok=True)
    Path(service.paths.database).write_bytes(database)
    kept.write_bytes(copy)
    service.start()
    assert service.partition(NAME).state.value == "saved"
    refused(service, 4, "state-unfit", "has been written to since")
