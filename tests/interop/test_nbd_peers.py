"""Our server against other people's clients, and our client against other people's servers."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from tests.framework.devices import MemoryDevice, RawFileDevice

from mullion.base.block import ExtentKind
from mullion.base.errors import DeniedError, NotFoundError, UnavailableError
from mullion.base.units import KIB, MIB
from mullion.wire.nbd import NbdClient, NbdProtocolError
from mullion.wire.nbd.export import NbdExport

pytestmark = pytest.mark.interop

SIZE_BYTES = 64 * MIB


@pytest.fixture
def folder(short_tmp: Path) -> Path:
    return short_tmp


@pytest.fixture
def device() -> MemoryDevice:
    return MemoryDevice(SIZE_BYTES)


@pytest.fixture
def export(folder: Path, device: MemoryDevice) -> Iterator[NbdExport]:
    started = NbdExport(str(folder / "d.nbd"), device, name="system", read_only=False)
    started.start()
    yield started
    started.stop()
    assert started.counters.protocol_errors == 0


def url(export: NbdExport, name: str = "") -> str:
    return f"nbd+unix:///{name}?socket={export.path}"


def tool(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def image(folder: Path, seed: int) -> Path:
    """A raw file with data here and there and holes between."""
    path = folder / f"image-{seed}.raw"
    choose = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
        for _ in range(40):
            file.seek(choose.randrange(SIZE_BYTES // 65536) * 65536)
            file.write(choose.randbytes(65536))
    return path


class TestTheirClients:
    def test_nbdinfo_reads_every_property(self, export: NbdExport) -> None:
        [found] = json.loads(tool("nbdinfo", "--json", url(export, "system")))["exports"]
        assert found["export-size"] == SIZE_BYTES
        assert found["contexts"] == ["base:allocation"]
        expected = {
            "is_read_only": False,
            "can_df": True,
            "can_flush": True,
            "can_fua": True,
            "can_multi_conn": True,
            "can_trim": True,
            "can_zero": True,
            "block_size_minimum": 1,
            "block_size_maximum": 32 * MIB,
        }
        assert {name: found[name] for name in expected} == expected

    def test_nbdinfo_lists_the_exports(self, export: NbdExport) -> None:
        listed = json.loads(tool("nbdinfo", "--list", "--json", url(export)))["exports"]
        assert [entry["export-name"] for entry in listed] == ["system"]

    def test_nbdinfo_maps_the_extents(self, export: NbdExport, device: MemoryDevice) -> None:
        device.pwrite(MIB, bytes(64 * KIB))
        device.write_zeroes(2 * MIB, MIB)
        runs = json.loads(tool("nbdinfo", "--map", "--json", url(export)))
        assert [(run["offset"], run["length"], run["type"]) for run in runs] == [
            (0, MIB, 3),
            (MIB, 64 * KIB, 0),
            (MIB + 64 * KIB, MIB - 64 * KIB, 3),
            (2 * MIB, MIB, 2),
            (3 * MIB, SIZE_BYTES - 3 * MIB, 3),
        ]

    def test_nbdcopy_there_and_back(self, export: NbdExport, device: MemoryDevice, folder: Path) -> None:
        source = image(folder, 1)
        tool("nbdcopy", "--flush", str(source), url(export))
        assert device.content == source.read_bytes()
        assert device.flushes
        tool("nbdcopy", url(export), str(folder / "back.raw"))
        assert (folder / "back.raw").read_bytes() == source.read_bytes()

    def test_nbdcopy_by_block_status_leaves_holes_as_holes(
        self, export: NbdExport, device: MemoryDevice, folder: Path
    ) -> None:
        device.pwrite(5 * MIB, b"x" * 65536)
        tool("nbdcopy", url(export), str(folder / "sparse.raw"))
        assert (folder / "sparse.raw").read_bytes() == device.content
        assert export.counters.bytes_read < 4 * MIB

    def test_qemu_img_converts_there_and_back(self, export: NbdExport, device: MemoryDevice, folder: Path) -> None:
        source = image(folder, 2)
        tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), url(export, "system"))
        assert device.content == source.read_bytes()
        tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", url(export), str(folder / "back.qcow2"))
        tool("qemu-img", "compare", str(folder / "back.qcow2"), str(source))

    def test_qemu_img_maps_what_is_stored(self, export: NbdExport, device: MemoryDevice) -> None:
        device.pwrite(8 * MIB, b"x" * 4096)
        runs = json.loads(tool("qemu-img", "map", "-f", "raw", "--output=json", url(export)))
        assert [run["start"] for run in runs if run["data"]] == [8 * MIB]

    def test_qemu_io_does_every_command(self, export: NbdExport, device: MemoryDevice) -> None:
        commands = [
            "write -P 0x11 0 2M",
            "write -f -P 0x22 64k 64k",
            "write -z -u 1M 64k",
            "discard 128k 64k",
            "aio_write -P 0x33 3M 512k",
            "aio_write -P 0x44 4M 17M",
            "aio_flush",
            "flush",
            "read -P 0x11 0 64k",
            "read -P 0x22 64k 64k",
            "read -P 0 128k 64k",
            "read -P 0 1M 64k",
            "read -P 0x33 3M 512k",
            "read -P 0x44 4M 17M",
            "read -P 0 33M 31M",
        ]
        arguments = [argument for command in commands for argument in ("-c", command)]
        printed = tool("qemu-io", "-f", "raw", *arguments, url(export))
        assert "error" not in printed.lower()
        assert "failed" not in printed.lower()
        assert {"pwrite", "write_zeroes", "discard", "flush"} <= {call for call, _, _ in device.calls}

    def test_a_read_only_export_is_refused_for_writing(
        self, folder: Path, device: MemoryDevice, request: pytest.FixtureRequest
    ) -> None:
        export = NbdExport(str(folder / "ro.nbd"), device, name="system", read_only=True)
        export.start()
        request.addfinalizer(export.stop)
        refused = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 512", url(export)], capture_output=True, text=True, check=False
        )
        assert refused.returncode != 0
        assert "Permission denied" in refused.stderr
        tool("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 1M", url(export))
        assert device.calls == []


@contextmanager
def their_server(*argv: str, socket_path: Path) -> Iterator[str]:
    """Run a server in the foreground until it listens, and end it."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not is_listening(socket_path):
                assert process.poll() is None, f"{argv} ended with {process.returncode}"
                time.sleep(0.01)
            yield str(socket_path)
        finally:
            process.kill()  # nothing to save, and nbdkit waits for its clients when it is asked to end
            process.wait(60)


