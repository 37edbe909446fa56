"""Bad input and faults, end to end against the real service, where no guest is needed.

What is refused says what happened and what to do next; the service goes on, and nothing is left behind.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.framework.leftovers import Leftovers, checked_home
from tests.framework.service import READY_S, Command, Service
from tests.framework.small_filesystem import small_filesystem

from mullion.base.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidError,
    MissingToolError,
    MullionError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
)
from mullion.base.units import MIB
from mullion.model.definition import Accelerator, DiskAttachment, PartitionDefinition
from mullion.vhd import DiskBusyError, open_chain
from mullion.vhd.errors import NotVhdError, VhdDamagedError

pytestmark = pytest.mark.contract


def _homed(leftovers: Leftovers) -> Iterator[Service]:
    with checked_home(leftovers) as home:
        os.chmod(home, 0o711)
        service = Service(str(home))
        try:
            yield service
        finally:
            service.destroy()


@pytest.fixture
def service(leftovers: Leftovers) -> Iterator[Service]:
    """A service that is not started yet."""
    yield from _homed(leftovers)


@pytest.fixture(scope="module")
def shared(leftovers: Leftovers) -> Iterator[Service]:
    """A running service for all that does not harm it."""
    for service in _homed(leftovers):
        service.start()
        yield service
        assert service.process is not None
        assert service.process.poll() is None, f"the service has ended: {service.tail('serve.out')}"


def serve(service: Service) -> Command:
    """`mullion serve` where it cannot start."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mullion.daemon", "serve"],
        env=service.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return Command(done.returncode, done.stdout.decode(), done.stderr.decode())


def define(service: Service, name: str, disk: str, **fields: object) -> None:
    with service.client() as client:
        client.create_partition(
            PartitionDefinition(name=name, memory_bytes=128 * MIB, disks=(DiskAttachment(path=disk),), **fields)  # type: ignore[arg-type]
        )


def create_disk(service: Service, name: str) -> str:
    with service.client() as client:
        return client.create_disk(path=name, size_bytes=16 * MIB).path


def start_error(service: Service, name: str) -> MullionError:
    """Why a partition does not start; it says the same when it is looked at, and nothing of it is left."""
    with service.client() as client:
        operation = client.partition_action(name, "start")
        with pytest.raises(MullionError) as caught:
            client.wait(operation)
    error = caught.value
    view = service.partition(name)
    assert (view.state.value, view.reason, view.remedy) == ("failed", error.message, error.remedy)
    service.assert_nothing_runs(name)
    return error


# -- names and definitions ---------------------------------------------------------------------------------------------


def test_a_name_that_is_taken(shared: Service) -> None:
    define(shared, "taken", "taken")
    done = shared.cli("partition", "create", "taken", "--disk", "other,size=16M", check=False)
    assert done.status == AlreadyExistsError.exit_code == 4
    assert "there is a partition named taken already" in done.stderr
    assert "Choose another name, or delete the existing one first." in done.stderr
    assert shared.cli("disk", "show", "other", check=False).status == NotFoundError.exit_code
    with pytest.raises(AlreadyExistsError, match="there is a partition 'taken' already") as refused:
        define(shared, "taken", "another")
    assert refused.value.remedy == "Choose another name, or look at it: mullion partition show taken"
    create_disk(shared, "made-once")
    with pytest.raises(ConflictError, match=r"made-once\.vhd") as caught:
        create_disk(shared, "made-once")
    assert caught.value.exit_code == 4


WRONG_FIELDS = (
    ("vcpus = 0\n", "vcpus", "1"),
    ("vcpu = 2\n", "vcpu", "vcpus"),
    ('memory = "lots"\n', "memory", "512M"),
    ('machine = "i440"\n', "machine", "q35"),
    ('[[disks]]\npath = "web"\nbus = "scsi"\n', "disks[0].bus", "virtio"),
)


@pytest.mark.parametrize(("text", "field", "allowed"), WRONG_FIELDS, ids=[field for _, field, _ in WRONG_FIELDS])
def test_a_wrong_field_in_a_file(shared: Service, text: str, field: str, allowed: str) -> None:
    done = shared.cli("apply", "-f", "-", stdin=f'name = "wrong"\n{text}'.encode(), check=False)
    assert done.status == InvalidError.exit_code == 5
    assert field in done.stderr
    assert allowed in done.stderr
    with pytest.raises(NotFoundError):
        shared.partition("wrong")


