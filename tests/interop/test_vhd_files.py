"""Files inside disks are read as they were written, by a process that can do nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.interop.filesystem_images import (
    call,
    device_of,
    make_exfat,
    make_ext,
    make_fat,
    make_iso,
    make_mbr,
)
from tests.interop.test_vhd_fixtures import FIXTURES, unpacked

from mullion.base.errors import AlreadyExistsError, InvalidError, MullionError, NotFoundError
from mullion.media.confined import channel, jail
from mullion.media.errors import FilesystemError, ReaderDiedError, VolumeChoiceError
from mullion.media.filesystems import reader
from mullion.media.filesystems.entries import FileEntry, Hole
from mullion.media.filesystems.extract import extract
from mullion.media.filesystems.reader import VolumeReader, open_volume
from mullion.media.filesystems.volumes import choose_volume, list_volumes
from mullion.media.foreign import open_foreign

pytestmark = pytest.mark.interop

needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the folder of foreign disks is not there: set MULLION_FIXTURES"
)
PASSWORDS = (126, "677ff39b3f70e7173580976e587b9ec30c73703d9947a36808b22fe29ed49ab8")


def content_of(files: VolumeReader, path: str) -> bytes:
    parts = [
        item if isinstance(item, bytes) else bytes(item.length)
        for item in files.read(path)
        if not isinstance(item, FileEntry)
    ]
    return b"".join(parts)


def names_of(files: VolumeReader, path: str = "/", *, recursive: bool = False) -> list[str]:
    return [entry.path for entry in files.list(path, recursive=recursive) if entry.path]


def opened(path: Path | str, number: int | None = None) -> Iterator[VolumeReader]:
    with (
        open_foreign(str(path)) as device,
        open_volume(device, choose_volume(str(path), list_volumes(device)[0], number), str(path)) as files,
    ):
        yield files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files of many kinds."""
    root = tmp_path / "tree"
    (root / "folder/below").mkdir(parents=True)
    (root / "readme.txt").write_bytes(b"hello\n")
    (root / "empty").touch()
    (root / "Grüße 漢字.txt").write_bytes(b"unicode")
    (root / "folder/data.bin").write_bytes(random.Random(1).randbytes(700_001))
    (root / "folder/below/deep").write_bytes(b"d" * 5000)
    os.utime(root / "readme.txt", (1_600_000_000, 1_600_000_000))
    return root


# ------------------------------------------------------------------------------------------------------ real disks


@needs_fixtures
@pytest.mark.parametrize(
    ("name", "parent"),
    [
        ("ntfs-dynamic.vhd.gz", None),
        ("ntfs-differential.vhd.gz", "ntfs-parent.vhd.gz"),
        ("ntfs-dynamic.vhdx.gz", None),
        ("ntfs-parent.vhdx.gz", None),
    ],
)
def test_ntfs_of_windows(tmp_path: Path, name: str, parent: str | None) -> None:
    if parent:
        unpacked(parent, tmp_path)
    for files in opened(unpacked(name, tmp_path)):
        found = {entry.path: entry for entry in files.list("/", recursive=True)}
        if "passwords.txt" not in found:  # the parent alone was made before its child's files
            assert "parent" in name
            continue
        for path in ("/passwords.txt", "PASSWORDS.TXT", "//./Passwords.txt"):
            content = content_of(files, path)
            assert (len(content), hashlib.sha256(content).hexdigest()) == PASSWORDS
        assert found["passwords.txt"].size_bytes == 126
        assert found["passwords.txt"].modified_ns is not None
        assert found["a_link"].type == "link"
        assert found["a_link"].target == "x:/a_directory/another_file"
        assert not any(path.startswith("$") for path in found)


@needs_fixtures
def test_ext2_of_qemu_and_fat_of_windows(tmp_path: Path) -> None:
    for files in opened(unpacked("ext2.vhd.gz", tmp_path)):
        found = {entry.path: entry for entry in files.list("/", recursive=True)}
        assert [path for path, entry in found.items() if entry.type == "file"] == [
            "passwords.txt", "a_directory/a_file", "a_directory/another_file",
        ]  # fmt: skip
        assert len(content_of(files, "/passwords.txt")) == 116
        with pytest.raises(NotFoundError):
            content_of(files, "/PASSWORDS.txt")
    for files in opened(unpacked("win10-fat16-fixed.vhd.gz", tmp_path)):
        assert "System Volume Information/WPSettings.dat" in names_of(files, recursive=True)
        assert len(content_of(files, "/system volume information/wpsettings.dat")) == 12


