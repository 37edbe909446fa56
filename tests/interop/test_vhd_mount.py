"""`mullion vhd mount`: read and written by ordinary programs, with its process killed, busy, misused; nothing stays."""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import shlex
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.framework.vhd_command import COMMAND, environment, vhd

from mullion.base.process import ProcessIdentity
from mullion.base.units import MIB
from mullion.media.mount import PROCESS_ATTRIBUTE
from mullion.vhd import create_differencing, create_dynamic, open_chain

pytestmark = pytest.mark.interop

SIZE_BYTES = 16 * MIB


@pytest.fixture
def home(short_tmp: Path) -> Iterator[Path]:
    """A folder with base.vhd, and child.vhd, a child of it; both have data. In the end nothing may be mounted there."""
    choose = random.Random(4)
    create_dynamic(str(short_tmp / "base.vhd"), SIZE_BYTES)
    with open_chain(str(short_tmp / "base.vhd")) as chain:
        chain.pwrite(MIB, choose.randbytes(5 * MIB))
    create_differencing(str(short_tmp / "child.vhd"), str(short_tmp / "base.vhd"))
    with open_chain(str(short_tmp / "child.vhd")) as chain:
        chain.pwrite(3 * MIB + 512, choose.randbytes(MIB))
    yield short_tmp
    left = [folder for folder in mounted() if folder.startswith(str(short_tmp))]
    for folder in left:
        subprocess.run(["umount", "--lazy", folder], check=True)
    assert not left


def mounted() -> list[str]:
    found = program("findmnt", "--noheadings", "--list", "--types", "fuse.mullion", "--output", "TARGET", check=False)
    return found.stdout.split()


def program(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=check)


def mount(home: Path, *words: str) -> Path:
    """Mount with these words on mnt; it must succeed."""
    done = vhd(home, "mount", words[0], "mnt", *words[1:])
    assert done.returncode == 0, done.stderr
    return home / "mnt"


def unmount(home: Path) -> None:
    done = vhd(home, "unmount", "mnt")
    assert done.returncode == 0, done.stderr


def process_of(folder: Path) -> ProcessIdentity:
    identity = ProcessIdentity.parse(os.getxattr(folder, PROCESS_ATTRIBUTE).decode())
    assert identity is not None
    return identity


def await_end(identity: ProcessIdentity) -> None:
    pidfd = identity.open_pidfd()
    if pidfd is not None:
        with open(pidfd, "rb") as ended:
            assert select.select([ended], [], [], 60)[0]


def content_of(path: Path) -> bytes:
    with open_chain(str(path), read_only=True) as chain:
        content = bytearray(chain.size_bytes)
        chain.pread(0, content)
    return bytes(content)


def test_a_chain_is_read_by_ordinary_programs(home: Path) -> None:
    content = content_of(home / "child.vhd")
    folder = mount(home, "child.vhd")
    assert os.listdir(folder) == ["disk.raw"]
    assert (folder / "disk.raw").stat().st_size == SIZE_BYTES
    program("cp", f"{folder}/disk.raw", f"{home}/copy")
    assert (home / "copy").read_bytes() == content
    program("cmp", f"{folder}/disk.raw", f"{home}/copy")
    program("dd", f"if={folder}/disk.raw", f"of={home}/piece", "bs=1000", "skip=3333", "count=777")
    assert (home / "piece").read_bytes() == content[3_333_000:4_110_000]
    program("dd", f"if={folder}/disk.raw", f"of={home}/direct", "bs=1M", "iflag=direct")
    assert (home / "direct").read_bytes() == content
    assert os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize == SIZE_BYTES
    identity = process_of(folder)
    unmount(home)
    assert not identity.is_alive
    assert os.listdir(home / "mnt") == []
    assert os.listdir(home / "run/mounts") == []


def test_it_is_read_only_unless_asked_for(home: Path) -> None:
    folder = mount(home, "child.vhd")
    with pytest.raises(OSError, match="Read-only file system"):
        (folder / "disk.raw").open("r+b")
    with pytest.raises(OSError, match="Read-only file system"):
        (folder / "new").touch()
    unmount(home)


def test_what_is_written_is_on_the_disk(home: Path) -> None:
    content = bytearray(content_of(home / "child.vhd"))
    folder = mount(home, "child.vhd", "--writable")
    choose = random.Random(5)
    with (folder / "disk.raw").open("r+b", buffering=0) as file:
        for _ in range(200):  # mostly no whole sectors
            offset, piece = choose.randrange(SIZE_BYTES - 9000), choose.randbytes(choose.randrange(1, 9000))
            file.seek(offset)
            assert file.write(piece) == len(piece)
            content[offset : offset + len(piece)] = piece
        os.fsync(file)
    assert (folder / "disk.raw").read_bytes() == content
    unmount(home)
    assert content_of(home / "child.vhd") == content
    assert json.loads(vhd(home, "check", "child.vhd", "--format", "json").stdout)["verdict"] == "sound"