@pytest.mark.parametrize(
    ("fields", "field", "allowed"),
    [
        ({"vcpus": 0}, "vcpus", "1"),
        ({"vcpu": 2}, "vcpu", "vcpus"),
        ({"memory_bytes": "lots"}, "memory_bytes", "16 MiB to 16 TiB"),
        ({"machine": "i440"}, "machine", "q35"),
        ({"disks": [{"path": "web", "bus": "scsi"}]}, "disks[0].bus", "virtio"),
    ],
)
def test_a_wrong_field_in_a_request(shared: Service, fields: dict[str, object], field: str, allowed: str) -> None:
    status, answer = ask(shared, "POST", "/1.0/partitions", json.dumps({"name": "wrong", **fields}).encode())
    assert (status, answer["code"]) == (400, "invalid")
    assert field in str(answer["message"])
    assert allowed in f"{answer['message']} {answer['remedy']}"
    with pytest.raises(NotFoundError):
        shared.partition("wrong")


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_missing(shared: Service) -> None:
    define(shared, "missing", "nowhere")
    error = start_error(shared, "missing")
    path = f"{shared.paths.disks}/nowhere.vhd"
    assert (type(error), error.exit_code) == (NotFoundError, 3)
    assert error.message == f"the disk {path} does not exist"
    assert error.remedy == f"Create it: mullion disk create {path} --size 40G"
    done = shared.cli("partition", "start", "missing", check=False)
    assert done.status == 3
    assert error.message in done.stderr
    assert f"disk create {path} --size 40G" in done.stderr
    # What the remedy says is enough.
    shared.cli(*error.remedy.removeprefix("Create it: mullion ").split())
    assert shared.cli("disk", "show", path, "--format", "json").json["path"] == path


def test_a_disk_that_is_not_a_vhd(shared: Service) -> None:
    os.makedirs(shared.paths.disks, exist_ok=True)
    path = f"{shared.paths.disks}/text.vhd"
    Path(path).write_bytes(b"This is no disk.\n" * 1000)
    define(shared, "text", "text")
    error = start_error(shared, "text")
    assert (type(error), error.exit_code) == (NotVhdError, 8)
    assert path in error.message
    assert "mullion vhd convert" in error.remedy
    # It is listed with what is wrong, and kept.
    (view,) = [view for view in shared.cli("disk", "list", "--format", "json").json if view["path"] == path]
    assert view["warnings"] == [error.message]
    with shared.client() as client, pytest.raises(ConflictError):
        client.delete_disk(path)  # it is attached
    assert os.path.exists(path)


@pytest.mark.parametrize("structure", ["header", "footers", "bat", "truncated"])
def test_a_damaged_disk(shared: Service, structure: str) -> None:
    path = create_disk(shared, f"damaged-{structure}")
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        match structure:
            case "header":  # checksum of the dynamic header
                file.seek(512 + 36)
                file.write(b"\xde\xad\xbe\xef")
            case "footers":  # both copies
                for offset in (64, size - 512 + 64):
                    file.seek(offset)
                    file.write(b"\xde\xad\xbe\xef")
            case "bat":  # a block far behind the end of the file
                file.seek(1536)
                file.write(struct.pack(">I", 0x7FFFFFF0))
            case "truncated":
                file.truncate(700)
    define(shared, f"damaged-{structure}", f"damaged-{structure}")
    error = start_error(shared, f"damaged-{structure}")
    assert isinstance(error, VhdDamagedError | NotVhdError)
    assert error.exit_code == 8
    assert path in error.message
    assert error.remedy


def test_a_disk_that_another_process_writes(shared: Service) -> None:
    path = create_disk(shared, "held")
    define(shared, "held", "held")
    own = f"process {os.getpid()} ({Path('/proc/self/comm').read_text().strip()})"
    with open_chain(path, holder="a backup by hand"):
        error = start_error(shared, "held")
        assert (type(error), error.exit_code) == (DiskBusyError, 4)
        assert error.message == f"{path} is locked by {own}"
        assert error.remedy == f"End {own}, or attach another disk."
    # A parent that somebody writes, by a program that leaves no note.
    with shared.client() as client:
        client.create_disk(path="held-child", parent="held")
    define(shared, "held-child", "held-child")
    with open(path, "r+b") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 1 << 62, 1, 0))
        assert start_error(shared, "held-child").message == f"{path} is locked by {own}"