# ----------------------------------------------------------------------------------------- filesystems made here


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4", "fat12", "fat16", "fat32", "iso"])
def test_what_was_written_is_read(tmp_path: Path, tree: Path, kind: str) -> None:
    image = tmp_path / "disk.img"
    if kind.startswith("ext"):
        make_ext(image, tree, kind)
    elif kind == "iso":
        make_iso(image, tree)
    else:
        make_fat(image, tree, int(kind[3:]), {"fat12": "4M", "fat16": "40M", "fat32": "80M"}[kind])
    wanted = {str(path.relative_to(tree)): path for path in tree.rglob("*")}
    for files in opened(image):
        found = {
            entry.path: entry for entry in files.list("/", recursive=True) if entry.path and "lost+" not in entry.path
        }
        assert sorted(found) == sorted(wanted)
        for name, path in wanted.items():
            assert (found[name].type == "folder") == path.is_dir()
            if path.is_file():
                assert content_of(files, name) == path.read_bytes()
                assert abs((found[name].modified_ns or 0) / 1e9 - path.stat().st_mtime) < 86_400
        assert names_of(files, "/folder") == ["data.bin", "below"] or sorted(names_of(files, "/folder")) == [
            "below",
            "data.bin",
        ]


def test_exfat(tmp_path: Path) -> None:
    content = random.Random(2).randbytes(10_000)
    image = make_exfat(tmp_path / "disk.img", "A long Name Grüße.bin", content)
    for files in opened(image):
        assert names_of(files) == ["A long Name Grüße.bin"]
        assert content_of(files, "/a LONG name grüße.bin") == content


def test_ext4_with_links_sparse_files_and_odd_names(tmp_path: Path, tree: Path) -> None:
    (tree / "link").symlink_to("/etc/passwd")
    Path(os.fsdecode(bytes(tree) + b"/not-utf8-\xff\xfe")).write_bytes(b"odd")
    (tree / "a:b").write_bytes(b"colon")
    with (tree / "sparse").open("wb") as file:
        file.truncate(300 << 20)
        file.seek(200 << 20)
        file.write(b"x" * 4096)
    target = tmp_path / "out"
    for files in opened(make_ext(tmp_path / "disk.img", tree)):
        assert content_of(files, "/a:b") == b"colon"
        done = extract(files, "/", str(target), links=True)
        assert (done.links, done.left_out) == (1, [])
    shutil.rmtree(target / "lost+found")
    assert os.readlink(target / "link") == "/etc/passwd"
    assert Path(os.fsdecode(bytes(target) + b"/not-utf8-\xff\xfe")).read_bytes() == b"odd"
    assert (target / "sparse").stat().st_size == 300 << 20
    assert (target / "sparse").stat().st_blocks * 512 < 1 << 20
    call("diff", "-r", "--no-dereference", tree, target)
    assert (target / "readme.txt").stat().st_mtime == 1_600_000_000
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


# --------------------------------------------------------------------------------------------------------- volumes


def test_volumes_are_listed_and_chosen(tmp_path: Path, tree: Path) -> None:
    one = make_ext(tmp_path / "ext.img", tree, "ext4", "8M", "-L", "rootfs").read_bytes()
    two = make_fat(tmp_path / "fat.img", tree, 12, "4M").read_bytes()
    swap = bytearray(1 << 20)
    swap[4086:4096] = b"SWAPSPACE2"
    disk = make_mbr(tmp_path / "disk.img", [(0x83, one), (0x0C, two), (0x82, bytes(swap))])
    device = device_of(disk)
    volumes, problems = list_volumes(device)
    assert problems == ()
    assert [(volume.number, volume.kind, volume.holds.title) for volume in volumes] == [
        (1, "Linux", "ext4"), (2, "FAT32", "FAT12"), (3, "Linux swap", "swap space"),
    ]  # fmt: skip
    assert volumes[0].holds.label == "rootfs"
    with pytest.raises(VolumeChoiceError, match="several volumes"):
        choose_volume(str(disk), volumes, None)
    with pytest.raises(VolumeChoiceError, match="no volume 7"):
        choose_volume(str(disk), volumes, 7)
    with pytest.raises(FilesystemError, match="swap space"):
        choose_volume(str(disk), volumes, 3)
    for number in (1, 2):
        with open_volume(device, choose_volume(str(disk), volumes, number), str(disk)) as files:
            assert content_of(files, "/readme.txt") == b"hello\n"
    device.close()