def test_a_disk_keeps_its_size_and_its_folder_its_files(home: Path) -> None:
    folder = mount(home, "base.vhd", "--writable")
    with pytest.raises(PermissionError):
        os.truncate(folder / "disk.raw", SIZE_BYTES + 1)
    for refused in ((folder / "new").touch, (folder / "new").mkdir, (folder / "disk.raw").unlink):
        with pytest.raises(PermissionError):
            refused()
    with (folder / "disk.raw").open("r+b", buffering=0) as file:
        file.seek(SIZE_BYTES - 100)
        assert file.write(bytes(200)) == 100
        with pytest.raises(OSError, match="No space left"):
            file.write(b"x")
    (home / "image").write_bytes(random.Random(6).randbytes(SIZE_BYTES))
    program("cp", f"{home}/image", f"{folder}/disk.raw")  # opens it with O_TRUNC, as it would a block device
    program("fallocate", "--punch-hole", "--offset", "1M", "--length", "2M", f"{folder}/disk.raw")
    unmount(home)
    expected = bytearray((home / "image").read_bytes())
    expected[MIB : 3 * MIB] = bytes(2 * MIB)
    assert content_of(home / "base.vhd") == expected


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_partitions_are_files(home: Path, label: str) -> None:
    layout = f"label: {label}\nstart=2048, size=4096\nstart=8192, size=10000\n"
    if label == "dos":
        layout += "start=20000, size=8000, type=5\nstart=20480, size=2048\n"
    (home / "image").write_bytes(content_of(home / "base.vhd"))
    subprocess.run(["sfdisk", "--quiet", f"{home}/image"], input=layout, text=True, check=True, timeout=60)
    with open_chain(str(home / "base.vhd")) as chain:
        chain.pwrite(0, (home / "image").read_bytes())
    folder = mount(home, "base.vhd", "--writable")
    content = (home / "image").read_bytes()
    expected = {"partition1.raw": (2048, 4096), "partition2.raw": (8192, 10000)}
    if label == "dos":
        expected["partition5.raw"] = (20480, 2048)
    assert sorted(os.listdir(folder)) == ["disk.raw", *expected]
    for name, (first, count) in expected.items():
        assert (folder / name).read_bytes() == content[first * 512 : (first + count) * 512]
    program("mke2fs", "-q", "-t", "ext2", f"{folder}/partition2.raw")
    shown = (folder / "disk.raw").read_bytes()[8192 * 512 : 18192 * 512]  # written through one file, read in the other
    assert shown == (folder / "partition2.raw").read_bytes()
    program("e2fsck", "-fn", f"{folder}/partition2.raw")
    unmount(home)


def test_files_inside_are_found_by_7z(home: Path) -> None:
    (home / "tree").mkdir()
    (home / "tree/hello").write_text("from inside\n")
    create_dynamic(str(home / "files.vhd"), SIZE_BYTES)
    folder = mount(home, "files.vhd", "--writable")
    program("mke2fs", "-q", "-t", "ext4", "-d", f"{home}/tree", f"{folder}/disk.raw")
    unmount(home)
    mount(home, "files.vhd")
    assert program("7zz", "x", "-so", f"{folder}/disk.raw", "hello").stdout == "from inside\n"
    unmount(home)


def test_a_disk_in_another_format_is_mounted(home: Path) -> None:
    program("qemu-img", "convert", "-f", "vpc", "-O", "qcow2", f"{home}/base.vhd", f"{home}/disk.qcow2")
    program("qemu-img", "convert", "-f", "qcow2", "-O", "raw", f"{home}/disk.qcow2", f"{home}/raw")
    folder = mount(home, "disk.qcow2")
    program("cmp", f"{folder}/disk.raw", f"{home}/raw")
    unmount(home)


def test_a_killed_mount_says_what_to_do_and_loses_nothing_that_was_flushed(home: Path) -> None:
    folder = mount(home, "child.vhd", "--writable")
    with (folder / "disk.raw").open("r+b", buffering=0) as file:
        file.seek(7 * MIB)
        file.write(b"x" * 700)
        os.fsync(file)
    identity = process_of(folder)
    assert identity.send_signal(signal.SIGKILL)
    await_end(identity)
    with pytest.raises(OSError, match="not connected"):
        os.listdir(folder)
    again = vhd(home, "mount", "child.vhd", "mnt")
    assert again.returncode == 4
    assert f"mullion vhd unmount {folder}" in again.stderr.replace("python -m mullion.cli", "mullion")
    unmount(home)
    mount(home, "child.vhd")
    with (folder / "disk.raw").open("rb") as file:
        file.seek(7 * MIB)
        assert file.read(700) == b"x" * 700
    unmount(home)


