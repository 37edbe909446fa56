"""Files inside partitions and their checkpoints, by a real service: what other programs wrote comes out as it was."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.framework.leftovers import Leftovers, checked_home
from tests.framework.service import READY_S, Service
from tests.interop.filesystem_images import call, make_ext, make_fat, make_mbr

from mullion.base.process import ProcessIdentity

pytestmark = pytest.mark.interop

BIG_BYTES = 20 << 20


@pytest.fixture(scope="module")
def service(leftovers: Leftovers) -> Iterator[Service]:
    """A service with a partition of one ext4 disk, `web`, and one of several disks and volumes, `many`."""
    with checked_home(leftovers) as home:
        made = Service(str(home))
        made.start()
        try:
            _make_partitions(made, home)
            yield made
        finally:
            made.end()


def _make_partitions(service: Service, home: Path) -> None:
    tree = home / "tree"
    (tree / "folder/below").mkdir(parents=True)
    (tree / "readme.txt").write_bytes(b"hello\n")
    (tree / "Grüße 漢字.txt").write_bytes(b"unicode")
    (tree / "folder/data.bin").write_bytes(random.Random(1).randbytes(700_001))
    (tree / "folder/link").symlink_to("../readme.txt")
    (tree / "big.bin").write_bytes(random.Random(2).randbytes(BIG_BYTES))
    with (tree / "sparse.bin").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(40 << 20)
        file.write(b"island")
    os.utime(tree / "readme.txt", (1_600_000_000, 1_600_000_000))
    make_ext(home / "ext.img", tree, "ext4", "80M")
    small = home / "small"
    small.mkdir()
    (small / "from-fat.txt").write_bytes(b"fat\n")
    make_fat(home / "fat.img", small, 12, "4M")
    make_mbr(home / "two.img", [(0x83, (home / "ext.img").read_bytes()), (0x0C, (home / "fat.img").read_bytes())])
    for name, source in (("web", "ext.img"), ("two", "two.img"), ("fat", "fat.img")):
        service.cli("vhd", "convert", str(home / source), f"{service.paths.disks}/{name}.vhd", "--from", "raw")
    service.cli("partition", "create", "web", "--memory", "128M", "--disk", "web")
    service.cli("partition", "create", "many", "--memory", "128M", "--disk", "two", "--disk", "fat")


def test_files_are_listed_printed_and_fetched(service: Service, tmp_path: Path) -> None:
    listed = service.cli("files", "ls", "web").stdout.splitlines()
    assert listed == ["Grüße 漢字.txt", "big.bin", "folder/", "lost+found/", "readme.txt", "sparse.bin"]
    assert "-rw-r--r--         6  2020-09-13 12:26:40  readme.txt" in service.cli("files", "ls", "-l", "web:/").stdout
    below = service.cli("files", "ls", "-R", "web:/folder").stdout.splitlines()
    assert sorted(below) == ["below/", "data.bin", "link@"]
    assert service.cli("files", "cat", "web:/readme.txt").stdout == "hello\n"

    service.cli("files", "get", "web:/", str(tmp_path / "all"), "--links")
    tree = Path(service.home) / "tree"
    call("diff", "-r", "--exclude=lost+found", tree, tmp_path / "all")
    assert os.readlink(tmp_path / "all/folder/link") == "../readme.txt"
    assert (tmp_path / "all/readme.txt").stat().st_mtime == 1_600_000_000
    assert (tmp_path / "all/sparse.bin").stat().st_blocks * 512 < 1 << 20
    got = service.cli("files", "get", "web:/readme.txt", str(tmp_path), "--format", "json").json
    assert [(one["files"], one["content_bytes"]) for one in got] == [(1, 6)]


def test_a_checkpoint_shows_its_own_time(service: Service) -> None:
    service.cli("checkpoint", "create", "web", "first")
    assert service.cli("files", "cat", "web@first:/readme.txt").stdout == "hello\n"
    none = service.cli("files", "cat", "web@second:/readme.txt", check=False)
    assert (none.status, "checkpoint list web" in none.stderr) == (3, True)
    frozen = service.cli("files", "ls", "web@first:/", "--consistent", check=False)
    assert (frozen.status, "Leave out --consistent" in frozen.stderr) == (5, True)
    service.cli("checkpoint", "delete", "web", "first")


def test_one_of_several_volumes_is_chosen(service: Service) -> None:
    unclear = service.cli("files", "ls", "many", check=False)
    assert unclear.status == 5
    for word in ("disk0 1 ext4", "disk0 2 FAT", "disk1 0 FAT", "--disk disk0 --volume 1"):
        assert word in unclear.stderr
    assert service.cli("files", "ls", "many", "--volume", "0").stdout == "from-fat.txt\n"
    assert "readme.txt" in service.cli("files", "ls", "many", "--disk", "disk0", "--volume", "1").stdout
    assert service.cli("files", "ls", "many", "--disk", "disk1").stdout == "from-fat.txt\n"
    assert service.cli("files", "ls", "many", "--disk", "disk7", check=False).status == 3
    shown = service.cli("files", "ls", "many", "--volumes", "--format", "json").json
    assert [(one["disk"], one["number"], one["readable"]) for one in shown] == [
        ("disk0", 1, True), ("disk0", 2, True), ("disk1", 0, True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("files", "cat", "web:/nothing"), 3, "there is no /nothing"),
        (("files", "cat", "web:/folder"), 5, "is a folder"),
        (("files", "cat", "web:/folder/../readme.txt"), 5, "no '..'"),
        (("files", "ls", "nobody:/"), 3, "no partition"),
        (("files", "cat", "web"), 2, "names no path"),
        (("files", "ls", "@x:/"), 2, "is not PARTITION"),
    ],
)
def test_what_cannot_be_had_is_explained(service: Service, words: tuple[str, ...], status: int, said: str) -> None:
    done = service.cli(*words, check=False)
    assert done.status == status, done.stderr
    assert said in done.stderr


def test_hostile_names_stay_inside(service: Service, tmp_path: Path) -> None:
    """Names that no system would write: patched into the folders of an ext2, where nothing is checksummed."""
    root = tmp_path / "tree"
    (root / "inner").mkdir(parents=True)
    for name in ("AAAAAAAA", "inner/DDDDDDDDDDDD", "EEEEEEEE"):
        (root / name).write_bytes(b"hostile")
    image = make_ext(tmp_path / "hostile.img", root, "ext2", "4M")
    patched = image.read_bytes()
    for old, new in ((b"AAAAAAAA", b"../../xx"), (b"DDDDDDDDDDDD", b"../../../zzz"), (b"EEEEEEEE", b"\x1b[2Jcaf\xe9")):
        patched = patched.replace(old, new)
    image.write_bytes(patched)
    service.cli("vhd", "convert", str(image), f"{service.paths.disks}/hostile.vhd", "--from", "raw")
    service.cli("partition", "create", "hostile", "--memory", "128M", "--disk", "hostile")
    assert "?[2Jcaf\\xe9" in service.cli("files", "ls", "hostile").stdout.replace("\\udce9", "\\xe9")
    target = tmp_path / "here/out"
    target.parent.mkdir()
    refused = service.cli("files", "get", "hostile:/", str(target), check=False)
    assert (refused.status, "its name is none" in refused.stderr) == (8, True), refused.stderr
    assert os.listdir(target.parent) == []
    service.cli("files", "get", "hostile:/", str(target), "--skip")
    assert sorted(os.listdir(os.fsencode(target))) == [b"\x1b[2Jcaf\xe9", b"inner", b"lost+found"]
    assert os.listdir(target / "inner") == []
    assert sorted(os.listdir(tmp_path)) == ["here", "hostile.img", "tree"]


class _UnixConnection(http.client.HTTPConnection):
    """What curl --unix-socket does."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(60)
        self.sock.connect(self._path)


