"""Copying a disk's content into new files: layouts, holes, odd sizes, refusals, and reading back."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
from tests.contract.block_device import all_of
from tests.framework.devices import MemoryDevice

from mullion.base.errors import AlreadyExistsError, InvalidError, OperationFailedError
from mullion.base.units import GIB, KIB, MIB
from mullion.vhd import DiskBusyError, create_differencing, create_dynamic, inspect_chain, open_chain
from mullion.vhd.cloning import clone_disk
from mullion.vhd.copying import TargetKind, copy_disk
from mullion.vhd.fileio import FileIO
from mullion.vhd.hashing import hash_content
from mullion.vhd.image import load_image, open_file
from mullion.vhd.layout import DiskType
from mullion.vhd.rawfile import RawFile
from mullion.vhd.streaming import stream_disk, stream_range

pytestmark = pytest.mark.unit


def disk_with(size_bytes: int, *pieces: tuple[int, bytes]) -> MemoryDevice:
    device = MemoryDevice(size_bytes)
    for offset, content in pieces:
        device.pwrite(offset, content)
    return device


def scattered(size_bytes: int, seed: int) -> MemoryDevice:
    """Data, written zeros and holes, with odd borders."""
    choose = random.Random(seed)
    device = MemoryDevice(size_bytes)
    for _ in range(40):
        length = min(choose.choice([1, 512, 4096, 70_000, 700_000]), size_bytes)
        offset = choose.randrange(size_bytes - length + 1)
        device.pwrite(offset, choose.choice([bytes(length), choose.randbytes(length)]))
    device.pwrite(size_bytes - 1, b"\x01")
    return device


def content_of(path: str) -> bytes:
    if path.endswith(".img"):
        return Path(path).read_bytes()
    with open_chain(path, read_only=True) as chain:
        return bytes(all_of(chain))


@pytest.mark.parametrize("kind", list(TargetKind))
@pytest.mark.parametrize("size_bytes", [512, 5 * MIB + 512, 8 * MIB, 6 * MIB + 4096, 3 * MIB - 512])
def test_the_content_arrives(kind: TargetKind, size_bytes: int, tmp_path: Path) -> None:
    source = scattered(size_bytes, size_bytes)
    path = str(tmp_path / ("disk.img" if kind is TargetKind.RAW else "disk.vhd"))
    made = copy_disk(source, path, kind, verify=True)
    assert content_of(path) == source.content
    assert (made.size_bytes, made.padding_bytes) == (size_bytes, 0)
    if kind is not TargetKind.RAW:
        found = inspect_chain(path).files[0]
        odd = ("the geometry is zero",) if size_bytes == 512 else ()
        assert (found.type.word, found.size_bytes, found.warnings, found.damage) == (kind.value, size_bytes, odd, ())


@pytest.mark.parametrize("block_bytes", [512, 2 * KIB, 4 * KIB, 512 * KIB, 4 * MIB, 16 * MIB])
def test_blocks_of_every_size(block_bytes: int, tmp_path: Path) -> None:
    source = scattered(9 * MIB + 512, block_bytes)
    path = str(tmp_path / "disk.vhd")
    copy_disk(source, path, TargetKind.DYNAMIC, block_bytes=block_bytes, verify=True)
    assert content_of(path) == source.content
    found = inspect_chain(path).files[0]
    assert (found.block_bytes, found.warnings, found.damage) == (block_bytes, (), ())


def test_an_odd_size_is_padded_and_said(tmp_path: Path) -> None:
    source = disk_with(1_000_001, (999_000, b"x" * 1001))
    for kind, name in ((TargetKind.DYNAMIC, "d.vhd"), (TargetKind.FIXED, "f.vhd"), (TargetKind.RAW, "r.img")):
        made = copy_disk(source, str(tmp_path / name), kind, verify=True)
        assert (made.size_bytes, made.padding_bytes) == (1_000_448, 447)
        assert content_of(str(tmp_path / name)) == bytes(source.content) + bytes(447)


def test_the_layout_is_the_one_that_the_engine_makes(tmp_path: Path) -> None:
    """Blocks copied in order and blocks written in order lie at the same places."""
    copied, written = str(tmp_path / "copied.vhd"), str(tmp_path / "written.vhd")
    source = disk_with(10 * MIB, (0, b"a" * 10), (5 * MIB, b"b" * 10), (9 * MIB, b"c" * 10))
    copy_disk(source, copied, TargetKind.DYNAMIC)
    create_dynamic(written, 10 * MIB)
    with open_chain(written) as chain:
        for offset in (0, 5 * MIB, 9 * MIB):
            chain.pwrite(offset, source.content[offset : offset + 10])
    images = []
    for path in (copied, written):
        fd = open_file(path)
        images.append(load_image(fd, path))
        os.close(fd)
    assert list(images[0].bat) == list(images[1].bat)
    assert images[0].footer_offset == images[1].footer_offset
    left, right = bytearray(Path(copied).read_bytes()), bytearray(Path(written).read_bytes())
    for raw in (left, right):  # time, checksum and id differ
        for start in (0, len(raw) - 512):
            raw[start + 24 : start + 28] = bytes(4)
            raw[start + 64 : start + 84] = bytes(20)
    assert left == right


def test_zeros_take_no_room(tmp_path: Path) -> None:
    source = MemoryDevice(32 * MIB)
    source.pwrite(0, bytes(32 * MIB))
    source.pwrite(7 * MIB, b"x")
    path = str(tmp_path / "disk.vhd")
    made = copy_disk(source, path, TargetKind.DYNAMIC)
    assert made.data_bytes == 4096
    assert inspect_chain(path).files[0].allocated_bytes == 2 * MIB
    for kind, name in ((TargetKind.FIXED, "f.vhd"), (TargetKind.RAW, "r.img")):
        copy_disk(source, str(tmp_path / name), kind)
        assert (tmp_path / name).stat().st_blocks * 512 <= 64 * KIB


def test_an_empty_disk_is_what_create_makes(tmp_path: Path) -> None:
    copy_disk(MemoryDevice(40 * MIB), str(tmp_path / "copied.vhd"), TargetKind.DYNAMIC)
    create_dynamic(str(tmp_path / "made.vhd"), 40 * MIB)
    assert (tmp_path / "copied.vhd").stat().st_size == (tmp_path / "made.vhd").stat().st_size


def test_a_huge_sparse_file_is_copied_at_once(tmp_path: Path) -> None:
    raw = tmp_path / "huge.img"
    with raw.open("wb") as file:
        file.truncate(2040 * GIB)
        file.seek(1000 * GIB + 4096)
        file.write(b"here")
    with RawFile(str(raw)) as source:
        copy_disk(source, str(tmp_path / "huge.vhd"), TargetKind.DYNAMIC, verify=True)
    with open_chain(str(tmp_path / "huge.vhd"), read_only=True) as chain:
        found = bytearray(4)
        chain.pread(1000 * GIB + 4096, found)
        assert (bytes(found), chain.size_bytes) == (b"here", 2040 * GIB)


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    for source, kind, block in (
        (MemoryDevice(0), TargetKind.FIXED, None),
        (MemoryDevice(MIB), TargetKind.DYNAMIC, 3 * MIB),
        (MemoryDevice(MIB), TargetKind.FIXED, 2 * MIB),
    ):
        with pytest.raises(InvalidError):
            copy_disk(source, str(tmp_path / "disk"), kind, block_bytes=block)
    assert list(tmp_path.iterdir()) == []


def test_targets_that_must_not_be_replaced(tmp_path: Path) -> None:
    base, child, link = (str(tmp_path / name) for name in ("base.vhd", "child.vhd", "link.vhd"))
    create_dynamic(base, MIB)
    create_differencing(child, base)
    os.symlink(base, link)
    with open_chain(child, read_only=True) as chain:
        for path in (base, child, link):
            with pytest.raises(InvalidError, match="belongs to the source"):
                copy_disk(chain, path, TargetKind.DYNAMIC, keep_from=chain.paths, replace=True)
        with pytest.raises(AlreadyExistsError):
            copy_disk(MemoryDevice(MIB), base, TargetKind.DYNAMIC)
        with pytest.raises(InvalidError, match="not a regular file"):
            copy_disk(MemoryDevice(MIB), str(tmp_path), TargetKind.DYNAMIC, replace=True)
    other = str(tmp_path / "other.vhd")
    create_dynamic(other, MIB)
    with open_chain(other), pytest.raises(DiskBusyError):
        copy_disk(MemoryDevice(MIB), other, TargetKind.DYNAMIC, replace=True)
    copy_disk(disk_with(MIB, (0, b"new")), other, TargetKind.DYNAMIC, replace=True)
    assert content_of(other)[:3] == b"new"


class Failing(MemoryDevice):
    """A source whose storage fails in the middle."""

    def pread(self, offset: int, buffer: bytearray | memoryview) -> None:
        if offset >= 4 * MIB:
            raise OSError(5, "Input/output error")
        super().pread(offset, buffer)


@pytest.mark.parametrize("ending", [OSError, KeyboardInterrupt])
def test_nothing_is_left_of_a_copy_that_failed(ending: type[BaseException], tmp_path: Path) -> None:
    source = Failing(8 * MIB) if ending is OSError else MemoryDevice(8 * MIB)
    source.pwrite(0, random.Random(1).randbytes(8 * MIB))

    def interrupt(_stage: str, done_bytes: int, _total: int) -> None:
        if ending is KeyboardInterrupt and done_bytes > 2 * MIB:
            raise KeyboardInterrupt

    with pytest.raises((OperationFailedError, KeyboardInterrupt)):
        copy_disk(source, str(tmp_path / "disk.vhd"), TargetKind.DYNAMIC, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_ends_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_io: FileIO, _fd: int, _buffers: object, _offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(FileIO, "pwritev", refuse)
    with pytest.raises(OperationFailedError, match=r"disk\.vhd"):
        copy_disk(scattered(32 * MIB, 1), str(tmp_path / "disk.vhd"), TargetKind.FIXED)
    assert list(tmp_path.iterdir()) == []


def test_storage_that_wants_no_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses the first one, as one with larger sectors would."""
    refused = []
    real = FileIO.pwritev

    def once(file_io: FileIO, fd: int, buffers: list[memoryview], offset: int) -> int:
        if not refused:
            refused.append(offset)
            raise OSError(22, "Invalid argument")
        return real(file_io, fd, buffers, offset)

    monkeypatch.setattr(FileIO, "pwritev", once)
    source = scattered(8 * MIB, 5)
    copy_disk(source, str(tmp_path / "disk.vhd"), TargetKind.FIXED, verify=True)
    assert refused
    assert content_of(str(tmp_path / "disk.vhd")) == source.content