def test_a_mount_in_use_is_not_unmounted(home: Path) -> None:
    folder = mount(home, "base.vhd")
    with (folder / "disk.raw").open("rb"):
        refused = vhd(home, "unmount", "mnt")
        assert refused.returncode == 4
        assert "fuser" in refused.stderr
    unmount(home)


def test_fusermount_ends_it_too(home: Path) -> None:
    folder = mount(home, "base.vhd", "--writable")
    identity = process_of(folder)
    program("fusermount3", "-u", str(folder))
    await_end(identity)
    with open_chain(str(home / "base.vhd")):
        pass  # free for a writer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_the_foreground_it_stays_until_a_signal(home: Path, number: signal.Signals) -> None:
    argv = [*COMMAND, "mount", "base.vhd", "mnt", "--foreground"]
    with subprocess.Popen(argv, cwd=home, env=environment(home), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "^C ends it" in process.stderr.readline()
        assert hashlib.sha256((home / "mnt/disk.raw").read_bytes()).digest()
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (0, "")


@pytest.mark.parametrize(
    ("words", "status", "what"),
    [
        (("none.vhd", "mnt"), 3, "there is no file"),
        (("base.vhd", "no/mnt"), 3, "there is no folder"),
        (("base.vhd", "child.vhd"), 5, "is not a folder"),
        (("base.vhd", "."), 4, "is not empty"),
        (("base.vhd", "nowhere"), 5, "is a link to"),
        (("broken.vhd", "mnt"), 8, "no valid footer"),
    ],
)
def test_a_mount_that_fails_says_why_and_leaves_nothing(
    home: Path, words: tuple[str, ...], status: int, what: str
) -> None:
    (home / "broken.vhd").write_bytes(b"conectix" + bytes(5000))
    (home / "nowhere").symlink_to("not-there")
    before = sorted(os.listdir(home))
    refused = vhd(home, "mount", *words)
    assert refused.returncode == status, refused.stderr
    assert what in refused.stderr
    assert "→" in refused.stderr
    assert sorted(name for name in os.listdir(home) if name != "run") == before


def test_a_busy_disk_is_not_mounted(home: Path) -> None:
    mount(home, "base.vhd", "--writable")
    refused = vhd(home, "mount", "base.vhd", "other")
    assert refused.returncode == 4
    assert f"mullion vhd mount {home}/mnt (pid " in refused.stderr
    assert not (home / "other").exists()
    unmount(home)


@pytest.fixture
def open_home(home: Path) -> Path:
    """A home in which anybody may write and read the disks."""
    os.chmod(home, 0o777)
    os.chmod(home / "base.vhd", 0o644)
    return home


def in_users_shell(home: Path, lines: str, *, fuse_mode: int) -> subprocess.CompletedProcess[str]:
    """Run lines of a shell as nobody, where /dev/fuse has this mode; `vhd` is the command."""
    device = home / "fuse"
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(10, 229))
    os.chmod(device, fuse_mode)
    user = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    script = f'vhd() {{ {shlex.join(COMMAND)} "$@"; }}\n{lines}'
    whole = f"mount --bind {device} /dev/fuse && exec {user} bash -ec {shlex.quote(script)}"
    argv = ["unshare", "--mount", "bash", "-c", whole]
    return subprocess.run(
        argv, cwd=home, env=environment(home), capture_output=True, text=True, timeout=60, check=False
    )


def test_an_ordinary_user_mounts_for_himself(open_home: Path) -> None:
    lines = "vhd mount base.vhd mnt; sha256sum mnt/disk.raw; vhd unmount mnt; vhd mount base.vhd mnt --allow-other"
    done = in_users_shell(open_home, lines, fuse_mode=0o666)  # as distributions have it
    assert done.returncode == 7, done.stderr
    assert done.stdout.split()[0] == hashlib.sha256(content_of(open_home / "base.vhd")).hexdigest()
    assert "'user_allow_other' is set in /etc/fuse.conf" in done.stderr  # what fusermount3 said is passed on


def test_without_the_rights_to_mount_it_says_what_libfuse_said(open_home: Path) -> None:
    done = in_users_shell(open_home, "vhd mount base.vhd mnt", fuse_mode=0o600)
    assert done.returncode == 7
    assert "could not be mounted" in done.stderr
    assert "Permission denied" in done.stderr
    assert not (open_home / "mnt").exists()


@pytest.mark.parametrize("where", ["mnt", "child.vhd", "none"])
def test_what_is_not_mounted_is_not_unmounted(home: Path, where: str) -> None:
    (home / "mnt").mkdir()
    refused = vhd(home, "unmount", where)
    assert refused.returncode == 3
    assert "no disk is mounted" in refused.stderr
