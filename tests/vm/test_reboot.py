"""The host's power fails: what was wanted running runs again after the boot, from what was on the disks."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import pytest
from tests.framework.guest_console import logged_in
from tests.framework.leftovers import end_processes
from tests.framework.service import Service

pytestmark = pytest.mark.vm


@pytest.mark.parametrize("run_folder_survives", [False, True])
def test_partitions_start_again_after_a_reboot(service: Service, run_folder_survives: bool) -> None:
    service.start()
    for name in ("up", "down"):
        service.cli("partition", "create", name, "--memory", "256M", "--disk", f"{name},parent=image:demo")
    service.cli("partition", "start", "up")
    service.wait_agent("up")
    with logged_in(service, "up") as console:
        console.command("echo flushed-$((40+2)) >/root/note; sync")
    reboot(service, run_folder_survives=run_folder_survives)
    service.wait_agent("up")
    assert service.partition("down").state.value == "stopped"
    with logged_in(service, "up") as console:
        assert "flushed-42" in console.command("cat /root/note")
        console.command("echo in-memory-$((40+2)) >/run/note")

    # What was saved is not started by itself, and goes on where it was when somebody wants it.
    service.cli("partition", "save", "up")
    reboot(service, run_folder_survives=run_folder_survives)
    assert service.partition("up").state.value == "saved"
    service.cli("partition", "restore", "up")
    with logged_in(service, "up") as console:
        assert "in-memory-42" in console.command("cat /run/note")


def reboot(service: Service, *, run_folder_survives: bool) -> None:
    """The power fails, and comes back."""
    end_processes(service.home)
    assert service.process is not None
    service.process.wait()
    if not run_folder_survives:
        shutil.rmtree(service.paths.run_dir)
    # Another boot, as the service can tell: its own view of the boot id. Only it and what it starts see this.
    other_boot = Path(service.home) / "boot_id"
    other_boot.write_text(f"{uuid.uuid4()}\n")
    mount = f"mount --bind {other_boot} /proc/sys/kernel/random/boot_id"
    service.launcher = ("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "boot")
    service.start()
