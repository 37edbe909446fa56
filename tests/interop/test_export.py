"""A checkpoint's disks served to other people's programs: full and incremental backups, TLS, a parent that dies."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.framework.nbd_peer import CLIENT_FLAGS, named, option

from mullion.base.errors import AlreadyExistsError, InvalidError, NotFoundError
from mullion.base.paths import PartitionPaths
from mullion.base.process import read_identity
from mullion.base.units import KIB, MIB
from mullion.provider.export_spec import ExportedDisk
from mullion.services.checkpoint.certificates import CLIENT_FOLDER, ensure_certificates
from mullion.services.checkpoint.export_link import ExportLink, Listener, find_exports
from mullion.services.partition.provider_link import ProviderFleet
from mullion.vhd import create_differencing, create_dynamic, open_chain
from mullion.wire.nbd.messages import Option, OptionReply

pytestmark = [
    pytest.mark.interop,
    # The zygote ends by itself when a fleet is closed; its Popen object says that it is still there.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SIZE = 64 * MIB
BITMAP = "qemu:dirty-bitmap:since-monday"
USER = 65534


def content(path: str) -> bytearray:
    with open_chain(path, read_only=True) as chain:
        buffer = bytearray(chain.size_bytes)
        chain.pread(0, buffer)
        return buffer


def scribble(path: str, seed: int, count: int = 40) -> None:
    choose = random.Random(seed)
    with open_chain(path) as chain:
        for _ in range(count):
            length = choose.choice((512, 5 * KIB, 64 * KIB, 300 * KIB))
            chain.pwrite(choose.randrange((SIZE - length) // 512) * 512, choose.randbytes(length))
        chain.write_zeroes(choose.randrange(SIZE // MIB - 3) * MIB, 2 * MIB)


@pytest.fixture
def layers(short_tmp: Path) -> dict[str, tuple[str, ...]]:
    """The chains of three checkpoints, and one of another branch, each with what a guest wrote since."""
    os.chmod(short_tmp, 0o755)
    monday, tuesday, friday, other = (str(short_tmp / f"{n}.vhd") for n in ("monday", "tuesday", "friday", "other"))
    create_dynamic(monday, SIZE)
    scribble(monday, 1)
    for path, parent in ((tuesday, monday), (friday, tuesday), (other, monday)):
        create_differencing(path, parent)
        scribble(path, len(path))
    return {
        "monday": (monday,),
        "tuesday": (tuesday, monday),
        "friday": (friday, tuesday, monday),
        "other": (other, monday),
    }


@pytest.fixture
def paths(short_tmp: Path) -> PartitionPaths:
    return PartitionPaths(run=str(short_tmp / "run" / "p" / "web"), data=str(short_tmp / "data"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates") / "tls"
    assert ensure_certificates(str(folder))
    assert not ensure_certificates(str(folder))
    return folder


@asynccontextmanager
async def fleet_of(paths: PartitionPaths) -> AsyncIterator[ProviderFleet]:
    os.makedirs(paths.data, exist_ok=True)
    fleet = ProviderFleet(f"{paths.data}/zygote.log")
    try:
        yield fleet
    finally:
        await ExportLink("web", paths, "a").stop()
        await fleet.close()


async def tool(*argv: str, fails: bool = False) -> str:
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode != 0) is fails, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr if fails else done.stdout


async def apply_changes(uri: str, context: str, copy: Path) -> int:
    """What an incremental backup does: bring what the map calls dirty into the older copy. The bytes that it took."""
    runs = json.loads(await tool("nbdinfo", "--json", f"--map={context}", uri))
    now = copy.with_name("now.raw")
    await tool("nbdcopy", uri, str(now))
    total = 0
    with open(copy, "r+b") as older, open(now, "rb") as newer:
        for run in (run for run in runs if run["type"] & 1):
            newer.seek(run["offset"])
            older.seek(run["offset"])
            older.write(newer.read(run["length"]))
            total += run["length"]
    return total


def disks(chain: Sequence[str], since: Sequence[str] | None = None) -> list[ExportedDisk]:
    bitmap = None if since is None else "since-monday"
    return [ExportedDisk("system", tuple(chain), None if since is None else tuple(since), bitmap)]


class TestBackup:
    @pytest.mark.parametrize(("since", "now"), [("monday", "friday"), ("tuesday", "other"), ("friday", "monday")])
    def test_a_full_copy_and_then_only_what_changed(
        self, layers: dict[str, tuple[str, ...]], paths: PartitionPaths, short_tmp: Path, since: str, now: str
    ) -> None:
        copy = short_tmp / "copy.raw"

        async def scenario() -> None:
            async with fleet_of(paths) as fleet:
                link = ExportLink("web", paths, "a")
                full = await link.start(fleet, disks(layers[since]))
                await tool("nbdcopy", full.disks[0].uri, str(copy))
                assert copy.read_bytes() == content(layers[since][0])
                await link.stop()

                changes = await link.start(fleet, disks(layers[now], layers[since]))
                [disk] = changes.disks
                assert disk.context == BITMAP
                [found] = json.loads(await tool("nbdinfo", "--json", disk.uri))["exports"]
                assert (found["is_read_only"], found["can_multi_conn"]) == (True, True)
                assert sorted(found["contexts"]) == ["base:allocation", BITMAP]
                assert "web" in found["description"]
                assert await apply_changes(disk.uri, BITMAP, copy) < SIZE // 2
                assert copy.read_bytes() == content(layers[now][0])

                refused = await tool("qemu-io", "-f", "raw", "-c", "write 0 512", disk.uri, fails=True)
                assert "Permission denied" in refused
                state = await link.status()
                assert state is not None
                assert state.bytes_read > 0

        asyncio.run(scenario())

    def test_qemu_shows_the_bitmap_as_a_map(
        self, layers: dict[str, tuple[str, ...]], paths: PartitionPaths, short_tmp: Path
    ) -> None:
        """`x-dirty-bitmap` is how QEMU's own backup programs ask: dirty ranges are those that are not `data`."""

        async def scenario() -> None:
            async with fleet_of(paths) as fleet:
                link = ExportLink("web", paths, "a")
                [disk] = (await link.start(fleet, disks(layers["friday"], layers["monday"]))).disks
                socket_path = disk.uri.partition("?socket=")[2]
                options = f"driver=nbd,server.type=unix,server.path={socket_path},export=system,x-dirty-bitmap={BITMAP}"
                runs = json.loads(await tool("qemu-img", "map", "--output=json", "--image-opts", options))
                by_qemu = [(run["start"], run["length"]) for run in runs if not run["data"]]
                listed = json.loads(await tool("nbdinfo", "--json", f"--map={BITMAP}", disk.uri))
                assert by_qemu == [(run["offset"], run["length"]) for run in listed if run["type"] & 1]
                assert by_qemu

        asyncio.run(scenario())


