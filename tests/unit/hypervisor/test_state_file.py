"""A state file is whole or refused: every byte changed, every length cut, other files in its place."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mullion.base.errors import NotFoundError
from mullion.hypervisor import state_file
from mullion.hypervisor.state_file import (
    StateAbout,
    StateDamagedError,
    StateInfo,
    StateReader,
    StateWriter,
    TransferStoppedError,
    check_state,
    remove_state,
)
from mullion.model.definition import Accelerator, PartitionDefinition

pytestmark = pytest.mark.unit

ABOUT = StateAbout(
    partition="web",
    uuid="6f1c7f6e-0000-4000-8000-000000000001",
    saved_at="2026-01-02T03:04:05Z",
    qemu_version="7.2.22",
    machine_type="pc-q35-7.2",
    accelerator=Accelerator.TCG,
    host_cpu="a processor",
    definition=PartitionDefinition(name="web"),
    disks={"disk0": "00" * 16},
)


def write(path: Path, stream: bytes, about: StateAbout = ABOUT) -> StateInfo:
    """A state file of this stream, by the product's writer."""
    reading, writing = os.pipe()
    feeder = threading.Thread(target=feed, args=(writing, stream))
    feeder.start()
    writer = StateWriter(str(path), about)
    try:
        writer.copy_from(reading)
        return writer.commit()
    finally:
        feeder.join()
        os.close(reading)


def feed(fd: int, stream: bytes) -> None:
    view = memoryview(stream)
    while view:
        view = view[os.write(fd, view) :]
    os.close(fd)


def load(path: Path, seal: str) -> bytes:
    """The stream of a file, by the product's reader."""
    reading, writing = os.pipe()
    found: list[bytes] = []
    taker = threading.Thread(target=take, args=(reading, found))
    taker.start()
    try:
        with StateReader(str(path)) as reader:
            reader.copy_to(writing, seal=seal)
    finally:
        os.close(writing)
        taker.join()
        os.close(reading)
    return b"".join(found)


def take(fd: int, found: list[bytes]) -> None:
    while piece := os.read(fd, 1 << 20):
        found.append(piece)


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 40_000))
def test_a_stream_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, seed: bytes, times: int) -> None:
    stream = seed * times
    path = tmp_path_factory.mktemp("state") / "web.state"
    info = write(path, stream)
    assert info.plain_bytes == len(stream)
    assert info.file_bytes == path.stat().st_size
    assert info.about == ABOUT
    assert check_state(str(path)) == info
    assert load(path, info.seal) == stream
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["web.state"]


def test_every_changed_byte_is_found_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "web.state"
    write(path, b"memory" * 300)
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bits in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= bits
            path.write_bytes(damaged)
            with pytest.raises(StateDamagedError) as caught:
                check_state(str(path))
            offset = caught.value.context["offset"]
            assert isinstance(offset, int)
            assert 0 <= offset <= len(whole)
            assert str(path) in caught.value.message


def test_every_length_it_may_be_cut_to_is_found(tmp_path: Path) -> None:
    path = tmp_path / "web.state"
    write(path, os.urandom(500))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StateDamagedError):
            check_state(str(path))
    path.write_bytes(whole + b"\0")
    with pytest.raises(StateDamagedError, match="goes on behind its trailer"):
        check_state(str(path))


def test_frames_that_change_places_are_found(tmp_path: Path) -> None:
    path = tmp_path / "web.state"
    size = state_file.FRAME_LIMIT_BYTES
    write(path, b"a" * size + b"b" * size)
    whole = path.read_bytes()
    begin = whole.index(zstandard.MAGIC_NUMBER.to_bytes(4, "little")) - 24
    length = 24 + int.from_bytes(whole[begin : begin + 4], "little")
    first, second = whole[begin : begin + length], whole[begin + length : begin + 2 * length]
    path.write_bytes(whole[:begin] + second + first + whole[begin + 2 * length :])
    with pytest.raises(StateDamagedError, match="frame that does not fit its checksum"):
        check_state(str(path))


def test_a_frame_that_claims_more_than_it_holds_is_not_decompressed(tmp_path: Path) -> None:
    """A file made by somebody hostile, with checksums that are right."""
    path = tmp_path / "web.state"
    bomb = zstandard.ZstdCompressor().compress(bytes(64 * state_file.FRAME_LIMIT_BYTES))
    for stored, plain_bytes in ((bomb, state_file.FRAME_LIMIT_BYTES), (b"no zstd at all", 100)):
        info = forge(path, stored, plain_bytes)
        assert check_state(str(path)) == info
        with pytest.raises(StateDamagedError, match="has a frame that"):
            load(path, info.seal)


def forge(path: Path, stored: bytes, plain_bytes: int) -> StateInfo:
    """A file with one frame of this content, whatever that is."""
    writer = StateWriter(str(path), ABOUT)
    start = state_file._FRAME.pack(len(stored), plain_bytes, bytes(16))[:8]
    head = start + state_file._frame_digest(0, start, stored)
    writer._write(head, stored)
    writer._seal.update(head)
    writer._frames, writer.plain_bytes = 1, plain_bytes
    return writer.commit()


def test_another_whole_state_in_its_place_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.state", b"one")
    write(tmp_path / "b.state", b"two")
    with pytest.raises(StateDamagedError, match="another state has taken its place"):
        load(tmp_path / "b.state", first.seal)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "web.state"
    for content in (
        b"",
        b"conectix" + bytes(600),
        b"MULSTATE" + b"\x02" + bytes(60),
        b"MULSTATE\1\0\0\0\xff\xff\xff\xff",
    ):
        path.write_bytes(content)
        with pytest.raises(StateDamagedError):
            check_state(str(path))
    path.unlink()
    with pytest.raises(NotFoundError):
        check_state(str(path))
    os.mkfifo(path)
    with pytest.raises(StateDamagedError, match="is no file"):
        check_state(str(path))


def test_a_description_that_means_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "web.state"
    write(path, b"x", msgspec.structs.replace(ABOUT, definition=PartitionDefinition(name="Not a name")))
    with pytest.raises(StateDamagedError, match="description that cannot be understood"):
        check_state(str(path))


def test_what_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "web.state"
    reading, writing = os.pipe()
    writer = StateWriter(str(path), ABOUT)
    os.write(writing, b"some")
    writer.stop()
    with pytest.raises(TransferStoppedError):
        writer.copy_from(reading)
    writer.discard()
    assert os.listdir(tmp_path) == []
    os.close(reading)
    os.close(writing)


def test_removing_takes_what_was_begun_too(tmp_path: Path) -> None:
    path = tmp_path / "web.state"
    write(path, b"x")
    (tmp_path / "web.state.new").write_bytes(b"half")
    remove_state(str(path))
    remove_state(str(path))
    assert os.listdir(tmp_path) == []
