"""Disks in other formats are read as QEMU, Windows and VMware mean them; hostile ones lead to no other file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contract.block_device import all_of, read
from tests.interop.test_vhd_fixtures import FIXTURES, unpacked

from mullion.base.block import ExtentKind
from mullion.base.errors import InvalidError, NotFoundError
from mullion.media.confined import jail
from mullion.media.errors import ForeignDiskError, ForeignReferenceError, ForeignUnsupportedError
from mullion.media.foreign import detect_format, open_foreign, open_ova
from mullion.media.headers import Source
from mullion.media.ova import list_ova
from mullion.media.qemu import served
from mullion.vhd.errors import DiskReadOnlyError, NotVhdError

pytestmark = pytest.mark.interop

needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the folder of foreign disks is not there: set MULLION_FIXTURES"
)
SIZE_BYTES = 24 << 20
SECRET = "/etc/shadow"


def qemu_img(*words: str) -> str:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def content() -> bytes:
    """Data, holes and data again; the first sector could be that of no other format."""
    choose = random.Random(3)
    disk = bytearray(SIZE_BYTES)
    disk[: 300 << 10] = choose.randbytes(300 << 10)
    disk[9 << 20 : 10 << 20] = choose.randbytes(1 << 20)
    disk[-5000:] = choose.randbytes(5000)
    return bytes(disk)


@pytest.fixture
def raw(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "raw image é.img"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "driver", "options"),
    [
        ("vhdx", "vhdx", ""),
        ("qcow2", "qcow2", "compat=1.1"),
        ("qcow2", "qcow2", "compat=0.10"),
        ("qcow", "qcow", ""),
        ("qed", "qed", ""),
        ("vdi", "vdi", ""),
        ("vdi", "vdi", "static=on"),
        ("parallels", "parallels", ""),
        ("vmdk", "vmdk", "subformat=monolithicSparse"),
        ("vmdk", "vmdk", "subformat=streamOptimized"),
        ("vmdk", "vmdk", "subformat=monolithicFlat"),
        ("vmdk", "vmdk", "subformat=twoGbMaxExtentFlat"),
        ("vhd", "vpc", "force_size=on"),
        ("raw", "raw", ""),
    ],
)
def test_each_format_reads_as_it_was_written(
    tmp_path: Path, raw: Path, content: bytes, kind: str, driver: str, options: str
) -> None:
    path = str(tmp_path / "a disk, 50%.img")
    qemu_img("convert", "-f", "raw", "-O", driver, *(["-o", options] if options else []), str(raw), path)
    before = Path(path).read_bytes()
    assert detect_format(path) == kind
    with open_foreign(path) as device:
        assert device.read_only
        assert device.size_bytes == SIZE_BYTES
        assert all_of(device) == content
        assert read(device, SIZE_BYTES - 700, 700) == content[-700:]
        at = 0
        for extent in device.extents(0, SIZE_BYTES):
            assert extent.offset == at
            at += extent.length
            assert extent.kind is ExtentKind.DATA or not any(content[extent.offset : at])
        assert at == SIZE_BYTES
        with pytest.raises(DiskReadOnlyError):
            device.pwrite(0, b"x")
        with pytest.raises(InvalidError):
            device.pread(SIZE_BYTES - 1, bytearray(2))
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize("block_bytes", [1 << 20, 8 << 20, 32 << 20])
def test_the_holes_of_a_vhdx_are_known(tmp_path: Path, block_bytes: int) -> None:
    """In each chunk of blocks, behind entries for bitmaps too, and up to the last block, which is cut."""
    size, raw, path = (70 << 30) + 4096, tmp_path / "raw", str(tmp_path / "disk.vhdx")
    with raw.open("wb") as file:
        file.truncate(size)
        for at in (0, 9 << 30, (64 << 30) - 512, size - 512):
            file.seek(at)
            file.write(b"x" * 512)
    qemu_img("convert", "-f", "raw", "-O", "vhdx", "-o", f"block_size={block_bytes}", str(raw), path)
    with open_foreign(path) as device:
        data = [extent for extent in device.extents(0, size) if extent.kind is ExtentKind.DATA]
        assert sum(extent.length for extent in data) <= 4 * block_bytes
        for at in (0, 9 << 30, (64 << 30) - 512, size - 512):
            assert any(extent.offset <= at < extent.offset + extent.length for extent in data)
            assert read(device, at, 512) == b"x" * 512
        part = list(device.extents(size - 700, 600))
        assert part[0].offset == size - 700
        assert sum(extent.length for extent in part) == 600


def test_a_format_can_be_named(raw: Path, content: bytes) -> None:
    """A raw disk whose guest wrote the header of another format into it stays a raw disk."""
    raw.write_bytes(b"QFI\xfb" + content[4:])
    assert detect_format(str(raw)) == "qcow2"
    with open_foreign(str(raw), "raw") as device:
        assert read(device, 0, 8) == b"QFI\xfb" + content[4:8]


@needs_fixtures
def test_vhdx_of_windows(tmp_path: Path) -> None:
    for name in ("ntfs-dynamic.vhdx.gz", "ntfs-parent.vhdx.gz"):
        with open_foreign(unpacked(name, tmp_path)) as device:
            assert device.size_bytes == 4 << 20
            boot = read(device, 65536, 11)
            assert boot[3:7] == b"NTFS"


@needs_fixtures
def test_the_log_of_a_vhdx_is_replayed_without_a_write_to_it(tmp_path: Path) -> None:
    path = unpacked("iotest-dirtylog-10G-4M.vhdx.bz2", tmp_path)
    before = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    copy = tmp_path / "copy.vhdx"
    copy.write_bytes(Path(path).read_bytes())
    os.chmod(path, 0o400)
    with open_foreign(path) as device:
        assert device.size_bytes == 10 << 30
        start = read(device, 0, 32 << 20)
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == before
    subprocess.run(["qemu-img", "check", "-q", "-r", "all", str(copy)], check=False, capture_output=True)
    qemu_img("dd", "-f", "vhdx", "-O", "raw", "bs=1M", "count=32", f"if={copy}", f"of={tmp_path / 'start'}")
    assert (tmp_path / "start").read_bytes() == start
    assert any(start)


@needs_fixtures
def test_a_differencing_vhdx_is_refused_by_name(tmp_path: Path) -> None:
    unpacked("ntfs-parent.vhdx.gz", tmp_path)
    with (
        pytest.raises(ForeignReferenceError, match=r"differencing disk, its parent is .*ntfs-parent\.vhdx") as caught,
        open_foreign(unpacked("ntfs-differential.vhdx.gz", tmp_path)),
    ):
        pass
    assert "Merge-VHD" in caught.value.remedy
    assert caught.value.context["offset"] > 0


def test_qcow2_with_a_backing_file(tmp_path: Path) -> None:
    path = str(tmp_path / "child.qcow2")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", SECRET, "-F", "raw", path, "1M")
    with pytest.raises(ForeignReferenceError, match="/etc/shadow"), open_foreign(path):
        pass


def test_qcow2_with_a_pseudo_file_name_as_backing_file(tmp_path: Path) -> None:
    path = str(tmp_path / "child.qcow2")
    name = 'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/shadow"}}'
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path, "1M")
    with pytest.raises(ForeignReferenceError, match="json:"), open_foreign(path):
        pass


@pytest.mark.parametrize("strips_name", [False, True])
def test_qcow2_with_a_data_file(tmp_path: Path, strips_name: bool) -> None:
    path = tmp_path / "data.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'other.raw'}", str(path), "1M")
    if strips_name:
        image = bytearray(path.read_bytes())
        image[image.index(b"DATA") :][:4] = bytes(4)
        image[104:112] = bytes(8)
        path.write_bytes(image)
    with pytest.raises(ForeignReferenceError, match="another file"), open_foreign(str(path)):
        pass


@pytest.mark.parametrize(("driver", "kind"), [("qcow", "qcow"), ("qed", "qed")])
def test_old_formats_with_a_backing_file(tmp_path: Path, driver: str, kind: str) -> None:
    base, path = tmp_path / "base.img", str(tmp_path / "child.img")
    base.write_bytes(bytes(1 << 20))
    qemu_img("create", "-q", "-u", "-f", driver, "-b", str(base), "-F", "raw", path, "1M")
    assert detect_format(path) == kind
    with pytest.raises(ForeignReferenceError, match=r"base\.img"), open_foreign(path):
        pass


@pytest.mark.parametrize("name", [SECRET, "../secret", "a/b", "..", "a\\b", "json:{}/x"])
def test_vmdk_descriptor_with_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_text(f'# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\nRW 2048 FLAT "{name}" 0\n')
    with pytest.raises(ForeignReferenceError, match="another folder"), open_foreign(str(path)):
        pass


def test_vmdk_descriptor_with_a_link(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_text('# Disk DescriptorFile\nversion=1\nRW 1 FLAT "extent" 0\n')
    (tmp_path / "extent").symlink_to(SECRET)
    with pytest.raises(ForeignReferenceError, match="link"), open_foreign(str(path)):
        pass
    (tmp_path / "extent").unlink()
    with pytest.raises(NotFoundError, match="not beside it"), open_foreign(str(path)):
        pass
    (tmp_path / "extent").write_bytes(b"short")
    with pytest.raises(ForeignDiskError, match="are needed"), open_foreign(str(path)):
        pass


def test_vmdk_in_sparse_pieces_is_refused_by_name(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.vmdk")
    qemu_img("create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", path, "1M")
    with pytest.raises(ForeignUnsupportedError, match="type SPARSE") as caught, open_foreign(path):
        pass
    assert "qemu-img convert" in caught.value.remedy


def test_vmdk_with_a_parent(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_text('# Disk DescriptorFile\nparentCID=12345678\nparentFileNameHint="/etc/shadow"\nRW 1 FLAT "x" 0\n')
    with pytest.raises(ForeignReferenceError, match="/etc/shadow"), open_foreign(str(path)):
        pass
    sparse = tmp_path / "sparse.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", str(sparse), "1M")
    image = sparse.read_bytes()
    sparse.write_bytes(image.replace(b"parentCID=ffffffff", b"parentCID=12345678"))
    with pytest.raises(ForeignReferenceError, match="differencing"), open_foreign(str(sparse)):
        pass


def test_vmdk_that_is_a_descriptor_in_disguise(tmp_path: Path) -> None:
    """A sparse header without capacity makes QEMU follow the extents of its embedded descriptor."""
    descriptor = f'# Disk DescriptorFile\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 1 FLAT "{SECRET}" 0\n'
    header = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 3, 0, 128, 1, 1, 512, 0, 0, 128)
    path = tmp_path / "disk.vmdk"
    path.write_bytes(header.ljust(512, b"\0") + descriptor.encode().ljust(512, b"\0") + bytes(1 << 20))
    with pytest.raises(ForeignReferenceError, match="capacity is zero"), open_foreign(str(path)):
        pass


def test_vdi_with_a_parent(tmp_path: Path) -> None:
    path = tmp_path / "disk.vdi"
    qemu_img("create", "-q", "-f", "vdi", str(path), "1M")
    image = bytearray(path.read_bytes())
    image[0x4C] = 4
    path.write_bytes(image)
    with pytest.raises(ForeignReferenceError, match="differencing"), open_foreign(str(path)):
        pass


def test_a_pseudo_file_name_is_a_file_name(tmp_path: Path) -> None:
    for name in ('json:{"driver":"null-co"}', "nbd:localhost:10809", "https://example.org/x.img"):
        with pytest.raises(NotFoundError), open_foreign(name):
            pass
    with pytest.raises(NotVhdError, match="regular file"), open_foreign(str(tmp_path)):
        pass
    with pytest.raises(NotVhdError, match="regular file"), open_foreign("/dev/null"):
        pass


def test_encrypted_qcow2_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", str(path), "1M")
    raw = bytearray(path.read_bytes())
    raw[32:36] = (2).to_bytes(4, "big")  # LUKS; qemu-img itself would spend seconds on a key
    path.write_bytes(raw)
    with pytest.raises(ForeignUnsupportedError, match="encrypted"), open_foreign(str(path)):
        pass


@pytest.mark.parametrize(("head", "word"), [(b"\x1f\x8b\x08", "gzip -dk"), (b"PK\x03\x04", "unzip")])
def test_packed_files_are_named(tmp_path: Path, head: bytes, word: str) -> None:
    path = tmp_path / "disk.vhd.packed"
    path.write_bytes(head + bytes(4096))
    with pytest.raises(ForeignUnsupportedError) as caught, open_foreign(str(path)):
        pass
    assert word in caught.value.remedy


@pytest.mark.parametrize("kind", ["qcow2", "vhdx", "vdi", "vmdk", "qed", "parallels", "qcow"])
def test_damage_ends_in_an_error(tmp_path: Path, kind: str) -> None:
    """Headers cut short, or with random bytes: never a traceback, a hang or another kind of error."""
    path = tmp_path / "disk.img"
    qemu_img("create", "-q", "-f", kind, str(path), "8M")
    image = path.read_bytes()
    choose = random.Random(kind)
    for number in range(12):
        damaged = bytearray(image)
        if number < 3:
            damaged = damaged[: choose.choice([40, 600, 70_000])]
        else:
            for _ in range(20):
                damaged[choose.randrange(16, min(len(damaged), 2048))] = choose.randrange(256)
        path.write_bytes(damaged)
        try:
            with open_foreign(str(path), kind) as device:
                if device.size_bytes >= 4096:
                    read(device, 0, 4096)
        except ForeignDiskError as error:
            assert str(path) in error.message  # noqa: PT017 - a disk that opens is as good an outcome
            assert "/proc/self" not in error.message  # noqa: PT017


# ---------------------------------------------------------------------------------------------------- the second wall


@pytest.fixture
def unchecked(tmp_path: Path) -> Iterator[Source]:
    """A QCOW2 with a backing file, as it would be if the look at its header had been fooled."""
    path = str(tmp_path / "child.qcow2")
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 1000)
    secret.chmod(0o644)
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", str(secret), "-F", "raw", path, "1M")
    fd = os.open(path, os.O_RDONLY)
    yield Source(fd, path, 0, os.fstat(fd).st_size)
    os.close(fd)


def test_backing_files_are_switched_off(unchecked: Source) -> None:
    with served(unchecked, "qcow2") as device:
        assert not any(read(device, 0, 4096))


def test_qemu_itself_can_open_nothing_else(unchecked: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mullion.media.qemu._HAS_BACKING", ())  # as if the backing file were not switched off
    with pytest.raises(ForeignDiskError, match="Permission denied"), served(unchecked, "qcow2"):
        pass


def test_qemu_is_shut_in(raw: Path) -> None:
    path = str(raw.with_suffix(".qcow2"))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", str(raw), path)
    with open_foreign(path) as device:
        pid = device._server.pid  # type: ignore[attr-defined]
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert status["NoNewPrivs"] == "1"
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert "Max core file size        0" in limits
        assert "Max file size             0" in limits
        if os.geteuid() == 0:
            assert status["Uid"].split()[:3] == [str(jail.NOBODY)] * 3
            assert int(status["CapEff"], 16) in (0, 1 << 2)
            assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
        files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert [name for name in files if name.startswith("/") and not name.startswith("/dev/")] in ([path], [path] * 2)
    assert not Path(f"/proc/{pid}").exists()


# --------------------------------------------------------------------------------------------------------------- OVA

OVF = """<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
  <References>{files}</References>
  <DiskSection><Info>Disks</Info>{disks}</DiskSection>