class TestProcess:
    def test_it_outlives_its_parent_and_is_found_by_the_next(
        self, layers: dict[str, tuple[str, ...]], paths: PartitionPaths
    ) -> None:
        async def scenario() -> None:
            async with fleet_of(paths) as fleet:
                first = await ExportLink("web", paths, "a").start(fleet, disks(layers["friday"]))
            # `fleet_of` has ended that one; the next is left alone with its zygote gone.
            fleet = ProviderFleet(f"{paths.data}/zygote.log")
            started = await ExportLink("web", paths, "a").start(fleet, disks(layers["friday"], layers["monday"]))
            await fleet.close()
            assert started.pid != first.pid
            [found] = find_exports("web", paths)
            try:
                state = await found.status()
                assert state is not None
                assert (state.id, state.pid) == ("a", started.pid)
                assert state.disks == started.disks
                assert json.loads(await tool("nbdinfo", "--json", state.disks[0].uri))
            finally:
                await found.stop()
            assert find_exports("web", paths) == []
            assert os.listdir(paths.export_dir) == []
            assert await found.status() is None
            await found.stop()

        asyncio.run(scenario())

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    def test_it_has_no_rights_of_its_own(self, layers: dict[str, tuple[str, ...]], paths: PartitionPaths) -> None:
        os.chmod(layers["friday"][0], 0o600)

        async def scenario() -> None:
            async with fleet_of(paths) as fleet:
                link = ExportLink("web", paths, "a")
                state = await link.start(fleet, disks(layers["friday"]), run_as=(USER, USER))
                status = Path(f"/proc/{state.pid}/status").read_text()
                assert f"Uid:\t{USER}\t{USER}\t{USER}\t{USER}" in status
                assert "NoNewPrivs:\t1" in status
                assert "CapEff:\t0000000000000000" in status
                await tool("nbdinfo", state.disks[0].uri)

        asyncio.run(scenario())

    def test_two_of_one_id_and_wrong_disks_are_refused(
        self, layers: dict[str, tuple[str, ...]], paths: PartitionPaths
    ) -> None:
        async def scenario() -> None:
            async with fleet_of(paths) as fleet:
                link = ExportLink("web", paths, "a")
                with pytest.raises(NotFoundError):
                    await link.start(fleet, disks(["/nowhere/x.vhd"]))
                with pytest.raises(InvalidError, match="go together"):
                    await link.start(fleet, [ExportedDisk("system", layers["monday"], layers["monday"])])
                with pytest.raises(InvalidError, match="same id"):
                    await link.start(fleet, disks(layers["monday"]) * 2)
                empty = Listener("127.0.0.1", 0, paths.data)
                Path(paths.data, "ca-cert.pem").touch()
                with pytest.raises(NotFoundError, match="server-cert"):
                    await link.start(fleet, disks(layers["monday"]), listener=empty)
                assert read_identity(f"{paths.export_dir}/a.pid") is None
                await link.start(fleet, disks(layers["monday"]))
                with pytest.raises(AlreadyExistsError):
                    await link.start(fleet, disks(layers["monday"]))

        asyncio.run(scenario())
        with pytest.raises(InvalidError):
            ExportLink("web", paths, "../a")


def qemu_options(port: int, folder: Path) -> list[str]:
    credentials = f"tls-creds-x509,id=t,dir={folder},endpoint=client"
    return [
        "--object",
        credentials,
        "--image-opts",
        f"driver=nbd,host=127.0.0.1,port={port},export=system,tls-creds=t",
    ]