def test_curl_gets_lists_and_contents(service: Service) -> None:
    connection = _UnixConnection(service.paths.api_socket)

    def get(path: str) -> http.client.HTTPResponse:
        connection.request("GET", f"/1.0/partitions/web/files/{path}")
        return connection.getresponse()

    lines = [json.loads(line) for line in get("list?path=/folder").read().splitlines()]
    assert {line["path"] for line in lines} == {"folder", "below", "data.bin", "link"}
    content = get("content?path=/folder/data.bin").read()
    assert content == random.Random(1).randbytes(700_001)
    sparse = get("content?path=/sparse.bin").read()
    assert (len(sparse), sparse[40 << 20 :][:6], sparse.count(0)) == (64 << 20, b"island", (64 << 20) - 6)
    refused = get("content?path=/nothing")
    assert (refused.status, json.loads(refused.read())["code"]) == (404, "not-found")
    connection.close()


def _readers(service: Service) -> list[int]:
    """The processes that read files for this service, by their parent."""
    assert service.process is not None
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
                line = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            if parent == service.process.pid and b"files_worker" in line:
                found.append(int(entry))
    return found


def test_a_client_that_goes_away_ends_the_reader(service: Service) -> None:
    connection = _UnixConnection(service.paths.api_socket)
    connection.request("GET", "/1.0/partitions/web/files/content?path=/big.bin")
    response = connection.getresponse()
    assert len(response.read(1 << 16)) == 1 << 16
    (reader,) = _readers(service)  # it waits: what it has read is more than anybody keeps for it
    response.close()
    connection.close()
    deadline_s = time.monotonic() + READY_S
    while reader in _readers(service):
        assert time.monotonic() < deadline_s, "the reader goes on"
        time.sleep(0.05)
    assert service.cli("files", "cat", "web:/readme.txt").stdout == "hello\n"


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _waits(reader: int) -> bool:
    """Whether it was started ahead, and has its confined reader."""
    try:
        return b"ahead" in Path(f"/proc/{reader}/cmdline").read_bytes() and bool(_children(reader))
    except OSError:
        return False


def _spare(service: Service, used: set[int]) -> int:
    """The reader that waits for the next request; from then on it counts as used."""
    deadline_s = time.monotonic() + READY_S
    while not (found := [reader for reader in _readers(service) if reader not in used and _waits(reader)]):
        assert time.monotonic() < deadline_s, "none was started"
        time.sleep(0.05)
    (spare,) = found
    used.add(spare)
    return spare


def test_a_reader_is_started_ahead_and_used_once(service: Service) -> None:
    used: set[int] = set()

    def works() -> None:
        assert service.cli("files", "cat", "web:/readme.txt").stdout == "hello\n"

    works()
    first = _spare(service, used)
    works()
    second = _spare(service, used)
    assert first not in _readers(service)
    os.kill(_children(second)[0], signal.SIGKILL)  # one that died while it waited is no harm
    works()
    os.kill(_spare(service, used), signal.SIGKILL)
    works()
    third = _spare(service, used)
    assert "ext4" in service.cli("files", "ls", "--volumes", "web").stdout  # which needs no confined reader
    last = _spare(service, used)
    doomed = [ProcessIdentity.of(pid) for pid in (third, last, *_children(last))]
    service.kill()
    deadline_s = time.monotonic() + READY_S
    while any(process is not None and process.is_alive for process in doomed):
        assert time.monotonic() < deadline_s, "a spare outlives its service"
        time.sleep(0.05)
    service.start()
    works()