def test_verifying_finds_a_wrong_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FileIO.fdatasync

    def spoil(file_io: FileIO, fd: int) -> None:
        os.pwrite(fd, b"?", 5 * MIB)
        real(file_io, fd)

    monkeypatch.setattr(FileIO, "fdatasync", spoil)
    for kind, name in ((TargetKind.RAW, "r.img"), (TargetKind.FIXED, "f.vhd")):
        with pytest.raises(OperationFailedError, match="reads differently"):
            copy_disk(disk_with(8 * MIB, (0, b"x")), str(tmp_path / name), kind, verify=True)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    source = scattered(16 * MIB, 9)
    copy_disk(source, str(tmp_path / "disk.vhd"), TargetKind.DYNAMIC, verify=True, progress=lambda *a: said.append(a))
    for stage in ("copying", "verifying"):
        done = [(part, whole) for name, part, whole in said if name == stage]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1]


def test_one_hash_whatever_the_file(tmp_path: Path) -> None:
    base, child, flat, raw = (str(tmp_path / name) for name in ("base.vhd", "child.vhd", "flat.vhd", "flat.img"))
    create_dynamic(base, 20 * MIB)
    with open_chain(base) as chain:
        chain.pwrite(3 * MIB + 5, b"base" * 20_000)
    create_differencing(child, base)
    with open_chain(child) as chain:
        chain.pwrite(3 * MIB + 700, b"child" * 99)
        expected = hashlib.sha256(all_of(chain)).hexdigest()
    with open_chain(child, read_only=True) as chain:
        assert hash_content(chain) == expected
        copy_disk(chain, flat, TargetKind.FIXED)
        copy_disk(chain, raw, TargetKind.RAW)
    with open_chain(flat, read_only=True) as chain, RawFile(raw) as file:
        assert hash_content(chain) == hash_content(file) == expected


