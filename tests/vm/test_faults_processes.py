"""Faults around the processes of a partition: who holds what, what a crash left, what a cancelled start leaves.

QEMU and the providers are real, the disks are blank: nothing has to boot.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest
from tests.framework.service import Service

from mullion.base.errors import ConflictError, OperationCancelledError, StateError
from mullion.base.process import ProcessIdentity, boot_id
from mullion.base.units import MIB
from mullion.model.definition import DiskAttachment, PartitionDefinition
from mullion.vhd import DiskBusyError, open_chain

pytestmark = pytest.mark.vm

DEADLINE_S = 60.0


def define(service: Service, name: str, disk: str) -> None:
    with service.client() as client:
        client.create_partition(
            PartitionDefinition(name=name, memory_bytes=64 * MIB, disks=(DiskAttachment(path=disk),))
        )


def create_disk(service: Service, name: str, parent: str | None = None) -> str:
    with service.client() as client:
        return client.create_disk(path=name, size_bytes=None if parent else 16 * MIB, parent=parent).path


def start(service: Service, name: str, *, paused: bool = True) -> None:
    with service.client() as client:
        client.wait(client.partition_action(name, "start", paused=paused))


def turn_off(service: Service, name: str) -> None:
    with service.client() as client:
        client.wait(client.partition_action(name, "stop", force=True))
    assert_nothing_is_left(service, name)


def assert_nothing_is_left(service: Service, name: str) -> None:
    """No process, no socket, no file in the run folder; the disks are free."""
    service.assert_nothing_runs(name)
    for disk in service.partition(name).definition.disks:
        with open_chain(f"{service.paths.disks}/{disk.path}.vhd"):
            pass


def test_a_disk_that_another_partition_has(shared_service: Service) -> None:
    service = shared_service
    path = create_disk(service, "one")
    child = create_disk(service, "one-child", parent="one")
    define(service, "first", "one")
    define(service, "second", "one")
    define(service, "third", "one-child")
    start(service, "first")
    for name in ("second", "third"):
        done = service.cli("partition", "start", name, check=False)
        assert done.status == DiskBusyError.exit_code == 4
        assert f"{path} is open for writing in partition first" in done.stderr
        assert "partition stop first" in done.stderr
        view = service.partition(name)
        assert view.state.value == "failed"
        assert view.reason == f"{path} is open for writing in partition first"
        assert view.remedy == "Stop it first: mullion partition stop first; or attach another disk."
        assert (view.qemu_pid, view.provider_pid) == (None, None)
        assert not os.path.exists(service.paths.partition(name).run)
    with service.client() as client:
        assert client.disk("one").holder == "first"
        with pytest.raises(ConflictError, match="belongs to partition"):
            client.delete_disk("one")
    turn_off(service, "first")
    start(service, "third")
    # Its parent may not change now, and is not written by anybody.
    done = service.cli("partition", "start", "second", check=False)
    assert done.status == DiskBusyError.exit_code
    assert path in done.stderr
    turn_off(service, "third")
    assert os.path.exists(child)


def test_a_partition_that_runs_is_not_deleted(shared_service: Service) -> None:
    service = shared_service
    create_disk(service, "kept")
    define(service, "kept", "kept")
    start(service, "kept")
    done = service.cli("partition", "delete", "kept", "--with-disks", "--yes", check=False)
    assert done.status == StateError.exit_code == 6
    assert "partition kept is paused" in done.stderr
    assert "partition stop kept" in done.stderr
    assert service.partition("kept").state.value == "paused"
    turn_off(service, "kept")
    service.cli("partition", "delete", "kept", "--with-disks", "--yes")
    assert not os.path.exists(f"{service.paths.disks}/kept.vhd")
    assert not os.path.exists(service.paths.partition("kept").data)


def test_a_start_that_is_cancelled_while_it_waits_for_a_boot_slot(service: Service) -> None:
    service.environ["MULLION_BOOT_SLOTS"] = "1"
    service.start()
    for name in ("first", "second"):
        create_disk(service, name)
        define(service, name, name)
    start(service, "first", paused=False)  # nothing boots from a blank disk: it keeps its slot
    with service.client() as client:
        operation = client.partition_action("second", "start")
        deadline_s = time.monotonic() + DEADLINE_S
        while client.operation(operation.id).stage != "waiting for a boot slot":
            assert time.monotonic() < deadline_s, client.operation(operation.id)
        assert client.partition("second").state.value == "starting"
        service.cli("operation", "cancel", operation.id)
        with pytest.raises(OperationCancelledError, match="was cancelled") as caught:
            client.wait(operation)
        assert caught.value.exit_code == 14
        assert client.partition("second").state.value == "stopped"
        assert client.partition("second").reason is None
        assert_nothing_is_left(service, "second")
        assert service.cli("operation", "show", operation.id, "--format", "json").json["state"] == "cancelled"
    turn_off(service, "first")
    # The slot is free again.
    start(service, "second", paused=False)
    turn_off(service, "second")


def test_a_start_that_is_cancelled_at_any_moment(shared_service: Service) -> None:
    """Wherever the start is when it is cancelled, in the middle of making a process or after it, all of it goes."""
    service = shared_service
    create_disk(service, "any")
    define(service, "any", "any")
    with service.client() as client:
        for delay_ms in (0, 2, 5, 8, 12, 16, 20, 30, 40, 60, 80, 120):
            operation = client.partition_action("any", "start", paused=True)
            time.sleep(delay_ms / 1000)
            try:
                client.cancel(operation.id)
            except StateError:  # it was quicker
                turn_off(service, "any")
                continue
            assert client.wait(operation, check=False).state.value == "cancelled"
            assert client.partition("any").state.value == "stopped"
            assert_nothing_is_left(service, "any")
    start(service, "any")
    turn_off(service, "any")


def test_what_a_host_that_crashed_has_left(service: Service) -> None:
    """Files of another boot and of dead processes, sockets on which nobody listens."""
    service.start()
    create_disk(service, "web")
    define(service, "web", "web")
    service.kill()
    paths = service.paths
    dead = subprocess.Popen(["true"])
    dead_identity = ProcessIdentity.of(dead.pid) or ProcessIdentity(dead.pid, 1, boot_id())
    dead.wait()
    own = ProcessIdentity.of(os.getpid())
    assert own is not None
    other_boot = ProcessIdentity(own.pid, own.start_ticks, "00000000-0000-0000-0000-000000000000")
    run = paths.partition("web")
    os.makedirs(run.run)
    for path in (paths.api_socket, run.qmp, run.qmp_rescue, run.agent, run.console, run.provider_control,
                 run.nbd("disk0"), run.vhost_user("disk0")):  # fmt: skip
        Path(path).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
            stale.bind(path)
    Path(paths.api_url_file).write_text("http://127.0.0.1:1\n")
    Path(paths.service_lock).write_text(f"{other_boot}\n")
    Path(run.qemu_identity).write_text(f"{dead_identity}\n")
    Path(run.provider_identity).write_text(f"{other_boot}\n")
    service.start()
    assert stat.S_ISSOCK(os.stat(paths.api_socket).st_mode)
    assert service.partition("web").state.value == "stopped"
    with service.client() as client:
        client.wait(client.partition_action("web", "start", paused=True))
        view = client.partition("web")
        assert view.state.value == "paused"
        assert view.qemu_pid not in (None, dead.pid, own.pid)
        client.wait(client.partition_action("web", "stop", force=True))
    assert_nothing_is_left(service, "web")


def test_a_pid_that_belongs_to_another_process_now(service: Service) -> None:
    service.start()
    create_disk(service, "web")
    define(service, "web", "web")
    with service.client() as client:
        client.wait(client.partition_action("web", "start", paused=True))
    service.kill()
    run = service.paths.partition("web")
    for identity in (service.qemu("web"), service.provider("web")):
        assert identity is not None
        identity.send_signal(signal.SIGKILL)
    foreign = subprocess.Popen(["sleep", "600"])
    try:
        found = ProcessIdentity.of(foreign.pid)
        assert found is not None
        reused = ProcessIdentity(found.pid, found.start_ticks - 1, found.boot_id)
        for path in (run.qemu_identity, run.provider_identity):
            Path(path).write_text(f"{reused}\n")
        service.start()
        view = service.wait_state("web", "failed")
        assert (view.qemu_pid, view.provider_pid) == (None, None)
        assert view.remedy == "Start it again: mullion partition start web"
        with service.client() as client:
            client.wait(client.partition_action("web", "start", paused=True))
            assert client.partition("web").qemu_pid != foreign.pid
            client.wait(client.partition_action("web", "stop", force=True))
        assert_nothing_is_left(service, "web")
        assert foreign.poll() is None, "a process that is not ours was ended"
    finally:
        foreign.kill()
        foreign.wait()


def test_a_disk_belongs_to_its_partition_only_while_that_runs(service: Service) -> None:
    """Under isolation the provider keeps its session on the file: without it, a stale pending log could be replayed."""
    service.start()
    service.cli("partition", "create", "web", "--memory", "64M", "--disk", "web,size=64M")
    path = f"{service.paths.disks}/web.vhd"
    with service.client() as client:
        client.wait(client.partition_action("web", "start", paused=True))
    assert 30_000 <= os.stat(path).st_uid <= 59_999
    assert {"user.mullion.session", "user.mullion.holder"} <= set(os.listxattr(path))
    service.cli("partition", "stop", "web", "--force")
    assert os.stat(path).st_uid == os.geteuid()


def test_a_provider_whose_identity_was_never_written_is_found_by_its_socket(service: Service) -> None:
    """The parent was killed between a provider's start and the writing of its identity."""
    service.start()
    service.cli("partition", "create", "web", "--memory", "64M", "--disk", "web,size=64M")
    with service.client() as client:
        client.wait(client.partition_action("web", "start", paused=True))
    before = service.provider("web")
    assert before is not None
    service.kill()
    os.unlink(service.paths.partition("web").provider_identity)
    service.start()
    assert service.partition("web").provider_pid == before.pid
    assert service.provider("web") == before
    service.cli("partition", "stop", "web", "--force")