@pytest.mark.parametrize(
    ("offset", "magic", "title", "remedy"),
    [
        (0, b"XFSB", "XFS", "mullion vhd mount"),
        (0x10040, b"_BHRfS_M", "btrfs", "mullion vhd mount"),
        (512, b"LABELONE" + bytes(16) + b"LVM2 001", "LVM", "vgchange"),
        (0, b"LUKS\xba\xbe", "LUKS", "cryptsetup"),
        (3, b"ReFS\0\0\0\0", "ReFS", "Windows"),
        (3, b"-FVE-FS-", "BitLocker", "Decrypt"),
        ((128 << 10) + 4096, b"\x0c\xb1\xba\0\0\0\0\0", "ZFS", "zpool"),
        (4086, b"SWAPSPACE2", "swap", "no files"),
        (100, b"?", "nothing that is known", "mullion vhd mount"),
    ],
)
def test_what_cannot_be_read_is_said_by_name(
    tmp_path: Path, offset: int, magic: bytes, title: str, remedy: str
) -> None:
    image = bytearray(1 << 20)
    image[offset : offset + len(magic)] = magic
    path = tmp_path / "disk.img"
    path.write_bytes(image)
    with pytest.raises(FilesystemError, match=title) as caught:
        for _ in opened(path):
            pass
    assert remedy in caught.value.remedy


# ------------------------------------------------------------------------------------------------- taking files out


def test_files_are_whole_or_not_there(tmp_path: Path, tree: Path) -> None:
    target = tmp_path / "readme"
    for files in opened(make_ext(tmp_path / "disk.img", tree)):
        extract(files, "/readme.txt", str(target))
        assert target.read_bytes() == b"hello\n"
        target.write_bytes(b"mine")
        with pytest.raises(AlreadyExistsError):
            extract(files, "/empty", str(target))
        assert target.read_bytes() == b"mine"
        extract(files, "/readme.txt", str(target), force=True)
        assert target.read_bytes() == b"hello\n"
        (tmp_path / "taken").mkdir()
        for name in ("/folder", "/readme.txt"):
            with pytest.raises(AlreadyExistsError):
                extract(files, name, str(tmp_path / "taken"), force=True)
        with pytest.raises(NotFoundError, match="there is no /folder/none"):
            extract(files, "/folder/none", str(tmp_path / "none"))
        assert not (tmp_path / "none").exists()


def test_links_and_devices_are_left_out_and_counted(tmp_path: Path, tree: Path) -> None:
    (tree / "one").symlink_to("readme.txt")
    (tree / "two").symlink_to("/etc/passwd")
    os.mkfifo(tree / "pipe")
    for files in opened(make_ext(tmp_path / "disk.img", tree)):
        done = extract(files, "/", str(tmp_path / "out"))
        assert sorted(done.left_out) == [
            "2 symbolic links, which --links makes",
            "pipe: it is a device, a socket or a pipe",
        ]
        with pytest.raises(InvalidError, match="is a link"):
            extract(files, "/one", str(tmp_path / "one"))
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        [*(set(os.listdir(tree)) - {"one", "two", "pipe"}), "lost+found"]
    )