@pytest.mark.parametrize("kind", [TargetKind.RAW, TargetKind.FIXED])
@pytest.mark.parametrize("size_bytes", [MIB + 512, MIB + 100])
def test_into_a_descriptor(kind: TargetKind, size_bytes: int, tmp_path: Path) -> None:
    source = scattered(size_bytes, 4)
    out = tmp_path / "out"
    with out.open("wb") as file:
        assert stream_disk(source, file.fileno(), kind) == -(-size_bytes // 512) * 512
    raw = out.read_bytes()
    assert raw[:size_bytes] == source.content
    if kind is TargetKind.FIXED:
        with open_chain(str(out), read_only=True) as chain:
            assert bytes(all_of(chain))[:size_bytes] == source.content


def test_a_range_into_a_pipe(tmp_path: Path) -> None:
    base, child = str(tmp_path / "base.vhd"), str(tmp_path / "child.vhd")
    create_dynamic(base, 8 * MIB)
    with open_chain(base) as chain:
        chain.pwrite(MIB, os.urandom(MIB))
    create_differencing(child, base)
    with open_chain(child) as chain:
        chain.pwrite(MIB + 4096 + 512, b"child" * 500)
        content = bytes(all_of(chain))
    with open_chain(child, read_only=True) as chain:
        for offset, length in ((MIB - 777, 30_000), (0, 5), (8 * MIB - 3, 3), (MIB, 0)):
            reader, writer = os.pipe()
            stream_range(chain, writer, offset, length)  # less than a pipe holds
            os.close(writer)
            with os.fdopen(reader, "rb") as file:
                assert file.read() == content[offset : offset + length]


def test_a_clone_has_an_identity_of_its_own(tmp_path: Path) -> None:
    base, child = str(tmp_path / "base.vhd"), str(tmp_path / "child.vhd")
    folder = tmp_path / "ein Ordner ß"
    folder.mkdir()
    create_dynamic(base, 8 * MIB)
    with open_chain(base) as chain:
        chain.pwrite(5 * MIB, b"base")
    create_differencing(child, base)
    with open_chain(child) as chain:
        chain.pwrite(100, b"child")
    for path, kind in ((base, DiskType.DYNAMIC), (child, DiskType.DIFFERENCING)):
        target = str(folder / f"clone of {os.path.basename(path)}")
        made = clone_disk(path, target)
        found, original = inspect_chain(target), inspect_chain(path)
        assert found.files[0].type is kind
        assert found.files[0].unique_id == made.unique_id != original.files[0].unique_id
        assert [file.unique_id for file in found.files[1:]] == [file.unique_id for file in original.files[1:]]
        assert (found.files[0].warnings, found.files[0].damage) == ((), ())
        assert content_of(target) == content_of(path)
    with pytest.raises(AlreadyExistsError):
        clone_disk(child, str(folder / "clone of child.vhd"))
    with pytest.raises(InvalidError, match="belongs to the source"):
        clone_disk(child, base, replace_target=True)


def test_a_raw_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    from mullion.vhd.errors import VhdDamagedError

    raw = tmp_path / "disk.img"
    raw.write_bytes(os.urandom(2 * MIB))
    with RawFile(str(raw)) as source:
        os.truncate(raw, MIB)
        with pytest.raises(VhdDamagedError, match="was cut"):
            source.pread(MIB - 100, bytearray(200))