def is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def exercise(client: NbdClient) -> None:
    """Random requests against a bytearray."""
    choose = random.Random(7)
    model = bytearray(client.size_bytes)
    for _ in range(150):
        offset = choose.randrange(client.size_bytes // 512) * 512
        length = min(choose.choice([512, 4096, 100 * KIB, 3 * MIB]), client.size_bytes - offset)
        action = choose.randrange(4)
        if action == 0:
            payload = choose.randbytes(length)
            client.pwrite(offset, payload)
            model[offset : offset + length] = payload
        elif action == 1:
            client.write_zeroes(offset, length)
            model[offset : offset + length] = bytes(length)
        elif action == 2:
            content = bytearray(length)
            client.pread(offset, content)
            assert content == model[offset : offset + length]
        else:
            client.flush()
    whole = bytearray(client.size_bytes)
    client.pread(0, whole)  # longer than one request may be
    assert whole == model
    position = 0
    for extent in client.extents(0, client.size_bytes):
        assert extent.offset == position
        position += extent.length
        assert extent.kind is ExtentKind.DATA or not any(model[extent.offset : position])
    assert position == client.size_bytes


class TestTheirServers:
    def test_qemu_nbd(self, folder: Path) -> None:
        raw = folder / "disk.raw"
        with raw.open("wb") as file:
            file.truncate(SIZE_BYTES)
        path = folder / "q.nbd"
        argv = ("qemu-nbd", "-f", "raw", "-t", "-x", "disk", "-k", str(path), str(raw))
        with their_server(*argv, socket_path=path) as listening:
            with pytest.raises(NotFoundError):
                NbdClient(listening, "other")
            with NbdClient(listening, "disk") as client:
                exercise(client)
                content = bytearray(SIZE_BYTES)
                client.pread(0, content)
        assert raw.read_bytes() == content

    def test_qemu_nbd_read_only(self, folder: Path) -> None:
        raw = image(folder, 3)
        path = folder / "q.nbd"
        with (
            their_server("qemu-nbd", "-r", "-f", "raw", "-t", "-k", str(path), str(raw), socket_path=path) as listening,
            NbdClient(listening) as client,
        ):
            assert client.read_only
            with pytest.raises(DeniedError):
                client.pwrite(0, b"x")
            with closing(RawFileDevice(str(raw))) as file:
                theirs = [extent for extent in file.extents(0, SIZE_BYTES) if extent.kind is ExtentKind.DATA]
            ours = [extent for extent in client.extents(0, SIZE_BYTES) if extent.kind is ExtentKind.DATA]
            assert ours == theirs

    @pytest.mark.parametrize("options", [(), ("--no-sr",), ("--mask-handshake=1",)])
    def test_nbdkit_memory(self, folder: Path, options: tuple[str, ...]) -> None:
        path = folder / "k.nbd"
        argv = ("nbdkit", "-f", *options, "-U", str(path), "memory", str(SIZE_BYTES))
        with their_server(*argv, socket_path=path) as listening, NbdClient(listening) as client:
            exercise(client)

    @pytest.mark.parametrize("options", [("--oldstyle",), ("--mask-handshake=0",)])
    def test_a_server_without_fixed_newstyle_is_turned_down(self, folder: Path, options: tuple[str, ...]) -> None:
        path = folder / "k.nbd"
        argv = ("nbdkit", "-f", *options, "-U", str(path), "memory", "1M")
        with their_server(*argv, socket_path=path) as listening, pytest.raises(NbdProtocolError, match="newstyle"):
            NbdClient(listening)

    def test_a_server_that_dies_makes_the_disk_unavailable(self, folder: Path) -> None:
        path = folder / "k.nbd"
        with their_server("nbdkit", "-f", "-U", str(path), "memory", "1M", socket_path=path) as listening:
            client = NbdClient(listening)
        for _ in range(2):
            with pytest.raises(UnavailableError, match="closed"):
                client.pread(0, bytearray(512))
        client.close()

    def test_nbdkit_errors_arrive_as_the_system_s(self, folder: Path) -> None:
        path = folder / "k.nbd"
        argv = ("nbdkit", "-f", "-U", str(path), "--filter=error", "memory", "1M", "error-pwrite=ENOSPC")
        with (
            their_server(*argv, "error-pwrite-rate=100%", socket_path=path) as listening,
            NbdClient(listening) as client,
        ):
            with pytest.raises(OSError, match="No space left"):
                client.pwrite(0, bytes(512))
            client.pread(0, bytearray(512))