def test_no_room_leaves_nothing(tmp_path: Path, tree: Path) -> None:
    """A limit on the length of files stands for a full disk: both refuse a write half-way."""
    image = make_ext(tmp_path / "disk.img", tree)
    (tmp_path / "here").mkdir()
    command = f"ulimit -f 400; exec {sys.executable} -m mullion.cli vhd get {image}"
    for what in ("/folder/data.bin", "/folder"):
        done = subprocess.run(
            ["bash", "-c", f"{command} {what} here"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 9
        assert "cannot be written" in done.stderr
        assert "Traceback" not in done.stderr
        assert os.listdir(tmp_path / "here") == []
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m mullion.cli vhd cat {image} /folder/data.bin > /dev/full"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 9
    assert "Traceback" not in done.stderr


def test_a_file_that_claims_to_be_endless_is_a_hole(tmp_path: Path) -> None:
    """A size of terabytes on a disk of megabytes costs nothing but a number, and what is stored is found in it."""
    root = tmp_path / "tree"
    root.mkdir()
    with (root / "endless").open("wb") as file:
        file.write(b"start")
        file.truncate(3 << 40)
        file.seek(2 << 40)
        file.write(b"middle")
    for files in opened(make_ext(tmp_path / "disk.img", root, "ext4", "8M")):
        pieces = [item for item in files.read("/endless") if not isinstance(item, FileEntry)]
        assert sum(piece.length if isinstance(piece, Hole) else len(piece) for piece in pieces) == 3 << 40
        assert [piece.rstrip(b"\0") for piece in pieces if isinstance(piece, bytes)] == [b"start", b"middle"]


def test_hostile_names_stay_inside(tmp_path: Path) -> None:
    """Names that no system would write: patched into the folders of an ext2, where nothing is checksummed."""
    root = tmp_path / "tree"
    (root / "inner").mkdir(parents=True)
    for name in ("AAAAAAAA", "BBBBBBBB", "CC", "inner/DDDDDDDDDDDD"):
        (root / name).write_bytes(b"hostile")
    image = make_ext(tmp_path / "disk.img", root, "ext2", "4M")
    data = image.read_bytes()
    for old, new in (
        (b"AAAAAAAA", b"../../xx"),
        (b"BBBBBBBB", b"/etc/xxx"),
        (b"CC", b".."),
        (b"DDDDDDDDDDDD", b"../../../zzz"),
    ):
        assert data.count(old) == 1 or old == b"CC"
        data = data.replace(old, new)
    image.write_bytes(data)
    for files in opened(image):
        with pytest.raises(FilesystemError, match="name is none"):
            extract(files, "/", str(tmp_path / "out"))
        with pytest.raises(InvalidError, match=r"'\.\.'"):
            content_of(files, "/../../etc/passwd")
    assert not (tmp_path / "out").exists()
    for files in opened(image):
        done = extract(files, "/", str(tmp_path / "out"), skip=True)
        assert len(done.left_out) == 3
    assert sorted(os.listdir(tmp_path / "out")) == ["inner", "lost+found"]
    assert os.listdir(tmp_path / "out/inner") == []
    assert sorted(os.listdir(tmp_path)) == ["disk.img", "out", "tree"]


def test_a_link_and_a_folder_of_one_name(tmp_path: Path) -> None:
    """Nothing is written through a link: links are made last, and a name that is taken is left out."""
    root, outside = tmp_path / "tree", tmp_path / "outside"
    (root / "linkdirx").mkdir(parents=True)
    outside.mkdir()
    (root / "linkdirx/file").write_bytes(b"through")
    (root / "linkdiry").symlink_to(outside)
    image = make_ext(tmp_path / "disk.img", root, "ext2", "4M")
    image.write_bytes(image.read_bytes().replace(b"linkdirx", b"linkdiry"))
    for files in opened(image):
        done = extract(files, "/", str(tmp_path / "out"), links=True, skip=True)
        assert any("two of that name" in text for text in done.left_out)
    assert os.listdir(outside) == []
    assert (tmp_path / "out/linkdiry/file").read_bytes() == b"through"


def test_folders_that_contain_each_other_end(tmp_path: Path, tree: Path) -> None:
    image = make_ext(tmp_path / "disk.img", tree, "ext2", "8M")
    call("debugfs", "-w", "-R", "ln folder folder/below/again", image)
    for files in opened(image):
        found = list(files.list("/", recursive=True))
        again = [entry for entry in found if entry.path == "folder/below/again"]
        assert len(again) == 1
        assert "contain each other" in (again[0].unreadable or "")


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("kind", ["ext4", "fat", "iso", "exfat", "ntfs"])
def test_damage_ends_in_an_error_or_in_files(tmp_path: Path, tree: Path, kind: str) -> None:
    """Random bytes over the metadata: neither a hang nor a crash gets through, and the next disk is read again."""
    image = tmp_path / "disk.img"
    match kind:
        case "ext4":
            make_ext(image, tree, "ext4", "8M")
        case "fat":
            make_fat(image, tree, 12, "4M")
        case "iso":
            make_iso(image, tree)
        case "exfat":
            make_exfat(image, "name.bin", b"x" * 9000)
        case "ntfs":
            if not FIXTURES.is_dir():
                pytest.skip("the folder of foreign disks is not there: set MULLION_FIXTURES")
            with open_foreign(unpacked("ntfs-dynamic.vhd.gz", tmp_path)) as device:
                content = bytearray(device.size_bytes)
                device.pread(0, content)
            image.write_bytes(content[65536 : 65536 + 3_000_000])
    good = image.read_bytes()
    used = [start for start in range(0, len(good), 512) if any(good[start : start + 512])]
    choose = random.Random(kind)
    for _ in range(25):
        bad = bytearray(good)
        for _ in range(choose.choice([3, 40, 400])):
            bad[choose.choice(used) + choose.randrange(512)] = choose.choice(
                [0, 1, 0x7F, 0x80, 0xFF, choose.randrange(256)]
            )
        image.write_bytes(bad)
        try:
            for files in opened(image):
                for entry in files.list("/", recursive=True):
                    assert isinstance(entry, FileEntry)
                extract(files, "/", str(tmp_path / "out"), skip=True)
        except MullionError as error:
            assert error.remedy  # noqa: PT017 - files are as good an outcome
        finally:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


# -------------------------------------------------------------------------------------------------------- the jail

IN_JAIL = """
import os, socket, resource, sys, json
from mullion.media.confined import jail
held = os.open("/etc/hostname", os.O_RDONLY)
kept, other = socket.socketpair()
jail.confine(jail.Limits(memory_bytes=300 << 20, cpu_s=7, file_bytes=0, descriptors=16), keep=(kept.fileno(),), parent=os.getppid())
def tried(step):
    try:
        step()
    except BaseException as error:
        return type(error).__name__
    return "done"
def status():
    return {line.split(":")[0]: line.split(":")[1].split() for line in text.splitlines()}
print(json.dumps({
    "open": tried(lambda: os.open("/etc/passwd", os.O_RDONLY)),
    "list": tried(lambda: os.listdir("/")),
    "proc": tried(lambda: os.open("/proc/self/fd/0", os.O_RDONLY)),
    "socket": tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)),
    "unix": tried(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)),
    "fork": tried(os.fork),
    "exec": tried(lambda: os.execv("/bin/true", ["true"])),
    "kill": tried(lambda: os.kill(os.getppid(), 0)),
    "held": tried(lambda: os.read(held, 1)),
    "kept": tried(lambda: os.write(kept.fileno(), b"x")),
    "memory": tried(lambda: bytearray(400 << 20)),
    "limit": tried(lambda: resource.setrlimit(resource.RLIMIT_CPU, (60, 60))),
    "pid": os.getpid(),
}))
"""


def test_the_jail_is_one() -> None:
    done = subprocess.run([sys.executable, "-c", IN_JAIL], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for step in ("open", "list", "proc", "socket", "unix", "exec", "kill"):
        assert found[step] == "PermissionError", step
    assert found["limit"] in ("PermissionError", "ValueError")
    assert found["fork"] in ("PermissionError", "BlockingIOError")
    assert found["held"] == "OSError"  # it was closed
    assert found["kept"] in ("done", "BrokenPipeError")
    assert found["memory"] == "MemoryError"


def test_the_reader_is_in_it(tmp_path: Path, tree: Path) -> None:
    for files in opened(make_ext(tmp_path / "disk.img", tree)):
        names_of(files)
        process = Path(f"/proc/{files.pid}")
        status = {
            line.split(":")[0]: line.split(":")[1].split() for line in (process / "status").read_text().splitlines()
        }
        assert status["NoNewPrivs"] == ["1"]
        assert status["Seccomp"] == ["2"]
        assert int(status["CapEff"][0], 16) == 0
        if os.geteuid() == 0:
            assert status["Uid"] == [str(jail.NOBODY)] * 4
            assert os.readlink(process / "ns/net") != os.readlink("/proc/self/ns/net")
        assert os.readlink(process / "cwd") == "/"
        kept = [os.readlink(process / "fd" / fd) for fd in os.listdir(process / "fd")]
        assert sorted(name.split(":")[0] for name in kept) == ["/dev/null", "/dev/null", "pipe", "socket"]
        limits = {line[:25].strip(): line[25:].split()[0] for line in (process / "limits").read_text().splitlines()[1:]}
        assert limits["Max address space"] == str(1 << 30)
        assert limits["Max cpu time"] == "600"
        assert limits["Max file size"] == "0"
        assert limits["Max core file size"] == "0"
    assert not process.exists()


def test_a_reader_that_dies_is_one_error(tmp_path: Path, tree: Path) -> None:
    for files in opened(make_ext(tmp_path / "disk.img", tree)):
        os.kill(files.pid, signal.SIGKILL)
        with pytest.raises(ReaderDiedError, match="signal 9"):
            names_of(files)
        assert "readme.txt" in names_of(files)  # by a new process


def test_a_reader_that_hangs_is_ended(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for files in opened(make_ext(tmp_path / "disk.img", tree)):
        pid = files.pid
        monkeypatch.setattr(reader, "DEADLINE_S", 0.3)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ReaderDiedError, match="without a result"):
            names_of(files)
        assert not Path(f"/proc/{pid}").exists()


def test_the_reader_dies_with_its_parent(tmp_path: Path, tree: Path) -> None:
    image = make_ext(tmp_path / "disk.img", tree)
    script = (
        "import sys, time\n"
        "from tests.interop.test_vhd_files import opened\n"
        "for files in opened(sys.argv[1]):\n"
        "    print(files.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(image)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        assert select.select([pidfd], [], [], 60)[0]
        os.close(pidfd)


@pytest.mark.parametrize(
    ("says", "complaint"),
    [
        ("send(fd, b'J', b'{}')", "an entry that is none"),
        ("send(fd, b'J', b'[]')", "what is no object"),
        ("send(fd, b'J', b'{')", "what is not JSON"),
        ("send(fd, b'J', b'[' * 100000)", "what is not JSON"),
        ("send(fd, b'?', b'')", "it sent b'?'"),
        ("os.write(fd, HEAD.pack(b'B', 1 << 31))", "it announced 2147483648 bytes"),
        ("send(fd, b'R', READ.pack(0, 1 << 30))", "bytes at once"),
        ("send(fd, b'R', b'x')", "in a way that is none"),
        ("send(fd, b'X', EXTENT_PLACE.pack(0, 1 << 40))", "it named 1099511627776 bytes at 0 of a volume of"),
        ("send(fd, b'X', EXTENT_PLACE.pack((1 << 64) - 1, 1))", "it named 1 bytes at 18446744073709551615"),
        ("send(fd, b'X', b'x')", "it named an extent in a way that is none"),
        ("sys.exit(3)", "it ended with status 3"),
    ],
)
def test_a_reader_that_lies_is_not_believed(
    tmp_path: Path, tree: Path, says: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import os, sys\n"
        "from mullion.media.confined.channel import EXTENT_PLACE, HEAD, READ, send\n"
        f"fd = int(sys.argv[1])\nsend(fd, b'H')\nos.read(fd, 1000)\n{says}\nos.read(fd, 1000)\n"
    )
    attach = reader.attach
    monkeypatch.setattr(
        reader, "attach", lambda line, pass_fds: attach([sys.executable, "-c", script, line[4]], pass_fds=pass_fds)
    )
    for files in opened(make_ext(tmp_path / "disk.img", tree)):
        with pytest.raises(ReaderDiedError) as caught:
            names_of(files)
    assert complaint in caught.value.message


def test_nothing_beyond_the_volume_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that asks for the bytes behind its partition gets none of them."""
    fat = bytearray(1 << 20)
    fat[54:62], fat[510:512] = b"FAT16   ", b"\x55\xaa"
    disk = make_mbr(tmp_path / "disk.img", [(0x06, bytes(fat)), (0x07, b"secret!!" * (1 << 17))])
    script = (
        "import os, sys\n"
        "from mullion.media.confined.channel import *\n"
        "fd = int(sys.argv[1])\nsend(fd, b'H')\nos.read(fd, 1000)\n"
        "for offset in ((1 << 20) - 16, 1 << 20, (1 << 64) - 1):\n"
        "    send(fd, b'R', READ.pack(offset, 4096))\n"
        "    kind, length = HEAD.unpack(receive_exactly(fd, HEAD.size))\n"
        "    send(fd, b'B', receive_exactly(fd, length) + b'|')\n"
        "send(fd, b'E', b'{}')\nos.read(fd, 1000)\n"
    )
    attach = reader.attach
    monkeypatch.setattr(
        reader, "attach", lambda line, pass_fds: attach([sys.executable, "-c", script, line[4]], pass_fds=pass_fds)
    )
    for files in opened(disk, 1):
        assert content_of(files, "/") == bytes(16) + b"|||"
    assert channel.READ_LIMIT_BYTES < channel.FRAME_LIMIT_BYTES


# -------------------------------------------------------------------------------------------------------- commands


def mullion(*words: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "mullion.cli", "vhd", *words], cwd=cwd, capture_output=True, timeout=60, check=False
    )


def test_the_commands(tmp_path: Path, tree: Path) -> None:
    (tree / "evil\x1b[2Jname").write_bytes(b"")
    ext = make_ext(tmp_path / "ext.img", tree, "ext4", "8M")
    make_mbr(
        tmp_path / "disk.img",
        [(0x83, ext.read_bytes()), (0x0C, make_fat(tmp_path / "f.img", tree / "folder", 12, "4M").read_bytes())],
    )
    plain = mullion("ls", "ext.img", cwd=tmp_path).stdout.decode().splitlines()
    assert plain == ["Grüße 漢字.txt", "empty", "evil?[2Jname", "folder/", "lost+found/", "readme.txt"]
    assert b"readme.txt" in mullion("ls", "-l", "disk.img:1", cwd=tmp_path).stdout
    assert b"folder/below/deep" in mullion("ls", "-R", "disk.img", "--volume", "1", cwd=tmp_path).stdout
    entries = json.loads(mullion("ls", "ext.img", "/folder", "--format", "json", cwd=tmp_path).stdout)
    assert {entry["name"]: entry["size_bytes"] for entry in entries if entry["type"] == "file"} == {"data.bin": 700_001}
    volumes = json.loads(mullion("ls", "disk.img", "--volumes", "--format", "json", cwd=tmp_path).stdout)
    assert [(volume["number"], volume["readable"]) for volume in volumes] == [(1, True), (2, True)]
    refused = mullion("ls", "disk.img", cwd=tmp_path)
    assert refused.returncode == 5
    assert b"--volume" in refused.stderr
    system = make_fat(tmp_path / "efi.img", tree / "folder", 12, "4M").read_bytes()
    make_mbr(tmp_path / "uefi.img", [(0xEF, system), (0x83, ext.read_bytes())])
    assert b"readme.txt" in mullion("ls", "uefi.img", cwd=tmp_path).stdout
    make_mbr(tmp_path / "stick.img", [(0xEF, system)])
    assert b"data.bin" in mullion("ls", "stick.img", cwd=tmp_path).stdout
    assert (
        mullion("cat", "disk.img:1", "/folder/data.bin", cwd=tmp_path).stdout == (tree / "folder/data.bin").read_bytes()
    )
    missing = mullion("cat", "ext.img", "/none", cwd=tmp_path)
    assert (missing.returncode, missing.stdout) == (3, b"")
    done = mullion("get", "ext.img", "/folder", "copy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    call("diff", "-r", tree / "folder", tmp_path / "copy")
    assert mullion("get", "ext.img", "/folder", "/readme.txt", "copy", cwd=tmp_path).returncode == 0
    assert (tmp_path / "copy/readme.txt").read_bytes() == b"hello\n"
    assert mullion("get", "ext.img", "/readme.txt", "copy", cwd=tmp_path).returncode == 4