def test_disks_that_are_needed_are_not_deleted(shared: Service) -> None:
    with shared.client() as client:
        parent = create_disk(shared, "parent")
        child = client.create_disk(path="child", parent="parent").path
        define(shared, "owner", "child")
        with pytest.raises(ConflictError) as caught:
            client.delete_disk("parent")
        assert caught.value.message == f"the disk {parent} is a parent of {child}, which would lose its content"
        assert caught.value.remedy == "Delete child first, if it is not needed."
        with pytest.raises(ConflictError) as caught:
            client.delete_disk("child")
        assert caught.value.message == f"the disk {child} belongs to partition owner"
        assert "mullion partition delete owner --with-disks" in caught.value.remedy
        assert os.path.exists(parent)
        assert os.path.exists(child)
        shared.cli("partition", "delete", "owner", "--with-disks", "--yes")
        client.delete_disk("parent")
    assert not os.path.exists(parent)
    assert not os.path.exists(child)


# -- the host ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path) -> str:
    """A PATH with all programs of this host but QEMU."""
    for folder in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for name in os.listdir(folder):
            link = tmp_path / name
            if not name.startswith("qemu-system") and not link.is_symlink():
                link.symlink_to(f"{folder}/{name}")
    return str(tmp_path)


def test_qemu_is_not_installed(service: Service, programs: str) -> None:
    service.environ["PATH"] = programs
    service.start()
    create_disk(service, "web")
    define(service, "web", "web")
    error = start_error(service, "web")
    assert (type(error), error.exit_code) == (MissingToolError, 7)
    assert error.message == "qemu-system-x86_64 is not installed"
    assert error.remedy == "Install it: apt-get install qemu-system-x86"
    done = service.cli("partition", "start", "web", check=False)
    assert done.status == 7
    assert "apt-get install qemu-system-x86" in done.stderr
    assert "apt-get install qemu-system-x86" in service.cli("doctor", check=False).stdout
    # The disk was not kept.
    with open_chain(f"{service.paths.disks}/web.vhd"):
        pass


def test_kvm_that_cannot_run_a_guest(service: Service) -> None:
    """What the probe has found is kept; here it says, on every host, that the device does not run a guest."""
    service.start()
    with service.client() as client:
        client.status()
    cache = Path(service.paths.accelerator_cache)
    if cache.exists():
        why = "/dev/kvm is there, but a test guest made no progress"
        cache.write_text(
            json.dumps({**json.loads(cache.read_text()), "usable": False, "why": why, "remedy": "Say tcg."})
        )
    else:
        why = "/dev/kvm is not there"
    with service.client() as client:
        status = client.status()
    assert (status.accelerator, status.accelerator_reason) == ("tcg", f"{why}; TCG is used")
    create_disk(service, "web")
    define(service, "web", "web", accelerator=Accelerator.KVM)
    error = start_error(service, "web")
    assert (type(error), error.exit_code) == (UnavailableError, 7)
    assert error.message == f"KVM was asked for, but {why}"
    assert error.remedy
    done = service.cli("partition", "start", "web", check=False)
    assert done.status == 7
    assert why in done.stderr


def test_a_service_that_runs_is_not_started_twice(shared: Service) -> None:
    assert shared.process is not None
    done = serve(shared)
    assert done.status == ConflictError.exit_code == 4
    assert f"the service runs already: process {shared.process.pid} holds {shared.paths.service_lock}" in done.stderr
    assert "mullion stop" in done.stderr
    with shared.client() as client:
        assert client.status().pid == shared.process.pid


# -- requests ----------------------------------------------------------------------------------------------------------


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(60)
        self.sock.connect(self._path)


def ask(
    service: Service, method: str, path: str, body: bytes, connection: http.client.HTTPConnection | None = None
) -> tuple[int, dict[str, object]]:
    connection = connection or UnixConnection(service.paths.api_socket)
    token = Path(service.paths.token_file).read_text().strip()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@pytest.mark.parametrize("listener", ["unix", "tcp"])
