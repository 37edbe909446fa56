"""`mullion vhd serve` with other people's NBD clients: libnbd's and QEMU's, many at once, and at bad moments."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.framework.small_filesystem import small_filesystem
from tests.framework.vhd_command import serving, vhd

from mullion.base.units import MIB
from mullion.vhd import create_differencing, create_dynamic, create_fixed, open_chain

pytestmark = pytest.mark.interop

SIZE_BYTES = 16 * MIB


@pytest.fixture
def home(short_tmp: Path) -> Path:
    """A folder with base.vhd, and child.vhd, a child of it; both have data."""
    choose = random.Random(3)
    create_dynamic(str(short_tmp / "base.vhd"), SIZE_BYTES)
    with open_chain(str(short_tmp / "base.vhd")) as chain:
        chain.pwrite(MIB, choose.randbytes(5 * MIB))
    create_differencing(str(short_tmp / "child.vhd"), str(short_tmp / "base.vhd"))
    with open_chain(str(short_tmp / "child.vhd")) as chain:
        chain.pwrite(3 * MIB + 512, choose.randbytes(MIB))
    return short_tmp


def program(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=check)


def content_of(path: Path) -> str:
    with open_chain(str(path), read_only=True) as chain:
        content = bytearray(chain.size_bytes)
        chain.pread(0, content)
    return hashlib.sha256(content).hexdigest()


def digest_of(raw: Path) -> str:
    return hashlib.sha256(raw.read_bytes()).hexdigest()


def test_nbdinfo_sees_a_read_only_disk_of_its_size(home: Path) -> None:
    with serving(home, "child.vhd", "--socket", "s") as server:
        assert server.uri == f"nbd+unix:///?socket={home}/s"
        mode = (home / "s").stat().st_mode
        assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)
        info = json.loads(program("nbdinfo", "--json", server.uri).stdout)["exports"][0]
        assert info["export-size"] == SIZE_BYTES
        assert (info["is_read_only"], info["can_multi_conn"]) == (True, True)
        assert program("qemu-io", "-f", "raw", "-c", "write 0 512", server.uri, check=False).returncode


def test_a_name_may_be_any_text(home: Path) -> None:
    with serving(home, "base.vhd", "--socket", "the socket", "--export", "größe/1") as server:
        exports = json.loads(program("nbdinfo", "--json", server.uri).stdout)["exports"]
        assert exports[0]["export-name"] == "größe/1"
        assert program("nbdinfo", "--size", f"nbd+unix:///?socket={home}/the%20socket").stdout.strip() == str(
            SIZE_BYTES
        )
        assert program("nbdinfo", f"nbd+unix:///other?socket={home}/the%20socket", check=False).returncode


def test_a_chain_is_read_alike_by_all_clients_at_once(home: Path) -> None:
    expected = content_of(home / "child.vhd")
    with serving(home, "child.vhd", "--socket", "s") as server:
        copies = [home / f"copy{number}" for number in range(8)]
        clients = [subprocess.Popen(["nbdcopy", server.uri, str(copy)]) for copy in copies[:4]]
        argv = ("qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri)
        clients += [subprocess.Popen([*argv, str(copy)]) for copy in copies[4:]]
        assert [client.wait(timeout=60) for client in clients] == [0] * 8
        assert {digest_of(copy) for copy in copies} == {expected}


def test_json_says_the_same(home: Path) -> None:
    with serving(home, "base.vhd", "--socket", "s", "--format", "json") as server:
        said = json.loads(server.uri)
        assert said["uri"] == f"nbd+unix:///?socket={home}/s"
        assert (said["socket"], said["size_bytes"], said["read_only"]) == (f"{home}/s", SIZE_BYTES, True)
        assert said["pid"] == server.process.pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_end_is_clean_and_keeps_what_was_written(home: Path, number: signal.Signals) -> None:
    raw = home / "raw"
    raw.write_bytes(random.Random(number).randbytes(SIZE_BYTES))
    with serving(home, "child.vhd", "--socket", "s", "--writable") as server:
        program("nbdcopy", str(raw), server.uri)
        status, said = server.end(number)
    assert status == 0
    assert "Traceback" not in said
    assert not (home / "s").exists()
    assert content_of(home / "child.vhd") == digest_of(raw)
    assert json.loads(vhd(home, "check", "child.vhd", "--format", "json").stdout)["verdict"] == "sound"


def test_clients_that_are_connected_do_not_hold_up_the_end(home: Path) -> None:
    with serving(home, "base.vhd", "--socket", "s") as server, socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(home / "s"))
        assert idle.recv(18)[:8] == b"NBDMAGIC"
        assert server.end()[0] == 0


def test_nothing_flushed_is_lost_when_the_server_is_killed(home: Path) -> None:
    for number in range(1, 6):
        with serving(home, "child.vhd", "--socket", "s", "--writable") as server:  # over the socket of the dead one
            for earlier in range(1, number):
                program("qemu-io", "-f", "raw", "-c", f"read -P {earlier} {earlier * 2}M 700K", server.uri)
            write = f"write -P {number} {number * 2}M 700K"
            program("qemu-io", "-f", "raw", "-c", write, "-c", "flush", server.uri)
            server.process.kill()
    assert vhd(home, "check", "child.vhd").returncode in {0, 10}
    with open_chain(str(home / "child.vhd")) as chain:
        for number in range(1, 6):
            found = bytearray(700 * 1024)
            chain.pread(number * 2 * MIB, found)
            assert found == bytes([number]) * len(found)


def test_who_has_the_disk_is_said(home: Path) -> None:
    with serving(home, "base.vhd", "--socket", "s", "--writable") as server:
        refused = vhd(home, "serve", "base.vhd", "--socket", "t")
        assert refused.returncode == 4
        assert f"mullion vhd serve (pid {server.process.pid})" in refused.stderr
        assert not (home / "t").exists()


def test_a_socket_in_use_is_not_taken(home: Path) -> None:
    create_fixed(str(home / "other.vhd"), MIB)
    with serving(home, "base.vhd", "--socket", "s") as server:
        refused = vhd(home, "serve", "other.vhd", "--socket", "s")
        assert refused.returncode == 4
        assert "another process listens on s" in refused.stderr
        assert program("nbdinfo", "--size", server.uri).stdout.strip() == str(SIZE_BYTES)


@pytest.mark.parametrize(
    ("words", "status", "what"),
    [
        (("none.vhd", "--socket", "s"), 3, "there is no file none.vhd"),
        (("base.vhd", "--socket", "no/s"), 3, "there is no folder no for the socket"),
        (("base.vhd", "--socket", "x" * 120), 5, "longer than 107 bytes"),
        (("base.vhd", "--socket", "child.vhd"), 4, "is not a socket"),
        (("base.vhd", "--socket", "s", "--export", "x" * 300), 5, "an export cannot be called"),
        (("base.vhd",), 2, "--socket"),
        ((".", "--socket", "s"), 8, "not a regular file"),
    ],
)
def test_wrong_words_are_refused_with_a_remedy(home: Path, words: tuple[str, ...], status: int, what: str) -> None:
    before = sorted(os.listdir(home))
    refused = vhd(home, "serve", *words)
    assert refused.returncode == status
    assert what in refused.stderr
    assert "→" in refused.stderr
    assert refused.stdout == ""
    assert sorted(os.listdir(home)) == before


def test_too_many_clients_are_hung_up_on(home: Path) -> None:
    with serving(home, "base.vhd", "--socket", "s", "--max-clients", "1") as server:
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            first.connect(str(home / "s"))
            assert first.recv(18)[:8] == b"NBDMAGIC"
            second.connect(str(home / "s"))
            assert second.recv(18) == b""
        deadline_s = time.monotonic() + 60
        while program("nbdinfo", server.uri, check=False).returncode:  # until it has seen that the first one has gone
            assert time.monotonic() < deadline_s


@pytest.fixture
def small(home: Path) -> Iterator[Path]:
    with small_filesystem(home / "small", 4 * MIB) as folder:
        yield folder


def test_a_full_storage_is_said_to_the_client_and_hurts_nobody(home: Path, small: Path) -> None:
    create_dynamic(str(small / "disk.vhd"), SIZE_BYTES, block_bytes=512 * 1024)
    with serving(home, "small/disk.vhd", "--socket", "s", "--writable") as server:
        program("qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", "-c", "flush", server.uri)
        full = program("qemu-io", "-f", "raw", "-c", "write -P 2 1M 10M", server.uri, check=False)
        assert "No space left on device" in full.stdout + full.stderr
        program("qemu-io", "-f", "raw", "-c", "read -P 1 0 1M", "-c", "write -P 3 0 1M", server.uri)
        assert server.end()[0] == 0
    assert vhd(home, "check", "small/disk.vhd").returncode == 0
    with open_chain(str(small / "disk.vhd"), read_only=True) as chain:
        found = bytearray(MIB)
        chain.pread(0, found)
        assert found == b"\3" * MIB


def test_another_format_is_served_for_reading_only(home: Path) -> None:
    program("qemu-img", "convert", "-f", "vpc", "-O", "qcow2", str(home / "base.vhd"), str(home / "disk.qcow2"))
    with serving(home, "disk.qcow2", "--socket", "s") as server:
        copies = [home / "one", home / "two"]
        clients = [subprocess.Popen(["nbdcopy", server.uri, str(copy)]) for copy in copies]
        assert [client.wait(timeout=60) for client in clients] == [0, 0]
        program("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(home / "disk.qcow2"), str(home / "raw"))
        assert {digest_of(copy) for copy in copies} == {digest_of(home / "raw")}
    assert vhd(home, "serve", "disk.qcow2", "--socket", "s", "--writable").returncode == 8