class TestTls:
    def test_programs_with_a_certificate_are_served_and_others_are_not(
        self, layers: dict[str, tuple[str, ...]], paths: PartitionPaths, certificates: Path, short_tmp: Path
    ) -> None:
        client, stranger, nobody = certificates / CLIENT_FOLDER, short_tmp / "stranger", short_tmp / "nobody"
        ensure_certificates(str(stranger))
        shutil.copy(client / "ca-cert.pem", stranger / CLIENT_FOLDER / "ca-cert.pem")  # it trusts us, we not it
        nobody.mkdir()
        shutil.copy(client / "ca-cert.pem", nobody / "ca-cert.pem")
        copy = short_tmp / "copy.raw"

        async def scenario() -> None:
            async with fleet_of(paths) as fleet:
                link = ExportLink("web", paths, "a")
                listener = Listener("127.0.0.1", 0, str(certificates))
                state = await link.start(fleet, disks(layers["friday"], layers["monday"]), listener=listener)
                port = state.port
                assert port
                uri = state.disks[0].uri
                assert uri == f"nbds://127.0.0.1:{port}/system"
                good = f"{uri}?tls-certificates={client}"
                await tool("nbdcopy", good, str(copy))
                assert copy.read_bytes() == content(layers["friday"][0])
                runs = json.loads(await tool("nbdinfo", "--json", f"--map={BITMAP}", good))
                assert {run["type"] for run in runs} == {0, 1}
                info = json.loads(await tool("qemu-img", "info", "--output=json", *qemu_options(port, client)))
                assert info["virtual-size"] == SIZE
                await tool("qemu-io", "-r", *qemu_options(port, client), "-c", "read 0 1M")

                for folder in (stranger / CLIENT_FOLDER, nobody):
                    await tool("nbdinfo", f"{uri}?tls-certificates={folder}", fails=True)
                    await tool("qemu-img", "info", *qemu_options(port, folder), fails=True)
                await tool("nbdinfo", f"nbd://127.0.0.1:{port}/system", fails=True)
                refused = await tool("qemu-img", "info", f"nbd://127.0.0.1:{port}/system", fails=True)
                assert "TLS" in refused

                after = await link.status()
                assert after is not None
                assert after.errors  # all of them were counted

        asyncio.run(scenario())

    @pytest.mark.filterwarnings("ignore:ssl.OP_NO_TLS:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:ssl.OP_NO_SSL:DeprecationWarning")
    def test_nothing_is_told_before_tls_and_old_versions_are_refused(
        self, layers: dict[str, tuple[str, ...]], paths: PartitionPaths, certificates: Path
    ) -> None:
        async def scenario() -> None:
            async with fleet_of(paths) as fleet:
                listener = Listener("127.0.0.1", 0, str(certificates))
                state = await ExportLink("web", paths, "a").start(fleet, disks(layers["monday"]), listener=listener)
                assert state.port
                await asyncio.to_thread(talk, state.port, certificates)

        asyncio.run(scenario())

    def test_without_tls_there_is_no_tcp(self, layers: dict[str, tuple[str, ...]], paths: PartitionPaths) -> None:
        async def scenario() -> None:
            async with fleet_of(paths) as fleet:
                spec = {
                    "partition": "web",
                    "disks": [{"id": "system", "chain": list(layers["monday"])}],
                    "host": "127.0.0.1",
                    "control": f"{paths.data}/c",
                    "identity": f"{paths.data}/i",
                    "log": f"{paths.data}/l",
                    "port": 0,
                }
                with pytest.raises(InvalidError, match="without TLS"):
                    await fleet.spawn_export(spec)

        asyncio.run(scenario())


def receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        assert piece, "hung up"
        data += piece
    return data


def answer(connection: socket.socket) -> tuple[int, bytes]:
    _, _, kind, length = struct.unpack(">QIII", receive(connection, 20))
    return kind, receive(connection, length)


def talk(port: int, certificates: Path) -> None:
    """Every option before STARTTLS, then TLS 1.1, then what was sent before TLS pretending to be inside it."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as plain:
        receive(plain, 18)
        plain.sendall(CLIENT_FLAGS)
        for number in (Option.LIST, Option.GO, Option.INFO, Option.STRUCTURED_REPLY, Option.LIST_META_CONTEXT):
            plain.sendall(option(number, named(b"system", b"\0\0")))
            assert answer(plain)[0] == OptionReply.ERR_TLS_REQD
        plain.sendall(option(Option.STARTTLS))
        assert answer(plain) == (OptionReply.ACK, b"")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(certificates / "ca-cert.pem")
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.options |= ssl.OP_NO_TLSv1_3 | ssl.OP_NO_TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(plain, server_hostname="127.0.0.1")
    with socket.create_connection(("127.0.0.1", port), timeout=60) as plain:
        receive(plain, 18)
        plain.sendall(CLIENT_FLAGS + option(Option.STARTTLS) + option(Option.LIST))
        assert answer(plain) == (OptionReply.ACK, b"")
        context = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(plain, server_hostname="127.0.0.1")