def test_a_request_that_is_too_large(shared: Service, listener: str) -> None:
    body = json.dumps({"name": "large", "notes": "x" * MIB}).encode()
    if listener == "unix":
        connection: http.client.HTTPConnection = UnixConnection(shared.paths.api_socket)
    else:
        host, port = Path(shared.paths.api_url_file).read_text().strip().removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
    status, answer = ask(shared, "POST", "/1.0/partitions", body, connection)
    assert (status, answer["code"], answer["exit_code"]) == (413, "too-large", 5)
    assert answer["remedy"] == "Send less than 1 MiB; disks are named by path, never sent."
    with pytest.raises(NotFoundError):
        shared.partition("large")


# -- the service's own storage -----------------------------------------------------------------------------------------


@pytest.fixture
def small_data(service: Service) -> Iterator[str]:
    """The data folder, on a filesystem of its own."""
    with small_filesystem(service.paths.data_dir, 4 * MIB, 0o711) as folder:
        try:
            yield folder
        finally:
            service.destroy()


def fill(folder: str) -> Path:
    filler = Path(folder, "filler")
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return filler


def define_until_refused(service: Service) -> NoSpaceError:
    for number in range(2000):  # the log's pages that exist already take a few
        try:
            define(service, f"p{number}", f"d{number}")
        except NoSpaceError as error:
            return error
    raise AssertionError("the full filesystem took everything")


def test_no_room_for_the_database(service: Service, small_data: str) -> None:
    service.start()
    filler = fill(small_data)
    error = define_until_refused(service)
    assert error.exit_code == 9
    assert small_data in error.message
    with service.client() as client:
        names = [view.name for view in client.partitions()]
    assert f"p{len(names)}" not in names
    filler.unlink()
    define(service, "after", "after")
    service.kill()
    service.start()
    assert service.partition("after").name == "after"
    with service.client() as client:
        assert {view.name for view in client.partitions()} == {*names, "after"}


def test_no_room_to_start_the_service(service: Service, small_data: str) -> None:
    fill(small_data)
    done = serve(service)
    assert done.status == NoSpaceError.exit_code
    assert small_data in done.stderr
    assert "Traceback" not in done.stderr


def test_a_data_folder_that_cannot_be_written(service: Service, small_data: str) -> None:
    service.start()
    define(service, "kept", "kept")
    service.end()
    deadline_s = time.monotonic() + READY_S
    while subprocess.run(["mount", "-o", "remount,ro", small_data], check=False).returncode:
        assert time.monotonic() < deadline_s  # a zygote that ends has its log open until then
        time.sleep(0.05)
    done = serve(service)
    assert done.status not in (0, 1)
    assert small_data in done.stderr
    assert "ead-only" in done.stderr
    assert "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,rw", small_data], check=True)
    service.start()
    assert service.partition("kept").name == "kept"


# ----------------------------------------------------------------------------------------------------- no room to merge


@pytest.fixture
def small_folder(shared: Service) -> Iterator[str]:
    with small_filesystem(f"{shared.home}/small", 24 * MIB, 0o755) as folder:
        yield folder


def test_a_merge_waits_for_room_and_says_so(shared: Service, small_folder: str) -> None:
    content = os.urandom(8 * MIB)
    with shared.client() as client:
        client.create_disk(path=f"{small_folder}/full.vhd", size_bytes=64 * MIB)
        define(shared, "full", f"{small_folder}/full.vhd")
        shared.cli("checkpoint", "create", "full", "one")
        (head,) = Path(small_folder).glob("*.avhd")
        shared.cli("vhd", "write", str(head), "--offset", "0", stdin=content)
        filler = fill(small_folder)
        operation = shared.cli("checkpoint", "delete", "full", "one", "--no-wait").stdout.strip()
        stage = ""
        for event in client.events(follow=True):
            stage = str(event.data.get("stage", ""))
            if event.data.get("operation") == operation and "tried again" in stage:
                break
        assert "no space left" in stage.lower()
        assert small_folder in stage
        filler.unlink()
        client.wait(client.operation(operation))
        client.delete_partition("full")
    assert [path.name for path in Path(small_folder).iterdir()] == ["full.vhd"]
    with open_chain(f"{small_folder}/full.vhd", read_only=True) as chain:
        found = bytearray(len(content))
        chain.pread(0, found)
    assert found == content