</Envelope>"""


def ovf(*names: str, extra: str = "") -> bytes:
    files = "".join(f'<File ovf:id="f{n}" ovf:href="{name}" {extra}/>' for n, name in enumerate(names))
    disks = "".join(f'<Disk ovf:diskId="d{n}" ovf:fileRef="f{n}" ovf:capacity="1"/>' for n, _ in enumerate(names))
    return OVF.format(files=files, disks=disks).encode()


def make_ova(path: Path, members: dict[str, bytes], *, manifest: bool = True, style: int = tarfile.USTAR_FORMAT) -> str:
    if manifest:
        lines = [f"SHA256({name})= {hashlib.sha256(data).hexdigest()}" for name, data in members.items()]
        first, *rest = members.items()
        members = dict([first, ("box.mf", "\n".join(lines).encode() + b"\n"), *rest])
    with tarfile.open(path, "w", format=style) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def stream(tmp_path: Path, raw: Path) -> bytes:
    path = tmp_path / "stream.vmdk"
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", str(raw), str(path))
    return path.read_bytes()


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_ova_with_one_disk(tmp_path: Path, content: bytes, stream: bytes, style: int) -> None:
    name = "a-disk-with-a-long-name-" * 6 + ".vmdk" if style != tarfile.USTAR_FORMAT else "disk1.vmdk"
    path = make_ova(tmp_path / "box.ova", {"box.ovf": ovf(name), name: stream}, style=style)
    assert detect_format(path) == "ova"
    with open_foreign(path) as device:
        assert all_of(device) == content


def test_ova_with_several_disks(tmp_path: Path, content: bytes, stream: bytes) -> None:
    members = {"box.ovf": ovf("disk1.vmdk", "second.img"), "disk1.vmdk": stream, "second.img": content[:4096]}
    path = make_ova(tmp_path / "box.ova", members)
    assert [(disk.number, disk.name) for disk in list_ova(path)] == [(1, "disk1.vmdk"), (2, "second.img")]
    with pytest.raises(InvalidError, match=r"1 disk1\.vmdk .*2 second\.img"), open_foreign(path):
        pass
    for choice in ("2", "second.img"):
        with open_ova(path, choice) as device:
            assert all_of(device) == content[:4096]
    with open_ova(path, "1") as device:
        assert device.size_bytes == SIZE_BYTES
    with pytest.raises(NotFoundError, match="no disk '3'"), open_ova(path, "3"):
        pass


def test_ova_whose_disk_was_changed(tmp_path: Path, stream: bytes) -> None:
    path = Path(make_ova(tmp_path / "box.ova", {"box.ovf": ovf("disk1.vmdk"), "disk1.vmdk": stream}))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ForeignDiskError, match="not what the manifest says"), open_foreign(str(path)):
        pass


@pytest.mark.parametrize(
    ("description", "error"),
    [
        (ovf("/etc/shadow"), ForeignReferenceError),
        (ovf("../disk1.vmdk"), ForeignReferenceError),
        (ovf("http://example.org/disk.vmdk"), ForeignReferenceError),
        (ovf("disk1.vmdk", extra='ovf:compression="gzip"'), ForeignUnsupportedError),
        (ovf(), ForeignDiskError),
        (b"<Envelope>", ForeignDiskError),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', ForeignDiskError),
        (b'<!DOCTYPE a [<!ENTITY b SYSTEM "/etc/shadow">]><a>&b;</a>', ForeignDiskError),
    ],
)
def test_hostile_ova(tmp_path: Path, description: bytes, error: type[Exception]) -> None:
    path = make_ova(tmp_path / "box.ova", {"box.ovf": description, "disk1.vmdk": b"x" * 512}, manifest=False)
    with pytest.raises(error), open_foreign(path):
        pass


def test_ova_cut_short(tmp_path: Path, stream: bytes) -> None:
    path = Path(make_ova(tmp_path / "box.ova", {"box.ovf": ovf("disk1.vmdk"), "disk1.vmdk": stream}))
    path.write_bytes(path.read_bytes()[: len(stream) // 2])
    with pytest.raises(ForeignDiskError, match="past the end"), open_foreign(str(path)):
        pass


def test_the_limits_are_written_into_the_command_line() -> None:
    line = jail.command(("prog", "arg"), limits=jail.Limits(1, 2, 3, 4), listen_fd=7, files=(8, 9))
    assert line[1:4] == ("-I", "-m", "mullion.media.confined.jail")
    rights = json.loads(line[4])
    assert rights == {
        "argv": ["prog", "arg"],
        "limits": {"memory_bytes": 1, "cpu_s": 2, "file_bytes": 3, "descriptors": 4},
        "listen": 7,
        "files": [8, 9],
    }
